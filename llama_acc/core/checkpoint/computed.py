"""Tensors that are computed out of parts in files, some rows at a time: differences, merged matrices, other types."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_acc.core.checkpoint.lazy import Part, blocks_of

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Computed(Part):
    """A part that lies nowhere as it is read: some of the rows and columns of what is computed.

    Attributes:
        compute: gives rows start to stop of the whole, in every column.
        row: its first row in the whole.
        column: its first column in the whole.
    """

    compute: Callable[[int, int], Tensor]
    row: int = 0
    column: int = 0

    @staticmethod
    def by(
        compute: Callable[[int, int], Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> "Computed":
        """All of what is computed."""
        return Computed(shape, dtype, (), compute=compute)

    def narrow(self, dimension: int, start: int, stop: int) -> "Computed":
        """See `Part`."""
        start, stop = min(start, self.shape[dimension]), min(stop, self.shape[dimension])
        shape = (*self.shape[:dimension], stop - start, *self.shape[dimension + 1 :])
        if dimension == 0:
            return replace(self, shape=shape, row=self.row + start)
        return replace(self, shape=shape, column=self.column + start)

    def copy_into(self, target: Tensor) -> None:
        """See `Part`."""
        for start, stop in blocks_of(self.shape, _BLOCK_BYTES):
            values = self.compute(self.row + start, self.row + stop)
            if len(self.shape) == 2:
                values = values[:, self.column : self.column + self.shape[1]]
            target[start:stop].copy_(values)

    def in_place(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """See `Part`: it lies nowhere."""
        return None

    def plus(self, diff: Part) -> Part:
        """See `Part`."""

        def compute(start: int, stop: int) -> Tensor:
            total = read_block(self, start, stop, torch.float32)
            return total.add_(read_block(diff, start, stop, torch.float32)).to(self.dtype)

        return Computed.by(compute, self.shape, self.dtype)

    def interleave(self, heads: int) -> Part:
        """See `Part`."""
        return self._reordered(heads, lambda rows: rows.unflatten(1, (2, -1)).transpose(1, 2))

    def deinterleave(self, heads: int) -> Part:
        """See `Part`."""
        return self._reordered(heads, lambda rows: rows.unflatten(1, (-1, 2)).transpose(1, 2))

    def _reordered(self, heads: int, reorder: Callable[[Tensor], Tensor]) -> Part:
        """Rows in another order in each head; `reorder` is given those of whole heads, [heads, rows, ...]."""
        size = self.shape[0] // heads

        def compute(start: int, stop: int) -> Tensor:
            first, last = start // size, -(-stop // size)
            rows = read_block(self, first * size, last * size, torch.float32).unflatten(0, (-1, size))
            return reorder(rows).flatten(0, 2)[start - first * size : stop - first * size]

        return Computed.by(compute, self.shape, self.dtype)


def read_block(source: Part, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start to stop of a part in a type."""
    block = torch.empty((stop - start, *source.shape[1:]), dtype=dtype)
    source.rows(start, stop).copy_into(block)
    return block


def difference(minuend: Part, subtrahend: Part) -> Computed:
    """One minus the other, in float32."""

    def compute(start: int, stop: int) -> Tensor:
        first = read_block(minuend, start, stop, torch.float32)
        return first.sub_(read_block(subtrahend, start, stop, torch.float32))

    return Computed.by(compute, minuend.shape)


def merged(matrix: Part, lora_a: Part, lora_b: Part) -> Computed:
    """matrix [out, in] + lora_b [out, rank] @ lora_a [rank, in], in float32."""

    def compute(start: int, stop: int) -> Tensor:
        second = read_block(lora_b, start, stop, torch.float32)
        return read_block(matrix, start, stop, torch.float32).addmm_(second, lora_a.to(torch.float32))

    return Computed.by(compute, matrix.shape)


def rounded(source: Part, dtype: torch.dtype) -> Computed:
    """What it is after rounding to a type."""
    return Computed.by(lambda start, stop: read_block(source, start, stop, dtype), source.shape, dtype)


def same_values(one: Part, other: Part, dtype: torch.dtype) -> bool:
    """Whether two parts are the same in a type, compared as whole numbers: so NaN is NaN, and 0 is not -0."""
    whole = torch.int32 if dtype.itemsize == 4 else torch.int16
    return all(
        torch.equal(read_block(one, *rows, dtype).view(whole), read_block(other, *rows, dtype).view(whole))
        for rows in blocks_of(one.shape)
    )
