"""Tensors of a checkpoint's files that are read where they are used, some rows at a time.

A `LazyTensor` is a shape, a type, and a function that gives rows and columns: of a memory-mapped tensor, of several
shards, of a sum, of a matrix in four bits. Slicing and combining them reads nothing. `copy_into` reads a few megabytes
at a time and releases the mapped pages at once, so that reading takes no memory besides the target's.
"""

import ctypes
import functools
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 4 << 20
_HUGE_FROM_BYTES = 4 << 20
_MADV_POPULATE_READ, _MADV_HUGEPAGE = 22, 14  # Linux 5.14; older ones refuse it, and the pages come one by one
_library = functools.cache(ctypes.CDLL)
Read = Callable[[slice, slice], Tensor]


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A parameter of a checkpoint, or some rows and columns of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # its type in the file; that of the base where a diff is added
    read: Read  # gives rows and columns of it, which may be a view of a file; columns count for matrices only
    # The memory-mapped tensors it is read from. (Releasing the pages of anything else would destroy it.)
    mapped: tuple[Tensor, ...] = ()
    source: Any = None  # the tensor it is, or the `NF4Matrix` it is a part of
    offset: tuple[int, int] = (0, 0)  # its first row and column in that matrix
    # Gives what lies from a start to a stop in a dimension in a better way than by reading from the whole
    cut: "Callable[[int, int, int], LazyTensor | None] | None" = None

    @staticmethod
    def of(tensor: Tensor, mapped: bool = False) -> "LazyTensor":
        """The whole of a tensor; `mapped`: it lies in a memory-mapped file."""

        def read(rows: slice, columns: slice) -> Tensor:
            block = tensor[rows, columns] if tensor.dim() == 2 else tensor[rows]
            if mapped and _span_bytes(block) <= 2 * block.nbytes:  # else most of the pages are not needed
                _advise(block, _MADV_POPULATE_READ)
            return block

        def cut(dimension: int, start: int, stop: int) -> LazyTensor:
            return LazyTensor.of(tensor.narrow(dimension, start, stop - start), mapped)

        return LazyTensor(tuple(tensor.shape), tensor.dtype, read, (tensor,) if mapped else (), tensor, cut=cut)

    @staticmethod
    def computed(
        sources: "Sequence[LazyTensor]", read: Read, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> "LazyTensor":
        """What `read` computes from others."""
        return LazyTensor(shape, dtype, read, tuple(tensor for source in sources for tensor in source.mapped))

    @property
    def nbytes(self) -> int:
        """Its size in its own type."""
        return self.numel() * self.dtype.itemsize

    def numel(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()

    def block(self, rows: slice, columns: slice | None = None) -> Tensor:
        """Some rows (and columns) for computing on: of any float type, and perhaps a view of the file."""
        return self.read(rows, columns or slice(0, self.shape[1] if len(self.shape) == 2 else 0))

    def narrow(self, dimension: int, start: int, stop: int) -> "LazyTensor":
        """What lies from start to stop in a dimension (0 rows, 1 a matrix's columns); beyond the end is nothing."""
        start, stop = min(start, self.shape[dimension]), min(stop, self.shape[dimension])
        if self.cut is not None and (part := self.cut(dimension, start, stop)) is not None:
            return part

        def read(rows: slice, columns: slice) -> Tensor:
            if dimension == 0:
                return self.read(slice(start + rows.start, start + rows.stop), columns)
            return self.read(rows, slice(start + columns.start, start + columns.stop))

        shape = (*self.shape[:dimension], stop - start, *self.shape[dimension + 1 :])
        row, column = self.offset
        offset = (row + start, column) if dimension == 0 else (row, column + start)
        return LazyTensor(shape, self.dtype, read, self.mapped, self.source, offset)

    def largest(self) -> float:
        """The largest magnitude; NaN counts as 0."""
        blocks = (self.rows(*rows).to(torch.float32).abs_() for rows in blocks_of(self.shape))
        return max(block.nan_to_num_(nan=0.0, posinf=math.inf).max().item() for block in blocks)

    def rows(self, start: int, stop: int) -> "LazyTensor":
        """Its rows start to stop, as many as there are."""
        return self.narrow(0, start, stop)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Its values in a type, some rows at a time, with the number of the first of these. Each block may be a view of
        a file, and is good until the next one."""
        for start, stop in blocks_of(self.shape):
            part = self.rows(start, stop)
            block = part.block(slice(0, stop - start))
            if (block.dtype, dtype) == (torch.bfloat16, torch.float16):
                block = block.to(torch.float32)  # exact, and by way of it rounding takes a third of the time
            yield start, block.to(dtype)
            for tensor in part.mapped:
                release_pages(tensor)

    def copy_into(self, target: Tensor) -> None:
        """Reads it into `target`, which has its shape, on any device and of any type."""
        for start, stop in blocks_of(self.shape):
            # A GPU gets what is in the file and casts it: cast here, bf16 would be twice as much to send.
            target[start:stop].copy_(self.block(slice(start, stop)).to(target.device))
            for tensor in self.mapped:
                release_pages(tensor)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """A tensor of its own with these values."""
        target = torch.empty(self.shape, dtype=dtype, device=device)
        if target.device.type == "cpu" and target.nbytes >= _HUGE_FROM_BYTES:
            # The system then clears two megabytes at a time: a third of the time of 4096 bytes at a time.
            _advise(target, _MADV_HUGEPAGE)
        self.copy_into(target)
        return target

    def in_place(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The tensor in the file itself where nothing has to be copied: contiguous, of this type, on a CPU."""
        if not isinstance(self.source, Tensor) or dtype != self.dtype or device.type != "cpu":
            return None
        return self.source if self.source.is_contiguous() else None


def concatenate(tensors: Sequence[LazyTensor], dimension: int) -> LazyTensor:
    """Tensors side by side in a dimension, 0 or 1. A part that lies in one of them stays there."""
    ends = [sum(tensor.shape[dimension] for tensor in tensors[:count]) for count in range(len(tensors) + 1)]
    places = list(zip(tensors, ends, ends[1:], strict=False))

    def read(rows: slice, columns: slice) -> Tensor:
        wanted, pieces = (rows, columns)[dimension], []
        for tensor, first, end in places:
            own = slice(max(wanted.start, first) - first, min(wanted.stop, end) - first)
            if own.start < own.stop:
                pieces.append(tensor.block(own, columns) if dimension == 0 else tensor.block(rows, own))
        return torch.cat(pieces, dimension) if len(pieces) > 1 else pieces[0]

    def cut(other: int, start: int, stop: int) -> LazyTensor | None:
        inside = (
            tensor.narrow(other, start - first, stop - first)
            for tensor, first, end in places
            if other == dimension and first <= start and stop <= end
        )
        return next(inside, None)

    first = tensors[0]
    shape = (*first.shape[:dimension], ends[-1], *first.shape[dimension + 1 :])
    mapped = tuple(part for tensor in tensors for part in tensor.mapped)
    return LazyTensor(shape, first.dtype, read, mapped, cut=cut)


def add(base: LazyTensor, diff: LazyTensor) -> LazyTensor:
    """The sum, computed in float32 and rounded to the base's type."""

    def read(rows: slice, columns: slice) -> Tensor:
        return base.block(rows, columns).float().add(diff.block(rows, columns)).to(base.dtype)

    return LazyTensor.computed((base, diff), read, base.shape, base.dtype)


def subtract(minuend: LazyTensor, subtrahend: LazyTensor) -> LazyTensor:
    """The difference, in float32."""

    def read(rows: slice, columns: slice) -> Tensor:
        return minuend.block(rows, columns).float().sub(subtrahend.block(rows, columns))

    return LazyTensor.computed((minuend, subtrahend), read, minuend.shape)


def rounded(source: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """The values after rounding to a type."""
    read = source.block
    return LazyTensor.computed((source,), lambda rows, columns: read(rows, columns).to(dtype), source.shape, dtype)


def reorder_heads(source: LazyTensor, heads: int, to_meta: bool) -> LazyTensor:
    """The rows of wq or wk in Meta's order from Hugging Face's, or the other way round.

    In each head, Hugging Face has the first values of all rotated pairs, then the second ones; Meta has pairs.
    """
    size = source.shape[0] // heads

    def read(rows: slice, columns: slice) -> Tensor:
        first, last = rows.start // size, -(-rows.stop // size)  # whole heads
        block = source.block(slice(first * size, last * size), columns)
        block = block.unflatten(0, (last - first, 2, size // 2) if to_meta else (last - first, size // 2, 2))
        return block.transpose(1, 2).flatten(0, 2)[rows.start - first * size : rows.stop - first * size]

    return LazyTensor.computed((source,), read, source.shape, source.dtype)


def same_values(one: LazyTensor, other: LazyTensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are the same in a type, compared as whole numbers: so NaN is NaN, and 0 is not -0."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return one.shape == other.shape and all(
        np.array_equal(block.view(whole).numpy(), same.view(whole).numpy())  # ten times as fast as torch.equal
        for (_, block), (_, same) in zip(one.blocks(dtype), other.blocks(dtype), strict=True)
    )


def blocks_of(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges of rows that hold at most `_BLOCK_BYTES` in float32, but at least a row each."""
    row_bytes = 4 * torch.Size(shape[1:]).numel()
    count = max(1, _BLOCK_BYTES // max(1, row_bytes))
    return [(start, min(start + count, shape[0])) for start in range(0, shape[0], count)]


def release_pages(tensor: Tensor) -> None:
    """Releases a mapped tensor's pages: read once, they would count as this process's memory until it ends.

    The mapping is private and was not written to, so the pages (and what else lies in the first and the last of them)
    can be read again from the file if they are needed.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        _advise(tensor, mmap.MADV_DONTNEED)


def _span_bytes(tensor: Tensor) -> int:
    """Bytes from a tensor's first value to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _advise(tensor: Tensor, advice: int) -> None:
    """madvise on a tensor's pages, the first and the last included; advice the system does not know has no effect."""
    if not hasattr(mmap, "MADV_DONTNEED") or not tensor.numel():
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + _span_bytes(tensor) - start
    _library(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
