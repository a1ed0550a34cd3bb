"""What to change where a run does not fit, and what each change saves: every one is predicted like the run itself."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llama_acc.core.vram.predict import Usage, predict
from llama_acc.core.vram.simulation import Setup

_LEAST = 0.001
"""A change that saves no more than this share of the run helps nobody."""
_NF4 = ("tuning.quantize=nf4", "checkpoint.trainable_only=true")


@dataclass(frozen=True)
class Change:
    """A change of a run.

    Attributes:
        keys: what to add to the command.
        keeps_the_run: it stays the same run, in less memory.
        fits: it is enough alone.
        saves: bytes allocated less than without it.
    """

    keys: str
    keeps_the_run: bool
    fits: bool
    saves: int


def best_changes(setup: Setup, free: int, with_slack: bool = False, most: int = 3) -> list[Change]:
    """The changes that help most: first those that make it fit, of these first those that leave the run what it is.

    Slack goes up and down in steps, so no change is proposed, nor said to save, for what it does to slack.

    Args:
        setup: the run, which takes too much.
        free: bytes there are.
        with_slack: they have to hold slack and context, too; else what is allocated.
        most: how many to give.
    """

    def taken(usage: Usage) -> int:
        return usage.total if with_slack else usage.allocated

    now = predict(setup).training
    found = []
    for keys, keeps, changed in _possible(setup):
        after = predict(changed).training
        saves = now.allocated - after.allocated
        if saves > _LEAST * now.allocated and taken(after) < taken(now):
            found.append(Change(" ".join(keys), keeps, taken(after) <= free, saves))
        # Those to be preferred come first, and a prediction of a large model takes seconds.
        if sum(change.fits for change in found) == most:
            break
    found.sort(key=lambda change: (not change.fits, not change.keeps_the_run, -change.saves))
    return found[:most]


def _possible(setup: Setup) -> Iterator[tuple[tuple[str, ...], bool, Setup]]:
    recipe, longest, count = setup.recipe, max(setup.lengths), len(setup.lengths)
    train, tuning = recipe.train, recipe.tuning
    if not train.activation_checkpointing:
        yield _changed(setup, True, "train.activation_checkpointing=true")
    if setup.world_size > recipe.parallel.model_parallel_size and recipe.parallel.data_parallel != "fsdp":
        yield _changed(setup, True, "parallel.data_parallel=fsdp")
    for fewer in sorted({count // 2, 1} - {0, count}, reverse=True):
        lengths = tuple(sorted(setup.lengths, reverse=True)[:fewer])
        # Smaller micro-batches are more of them.
        yield (f"train.batch_size={fewer}",), True, _shorter(setup, lengths, max(setup.micro_batches, 2))
    if train.precision == "fp32":
        yield _changed(setup, False, "train.precision=bf16")
    if tuning.method == "full":
        yield _changed(setup, False, "tuning.method=lora")
        yield _changed(setup, False, "tuning.method=lora", *_NF4)
    elif tuning.quantize == "none":
        yield _changed(setup, False, *_NF4)
    if longest > 256:
        shorter = tuple(min(length, longest // 2) for length in setup.lengths)
        yield (f"data.max_tokens={longest // 2}",), False, _shorter(setup, shorter, setup.micro_batches)


def _changed(setup: Setup, keeps: bool, *overrides: str) -> tuple[tuple[str, ...], bool, Setup]:
    recipe = type(setup.recipe).from_mapping(setup.recipe.model_dump(), overrides)
    tuning = recipe.tuning.resolved().at_depth(setup.config.n_layers)
    return overrides, keeps, replace(setup, recipe=recipe, config=replace(setup.config, tuning=tuning))


def _shorter(setup: Setup, lengths: tuple[int, ...], micro_batches: int) -> Setup:
    labels = None if setup.labels is None else min(setup.labels, sum(lengths))
    return replace(setup, lengths=lengths, labels=labels, micro_batches=micro_batches)
