"""The inverse of a prediction: which methods fit into some memory, with how many tokens at a time, what "auto" in a
recipe stands for there, and what to change where a run does not fit."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import Any

import torch

from llama_acc.core.errors import UserError
from llama_acc.core.memory.predict import MemoryRequest, Usage, predict, recipe_and_config, setup_of, streaming
from llama_acc.core.memory.simulate import Setup
from llama_acc.core.model.transformer import parameter_count
from llama_acc.core.model.tuning.lora import LoRA
from llama_acc.core.recipe import TrainSection
from llama_acc.core.workers import WorkerPool

# From what reaches most to what needs least: see docs/peft.md.
_METHODS = ("full", "lora_bias_norm", "lora", "adapter", "bias_norm")
WAYS = [*((method, "none") for method in _METHODS), *((method, "nf4") for method in _METHODS[1:])]
"""Methods and bases, best first."""
LARGEST_BATCH = 256
"""Larger ones are not tried."""
MOST_TOKENS = 16_384
"""Of a micro-batch that is chosen."""
FILLED = 0.95
"""Of the memory there is, what is chosen takes at most so much: predictions were not measured on a GPU yet."""
# So many tokens are taken to keep a GPU busy: then recomputing costs more than a larger micro-batch gains.
_ENOUGH = 4096
_STEP = 1024  # in tokens
_PROCESSES = 2
_LARGE = 10**10  # parameters: of a smaller model, a process starts for longer than it works
_MOST_CHANGES = 3  # are proposed
_LEAST = 0.001  # a change that saves no more than this share of the run helps nobody
_NF4 = "tuning.quantize=nf4 checkpoint.trainable_only=true"


@dataclass(frozen=True)
class Fit:
    """A method in some memory."""

    method: str
    quantize: str  # "none" or "nf4"
    least: int  # bytes that one example of `length` tokens takes
    batch_size: int  # most examples of that length at a time, up to `LARGEST_BATCH`; 0 = none fits
    longest: int  # most tokens of a single example, not above the model's context
    length: int
    slowdown: float | None = None  # estimated, with the base streamed, which it is if else nothing fits


def fitting(request: MemoryRequest, memory: int, rate: float = math.inf) -> Iterator[Fit]:
    """Every method in `memory` bytes of each GPU, as soon as it is known; its batch size is not the request's. A method
    asked for stands alone. `rate`: floating-point operations that the GPU does in a second."""
    ways = [way for way in WAYS if request.tuning in (None, way[0]) and request.quantize in (None, way[1])]
    if not ways:
        raise UserError(f"method {request.tuning} has no base in {request.quantize}", "see docs/peft.md")
    if (request.gpus or 1) > (request.model_parallel_size or 1):
        request = replace(request, overrides=("parallel.data_parallel=fsdp", *request.overrides))
    setups = [setup_of(replace(request, tuning=method, quantize=quantize, batch_size=1)) for method, quantize in ways]
    fit = partial(_fit, memory=memory, rate=rate)
    if len(setups) == 1 or parameter_count(setups[0].config) < _LARGE:
        yield from map(fit, setups)
        return
    with WorkerPool(_PROCESSES, "predicts the memory", "is the machine short of memory?") as pool:
        yield from chain.from_iterable(pool.map_ahead(fit, ([one] for one in setups), len(setups)))


def _fit(setup: Setup, memory: int, rate: float) -> Fit:
    length, least = max(setup.lengths), _taken(setup, 1)
    if least.total > memory and setup.world_size == 1 and not setup.config.tuning.trains_all:
        setup = streamed(setup)
        least = _taken(setup, 1)
    count = 0 if least.total > memory else _largest(least, partial(_taken, setup), memory, LARGEST_BATCH)
    # As many tokens in one example take no more than in several: attention keeps nothing for pairs of tokens.
    longest = min(count * length, setup.config.max_seq_len)
    quantize = "nf4" if setup.is_quantized else "none"
    slowdown = None
    if setup.settings.stream_base:
        slowdown = streaming(setup).slowdown(max(count, 1) * least.flops, rate)
    return Fit(setup.config.tuning.method, quantize, least.total, count, longest, length, slowdown)


def streamed(setup: Setup) -> Setup:
    """The same with its base streamed."""
    return replace(setup, settings=replace(setup.settings, stream_base=True, activation_checkpointing=True))


def _taken(setup: Setup, count: int) -> Usage:
    return predict(replace(setup, lengths=setup.lengths[:1] * count))


def _largest(least: Usage, taken: Callable[[int], Usage], memory: int, limit: int) -> int:
    """The largest count that fits, between one that does and one that does not.

    What is allocated grows about evenly with it; what is reserved goes in steps, so where guesses exclude few counts,
    the next one is the middle of what is left, or far above what fits.
    """
    low, low_bytes, high, high_bytes = 1, least.total, limit + 1, 0
    slope, poor = 0.0, 0  # bytes of one more; how many guesses in turn excluded few
    while high - low > 1:
        width, room = high - low, memory - low_bytes
        if high_bytes:
            guess = low + (width // 2 if poor > 2 else int(width * room / (high_bytes - low_bytes)))
        elif slope and poor <= 2:
            guess = low + int(room / slope)
        else:
            guess = low * 16  # nearer to what fits, growth is told better, and a step of few examples costs little
        guess = min(max(guess, low + 1), high - 1)
        usage = taken(guess)
        slope = max((usage.allocated - least.allocated) / (guess - 1), 1.0)
        if usage.total <= memory:
            low, low_bytes = guess, usage.total
        else:
            high, high_bytes = guess, usage.total
        poor = poor + 1 if 2 * (high - low) > width else 0
    return low


def fill(
    train: TrainSection,
    setup_with: Callable[[TrainSection], Setup],
    memory: int,
    call: Callable[..., Any],
    rate: float = math.inf,
) -> tuple[TrainSection, Usage]:
    """What "auto" in a recipe's section stands for in `memory` bytes of a GPU, and what that takes.

    Activation checkpointing is off if 4,096 tokens fit without it. Micro-batches have as many tokens as fit, up to
    16,384; with a streamed base no more than 4,096, or than it takes until computing is as long as copying: a block is
    copied once for all of its tokens. If nothing fits, it is what takes least.

    `setup_with` gives the run with another section, `call` calls `predict`, here or in another process, and `rate` is
    how many floating-point operations the GPU does in a second, for a streamed base; infinite if unknown.
    """
    streams = train.stream_base is True

    def with_most_tokens(recompute: bool, unit: int) -> tuple[TrainSection, Usage]:
        @cache
        def taken(count: int) -> Usage:
            usage: Usage = call(predict, setup_with(train.without_auto(unit * count, recompute)))
            return usage

        limit = MOST_TOKENS // unit if train.micro_batch_tokens == "auto" else 1
        if streams and limit > 1:
            one = setup_with(train.without_auto(unit, recompute))
            hidden = one.tokens * streaming(one).slowdown(taken(1).flops, rate)
            limit = math.ceil(min(MOST_TOKENS, max(hidden, _ENOUGH)) / unit)
        count = _largest(taken(1), taken, memory, limit) if taken(1).total <= memory else 1
        return train.without_auto(unit * count, recompute), taken(count)

    if train.activation_checkpointing == "auto" and not streams:
        chosen, usage = with_most_tokens(False, _ENOUGH)
        if usage.total <= memory:
            return chosen, usage
    return with_most_tokens(train.activation_checkpointing is not False, _STEP)


def filled(request: MemoryRequest, memory: int, rate: float) -> Setup:
    """The run of a request with what "auto" in its recipe stands for on GPUs of so many bytes and of this rate: see
    `fill`. One that does not fit otherwise is streamed, if that is left open."""
    recipe, with_section = recipe_and_config(request)[0], partial(setup_of, request)
    train = recipe.train
    if train.stream_base == "auto" and recipe.why_resident() is None and (request.gpus or 1) == 1:
        least = predict(with_section(train.without_auto(1024)))
        if least.total > FILLED * memory:
            train = train.model_copy(update={"stream_base": True})
    if train.has_auto:
        train, _ = fill(train, with_section, int(FILLED * memory), lambda function, run: function(run), rate)
    return with_section(train)


@dataclass(frozen=True)
class Change:
    """A change of a run."""

    keys: str  # what to add to the command
    keeps_the_run: bool  # it stays the same run, in less memory
    fits: bool  # it is enough alone
    saves: int  # bytes allocated less than without it


def best_changes(setup: Setup, free: int, with_slack: bool = False) -> list[Change]:
    """The changes that help most: first those that make it fit, of these first those that leave the run what it is.

    Slack goes up and down in steps, so no change is proposed, nor said to save, for what it does to slack. The bytes
    that are free have to hold what is allocated; `with_slack`: slack and context, too.
    """

    def taken(usage: Usage) -> int:
        return usage.total if with_slack else usage.allocated

    now = predict(setup)
    found: list[Change] = []
    for keys, keeps, changed in _possible(setup):
        after = predict(changed)
        saves = now.allocated - after.allocated
        if saves > _LEAST * now.allocated and taken(after) < taken(now):
            found.append(Change(keys, keeps, taken(after) <= free, saves))
        # Those to be preferred come first, and a prediction of a large model takes seconds.
        if sum(change.fits for change in found) == _MOST_CHANGES:
            break
    found.sort(key=lambda change: (not change.fits, not change.keeps_the_run, -change.saves))
    return found[:_MOST_CHANGES]


def _possible(setup: Setup) -> Iterator[tuple[str, bool, Setup]]:
    """Changes, whether the run stays the same, and with them."""
    settings, longest, count = setup.settings, max(setup.lengths), len(setup.lengths)

    def with_step(**changes: Any) -> Setup:
        return replace(setup, settings=replace(settings, **changes))

    def shorter(lengths: tuple[int, ...], micro_batches: int) -> Setup:
        labels = None if setup.labels is None else min(setup.labels, sum(lengths))
        return replace(setup, lengths=lengths, labels=labels, micro_batches=micro_batches)

    if not settings.activation_checkpointing:
        yield "train.activation_checkpointing=true", True, with_step(activation_checkpointing=True)
    if setup.world_size > settings.model_parallel_size and settings.data_parallel != "fsdp":
        yield "parallel.data_parallel=fsdp", True, with_step(data_parallel="fsdp")
    can_stream = setup.world_size == 1 and not setup.config.tuning.trains_all
    if can_stream and not settings.stream_base:
        yield "train.stream_base=true checkpoint.trainable_only=true", True, streamed(setup)
    for fewer in sorted({count // 2, 1} - {0, count}, reverse=True):
        lengths = tuple(sorted(setup.lengths, reverse=True)[:fewer])
        # Smaller micro-batches are more of them.
        yield f"train.batch_size={fewer}", True, shorter(lengths, max(setup.micro_batches, 2))
    if settings.dtype == torch.float32:
        yield "train.precision=bf16", False, with_step(dtype=torch.bfloat16)
    quantized = with_step(quantize_skip=())
    if setup.config.tuning.trains_all:
        lora = replace(setup.config, tuning=LoRA())
        yield "tuning.method=lora", False, replace(setup, config=lora)
        yield f"tuning.method=lora {_NF4}", False, replace(quantized, config=lora)
    elif not setup.is_quantized:
        yield _NF4, False, quantized
    if longest > 256:
        lengths = tuple(min(length, longest // 2) for length in setup.lengths)
        yield f"data.max_tokens={longest // 2}", False, shorter(lengths, setup.micro_batches)
