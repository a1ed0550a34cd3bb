"""Counts the memory that another program takes: its own model and step are run, on tensors without values.

What a GPU does not run here stands in for what it runs there: bitsandbytes' quantised linear layer, as it was in 2023,
and FlashAttention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llama_acc.core.vram.simulation import watched
from llama_acc.core.vram.tracker import MemoryTracker

_BLOCK = 64
_BLOCK_OF_SCALES = 256


@contextmanager
def counted() -> Iterator[MemoryTracker]:
    """Operations make tensors that have a shape and no values, and are watched as on a GPU."""
    with watched(tracker := MemoryTracker(512), "cuda"):
        yield tracker


class _Product(torch.autograd.Function):
    """bitsandbytes 0.41.1's MatMul4Bit: the whole matrix is written out, in half precision and then in the input's, and
    the input is kept though nothing needs it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "Linear4bit") -> Tensor:
        y = nn.functional.linear(x, layer.written_out().to(x.dtype))
        ctx.layer, ctx.kept = layer, x
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        return torch.matmul(dy, ctx.layer.written_out().to(dy.dtype)), None


class Linear4bit(nn.Module):
    """A linear layer in NF4 as bitsandbytes 0.41.1 has it, with its memory and without its values.

    Args:
        rows, columns: of the matrix.
        stored_as: what the matrix was before, and is written out as: float16 where bitsandbytes moved it to the GPU.
        compute_dtype: its input is turned into this.
        twice: whether the scales are quantised, too.
    """

    def __init__(
        self, rows: int, columns: int, stored_as: torch.dtype, compute_dtype: torch.dtype, twice: bool
    ) -> None:
        super().__init__()
        numbers, blocks = rows * columns, rows * columns // _BLOCK
        self.shape, self.stored_as, self.compute_dtype = (rows, columns), stored_as, compute_dtype
        self.register_buffer("packed", torch.empty(numbers // 2, 1, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8 if twice else torch.float32))
        if twice:
            self.register_buffer("scales_of_scales", torch.empty(-(-blocks // _BLOCK_OF_SCALES)))
        self.twice = twice

    def written_out(self) -> Tensor:
        """The matrix: its scales first, where they are quantised."""
        scales = torch.empty(len(self.scales)) if self.twice else self.scales  # type: ignore[arg-type]
        matrix = torch.empty(self.shape, dtype=self.stored_as)
        del scales
        return matrix

    def forward(self, x: Tensor) -> Tensor:
        """x [..., columns] to [..., rows]."""
        y: Tensor = _Product.apply(x.to(self.compute_dtype), self)
        return y.to(x.dtype)
