"""The inverse of a prediction: which methods fit into some memory, and with how many tokens at a time."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.train.plan import StepSettings, model_on_meta
from llama_acc.core.vram.gpus import overhead
from llama_acc.core.vram.predict import Usage, predict
from llama_acc.core.vram.request import Request, setup_of
from llama_acc.core.vram.simulation import Setup

# From what reaches most to what needs least: see docs/peft.md.
_METHODS = ("full", "lora_bias_norm", "lora", "adapter", "bias_norm")
WAYS = [*((method, "none") for method in _METHODS), *((method, "nf4") for method in _METHODS[1:])]
"""Methods and bases, best first."""
LARGEST_BATCH = 256
"""Larger ones are not tried."""
_PROCESSES = 2
_LARGE = 10**10  # parameters: of a smaller model, a process starts for longer than it works


@dataclass(frozen=True)
class Fit:
    """A method in some memory.

    Attributes:
        method: its name.
        quantize: "none" or "nf4".
        least: bytes that one example of `length` tokens takes; where `is_bound`, it takes more.
        batch_size: most examples of that length at a time, up to `LARGEST_BATCH`; 0 = none fits.
        longest: most tokens of a single example, not above the model's context; 0 = not even one of `length`.
        length: see there.
        is_bound: whether what lasts from step to step does not fit, and no step was simulated.
    """

    method: str
    quantize: str
    least: int
    batch_size: int
    longest: int
    length: int
    is_bound: bool = False


def fitting(request: Request, memory: int) -> Iterator[Fit]:
    """Every method in `memory` bytes of each GPU, as soon as it is known. A method asked for stands alone.

    Args:
        request: the model and the length; of a batch size, nothing.
        memory: bytes of one GPU.
    """
    ways = [way for way in WAYS if request.tuning in (None, way[0]) and request.quantize in (None, way[1])]
    if not ways:
        raise UserError(f"method {request.tuning} has no base in {request.quantize}", "see docs/peft.md")
    overrides = request.overrides
    if (request.gpus or 1) > (request.model_parallel_size or 1):
        overrides = ("parallel.data_parallel=fsdp", *overrides)
    setups = [
        setup_of(replace(request, tuning=method, quantize=quantize, batch_size=1, overrides=overrides))
        for method, quantize in ways
    ]
    fit = partial(_fit, memory=memory)
    if len(setups) == 1 or setups[0].config.parameter_count() < _LARGE:
        yield from map(fit, setups)
        return
    with ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(fit, setups)


def _fit(setup: Setup, memory: int) -> Fit:
    length, tuning = max(setup.lengths), setup.recipe.tuning
    lasting = _lasting(setup)
    if lasting > memory:
        return Fit(tuning.method, tuning.quantize, lasting, 0, 0, length, is_bound=True)
    taken = partial(_taken, setup)
    least = taken(1)
    if least.total > memory:
        return Fit(tuning.method, tuning.quantize, least.total, 0, 0, length)
    count = _largest(least, taken, memory, LARGEST_BATCH)
    # As many tokens in one example take no more than in several: attention keeps nothing for pairs of tokens.
    longest = min(count * length, setup.config.max_seq_len)
    return Fit(tuning.method, tuning.quantize, least.total, count, longest, length)


def _taken(setup: Setup, count: int) -> Usage:
    return predict(replace(setup, lengths=setup.lengths[:1] * count)).training


def _lasting(setup: Setup) -> int:
    """Bytes that one process has from step to step: weights, moments, and the context. It takes a moment to find."""
    if setup.world_size > 1 or setup.config.vision is not None:
        return 0
    model = model_on_meta(setup.config, StepSettings.of(setup.recipe), Parallel())
    moments = sum(2 * parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return weights + moments + (overhead().context if setup.device_type == "cuda" else 0)


def _largest(least: Usage, taken: Callable[[int], Usage], memory: int, limit: int) -> int:
    """The largest count that fits, between one that does and one that does not.

    What is allocated grows about evenly with it; what is reserved goes in steps, so where guesses exclude few counts,
    the next one is the middle of what is left, or far above what fits.
    """
    low, low_bytes, high = 1, least.total, limit + 1
    slope, poor = 0.0, 0  # bytes of one more; how many guesses in turn excluded few
    while high - low > 1:
        width = high - low
        if poor > 2 and high <= limit:
            guess = (low + high) // 2
        elif poor > 2 or not slope:
            guess = low * 4
        else:
            guess = low + int((memory - low_bytes) / slope)
        guess = min(max(guess, low + 1), high - 1)
        usage = taken(guess)
        slope = max((usage.allocated - least.allocated) / (guess - 1), 1.0)
        if usage.total <= memory:
            low, low_bytes = guess, usage.total
        else:
            high = guess
        poor = poor + 1 if 2 * (high - low) > width else 0
    return low
