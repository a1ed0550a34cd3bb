"""The inverse of a prediction: which methods fit into some memory, and with how many tokens at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from llama_acc.core.errors import UserError
from llama_acc.core.vram.predict import Usage, predict
from llama_acc.core.vram.request import Request, setup_of
from llama_acc.core.vram.simulation import Setup

# From what reaches most to what needs least: see docs/peft.md.
_METHODS = ("full", "lora_bias_norm", "lora", "adapter", "bias_norm")
WAYS = [*((method, "none") for method in _METHODS), *((method, "nf4") for method in _METHODS[1:])]
"""Methods and bases, best first."""
LARGEST_BATCH = 256
"""Larger ones are not tried."""


@dataclass(frozen=True)
class Fit:
    """A method in some memory.

    Attributes:
        method: its name.
        quantize: "none" or "nf4".
        least: bytes that one example of `length` tokens takes.
        batch_size: most examples of that length at a time, up to `LARGEST_BATCH`; 0 = none fits.
        longest: most tokens of a single example, not above the model's context; 0 = not even one of `length`.
        length: see there.
    """

    method: str
    quantize: str
    least: int
    batch_size: int
    longest: int
    length: int


def fitting(request: Request, memory: int, tell: Callable[[str], None] = lambda _: None) -> list[Fit]:
    """Every method in `memory` bytes of each GPU: those that fit first, best first. A method asked for stands alone.

    Args:
        request: the model and the length; of a batch size, nothing.
        memory: bytes of one GPU.
        tell: told what is tried.
    """
    ways = [way for way in WAYS if request.tuning in (None, way[0]) and request.quantize in (None, way[1])]
    if not ways:
        raise UserError(f"method {request.tuning} has no base in {request.quantize}", "see docs/peft.md")
    found = []
    for method, quantize in ways:
        tell(f"trying {method}" + (", base in NF4" if quantize == "nf4" else ""))
        overrides = request.overrides
        if (request.gpus or 1) > (request.model_parallel_size or 1):
            overrides = ("parallel.data_parallel=fsdp", *overrides)
        asked = replace(request, tuning=method, quantize=quantize, batch_size=1, overrides=overrides)
        found.append(_fit(setup_of(asked), memory))
    return sorted(found, key=lambda fit: not fit.batch_size)


def _fit(setup: Setup, memory: int) -> Fit:
    length, tuning = max(setup.lengths), setup.recipe.tuning

    def taken(count: int, tokens: int = length) -> Usage:
        return predict(replace(setup, lengths=(tokens,) * count)).training

    least = taken(1)
    if least.total > memory:
        return Fit(tuning.method, tuning.quantize, least.total, 0, 0, length)
    count = _largest(least, taken, memory, LARGEST_BATCH)
    # As many tokens in one example take no more than in several: attention keeps nothing for pairs of tokens.
    longest = min(count * length, setup.config.max_seq_len)
    return Fit(tuning.method, tuning.quantize, least.total, count, longest, length)


def _largest(least: Usage, taken: Callable[[int], Usage], memory: int, limit: int) -> int:
    """The largest count that fits, between one that does and one that does not.

    What is allocated grows about evenly with it; what is reserved goes in steps, so where a guess excludes few counts,
    the next one is the middle of what is left, or far above what fits.
    """
    low, low_bytes, high = 1, least.total, limit + 1
    slope, halve = 0.0, False
    while high - low > 1:
        width = high - low
        if halve and high <= limit:
            guess = (low + high) // 2
        elif halve or not slope:
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
        halve = 2 * (high - low) > width
    return low
