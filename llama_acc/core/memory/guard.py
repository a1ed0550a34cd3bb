"""Whether a run fits, asked before it loads anything; and what to say when memory runs out all the same."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llama_acc.core.device import free_memory, peak_memory_gib
from llama_acc.core.distributed import environment
from llama_acc.core.distributed.groups import Parallel, local_part, local_world_size
from llama_acc.core.errors import RunError, UserError, listed
from llama_acc.core.memory.fit import FILLED, MOST_TOKENS, Change, best_changes, fill
from llama_acc.core.memory.predict import assumed_rate, predict, streaming
from llama_acc.core.memory.simulate import Setup
from llama_acc.core.model.transformer import parameter_count
from llama_acc.core.recipe import Recipe, TrainSection
from llama_acc.core.text import count_text, size_text
from llama_acc.core.train.log import device_name
from llama_acc.core.train.plan import Plan
from llama_acc.core.train.trainer import Trainer, check_streams
from llama_acc.core.workers import WorkerPool

_Result = TypeVar("_Result")
_FAR_BELOW = 8
"""A run whose bound is so many times below what is free is not simulated, which would take longer than its steps."""


def setup_of_run(plan: Plan, world_size: int, device_type: str, items: Sequence[int] | None = None) -> Setup:
    """What is predicted of a run: its largest micro-batch, or that of these items."""
    ranks = world_size // plan.settings.model_parallel_size
    items = list(plan.largest_micro_batch(ranks) if items is None else items)
    lengths, labels = plan.train.lengths[items], int(plan.train.label_counts[items].sum())
    micro_batches = 2 if plan.accumulates(ranks) else 1
    device_type = "cpu" if device_type == "cpu" else "cuda"
    samples = plan.samples.at_a_time, plan.samples.length
    run = plan.config, plan.settings, tuple(lengths.tolist()), labels, micro_batches, world_size
    return Setup(*run, device_type=device_type, samples=samples)


def stream_if_needed(plan: Plan, world_size: int, device: torch.device) -> Plan:
    """The plan, with its base streamed if the recipe leaves that open, the least run does not fit without, and it can
    be.
    """
    train = plan.recipe.train
    if train.stream_base is True:
        if world_size > 1:
            raise UserError("a base is streamed by a single process", "leave out train.stream_base or --nproc")
        if device.type == "mps":
            raise UserError("a base is not streamed on mps", "leave out train.stream_base, or try --device cpu")
        if plan.layouts or not plan.recipe.model.pretrained_list():  # else it is a dry run
            check_streams(plan)
        return plan
    is_open = train.stream_base == "auto" and plan.recipe.why_resident() is None and plan.layouts
    if not is_open or world_size > 1 or device.type == "mps":
        return plan
    free, least = free_memory(device), setup_of_run(plan.with_chosen(train.without_auto(1024), ""), 1, device.type)
    if streaming(least).stays * _FAR_BELOW < free or predict(least).allocated <= free:
        return plan
    streamed = plan.with_chosen(train.model_copy(update={"stream_base": True}), "")
    try:
        check_streams(streamed)
    except UserError:
        return plan  # `check_fits` says what to do
    helps = predict(setup_of_run(streamed.with_chosen(streamed.recipe.train.without_auto(1024), ""), 1, device.type))
    return streamed if helps.allocated <= free else plan


def fill_memory(
    plan: Plan, world_size: int, device: torch.device, resumed: Path | None = None
) -> tuple[TrainSection, str]:
    """What "auto" in the plan's recipe stands for on this device, as `fill` says, and why; of a streamed base also the
    share of copying on a GPU.

    A run that is resumed from a checkpoint goes on with what it chose, on whatever device. Elsewhere than on a GPU,
    "auto" is the default of the key.
    """
    train, streams = plan.recipe.train, plan.settings.stream_base and device.type == "cuda"
    if not train.has_auto and not streams:
        return train, plan.chosen

    def setup_with(section: TrainSection) -> Setup:
        return setup_of_run(plan.with_chosen(section, ""), world_size, device.type)

    free, gpu = free_memory(device), device_name(device) if streams else ""
    most = train.without_auto(MOST_TOKENS, recompute=False)
    if not train.has_auto:
        chosen, why = train, "as the recipe says"
    elif resumed is not None:
        chosen, why = train.as_in(Recipe.load(resumed / "recipe.yaml").train), "what the run chose"
    elif device.type != "cuda":
        chosen, why = train.without_auto(), f"what auto is on {device.type}"
    elif _bound(setup_with(most)) * _FAR_BELOW < free:
        chosen, why = most, f"auto, far below the {size_text(free)} that are free"
    else:
        with subprocess_calls() as call:
            chosen, usage = fill(train, setup_with, int(FILLED * free), call, assumed_rate(gpu))
        why = f"auto, {size_text(usage.total)} predicted of {size_text(free)} free"
    if streams:
        setup = setup_with(chosen)
        why += f"; {streaming(setup).waiting(predict(setup).flops, assumed_rate(gpu), gpu)}"
    return chosen, f"{_chosen_text(chosen)}: {why}"


def _chosen_text(train: TrainSection) -> str:
    examples, tokens = train.bounds()
    parts = [] if tokens is None else [count_text(tokens, "token")]
    if tokens is None or examples < train.global_batch_size:
        parts.append(count_text(examples, "example"))
    checkpointing = "with" if train.activation_checkpointing else "without"
    return f"at most {' and '.join(parts)}, {checkpointing} activation checkpointing"


def check_fits(plan: Plan, parallel: Parallel, device: torch.device) -> None:
    """Refuses a run that cannot fit into the memory that is free."""
    free = free_memory(device) // (local_world_size() if device.type == "cpu" else 1)
    setup = setup_of_run(plan, parallel.world_size, device.type)
    if device.type == "mps" or _bound(setup) * _FAR_BELOW < free:
        return
    usage = run_in_subprocess(predict, setup)
    # Slack is mostly given back, and the context is there already: what surely does not fit is refused, nothing else.
    if usage.allocated <= free:
        return
    changes = run_in_subprocess(best_changes, setup, free)
    raise UserError(
        f"the run does not fit: it takes {size_text(usage.allocated)} on {device.type}, {size_text(free)} are free "
        f"(its largest micro-batch has {_batch(setup.lengths)}, at its fullest in {usage.moment})\n"
        f"{_lines(usage.parts)}",
        f"{_advice(changes)}; --force tries it all the same",
    )


def _bound(setup: Setup) -> int:
    """Bytes that a run on one process stays far below: everything trained in float32, and nothing computed again."""
    config = setup.config
    of_token = config.n_layers * (16 * config.dim + 6 * config.hidden_dim) + 3 * config.vocab_size
    return 20 * parameter_count(config) + 4 * (setup.tokens + math.prod(setup.samples)) * of_token


def _batch(lengths: Sequence[int]) -> str:
    shown = ", ".join(f"{length:,}" for length in sorted(lengths, reverse=True)[:8])
    more = f" and {len(lengths) - 8} more" if len(lengths) > 8 else ""
    return f"documents of {shown}{more} tokens"


def _lines(parts: Mapping[str, int]) -> str:
    shown = {part: size for part, size in parts.items() if size and part != "CUDA context"}
    return listed([f"{part}: {size_text(size)}" for part, size in shown.items()])


def _advice(changes: Sequence[Change]) -> str:
    if not changes:
        return "use a smaller model, or more memory"
    shown = [
        f"{change.keys} (saves {size_text(change.saves)}{'' if change.fits else ', not enough alone'})"
        for change in changes
    ]
    return "what would help most: " + "; ".join(shown)


def out_of_memory_error(trainer: Trainer, cause: str) -> RunError:
    """What to tell the user of memory that ran out while a trainer computed: the batch, what was predicted for it and
    what there is, and what to change. `cause` is the device's own words."""
    device = trainer.device
    where = f"at step {trainer.step + 1}" if trainer.has_started else "while the largest micro-batch was tried"
    setup = setup_of_run(trainer.plan, trainer.parallel.world_size, device.type, trainer.current_items)
    kind, peak = "memory", int(peak_memory_gib(device) * 2**30)
    limit = free_memory(device) + peak
    if device.type == "cuda":
        kind, limit = "GPU memory", torch.cuda.get_device_properties(device).total_memory
    parameters = list(trainer.model.parameters())
    used = {
        "weights": sum(local_part(parameter).tensor.nbytes for parameter in parameters),
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "optimizer": sum(value.nbytes for _, _, value in trainer.optimizer.state_tensors()),
    }
    used["everything else"] = max(peak - sum(used.values()), 0)
    message = f"out of {kind} {where}: {cause}\nThe micro-batch has {_batch(setup.lengths)}. In use:\n{_lines(used)}"
    changes: list[Change] = []
    with contextlib.suppress(MemoryError):  # there may be none left to predict with
        usage = run_in_subprocess(predict, setup)
        # What is allocated was found to fit, so slack may be what did not.
        changes = run_in_subprocess(best_changes, setup, limit, True)
        predicted = f"Predicted at most {size_text(usage.total)}, in {usage.moment}:"
        message += f"\n{predicted}\n{_lines(usage.parts)}"
    return RunError(f"{message}\nEvery checkpoint that was saved is whole", _advice(changes))


@contextlib.contextmanager
def subprocess_calls() -> Iterator[Callable[..., Any]]:
    """What calls functions; in a process of their own where this one has joined others, as torch has one process group
    at a time.

    Raises:
        RunError: the process was ended.
    """
    if not dist.is_initialized():
        yield lambda function, *arguments: function(*arguments)
        return
    with WorkerPool(1, "predicts the memory", "is the machine short of memory?") as pool:
        yield lambda *call: next(pool.map_ahead(_call_alone, [[call]], 0))[0]


def run_in_subprocess(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Calls one function: see `subprocess_calls`."""
    with subprocess_calls() as call:
        result: _Result = call(function, *arguments)
        return result


def _call_alone(call: Sequence[Any]) -> Any:
    """Calls a function with what follows it, in a process that has joined no others."""
    environment.stand_alone()
    function, *arguments = call
    return function(*arguments)
