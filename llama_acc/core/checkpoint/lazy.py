"""A part of a parameter that lies in files: known by shape and type, read when it is copied into place.

A `Part` is put together of pieces, each some rows of a tensor in a memory-mapped file. Cutting a part, or reordering
its rows, only changes which pieces there are and where they go; bytes are read by `copy_into`, a few megabytes at a
time, and the mapped pages are let go at once, so that reading takes no memory besides the target's.
"""

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_BYTES = 4 << 20
_HUGE_FROM_BYTES = 4 << 20
_MADV_POPULATE_READ = 22  # Linux 5.14; older ones refuse it, and the pages come one by one
_MADV_HUGEPAGE = 14


class Piece(NamedTuple):
    """Rows of a tensor in a file, and where they go in a part.

    Attributes:
        source: [n] or [n, columns], a view of the file's tensor.
        row: source row k is the part's row `row + k * step`.
        step: see `row`.
        column: where its columns begin in the part.
        mapped: it lies in a memory-mapped file. (Letting go of the pages of anything else would destroy it.)
    """

    source: Tensor
    row: int = 0
    step: int = 1
    column: int = 0
    mapped: bool = False

    def cut_rows(self, start: int, stop: int) -> "Piece | None":
        """What of it is in the part's rows start to stop, counted from start; None = nothing."""
        first = max(0, -(-(start - self.row) // self.step))
        last = min(len(self.source), -(-(stop - self.row) // self.step))
        if first >= last:
            return None
        return self._replace(source=self.source[first:last], row=self.row + first * self.step - start)

    def cut_columns(self, start: int, stop: int) -> "Piece | None":
        """What of it is in the part's columns start to stop, counted from start; None = nothing."""
        first, last = max(0, start - self.column), min(self.source.shape[1], stop - self.column)
        if first >= last:
            return None
        return self._replace(source=self.source[:, first:last], column=self.column + first - start)

    def copy_into(self, target: Tensor) -> None:
        """Copies it to its place in `target`, the whole part."""
        end = self.row + (len(self.source) - 1) * self.step + 1
        place = target[self.row : end : self.step]
        if target.dim() == 2:
            place = place[:, self.column : self.column + self.source.shape[1]]
        rows = max(1, _BLOCK_BYTES // max(1, self.source.stride(0) * self.source.element_size()))
        for start in range(0, len(self.source), rows):
            block = self.source[start : start + rows]
            if self.mapped:
                _bring_pages(block)
            place[start : start + rows].copy_(block)
            if self.mapped:
                release_pages(block)


@dataclass(frozen=True)
class Part:
    """A parameter, or a rank's share of it, that lies in files.

    Attributes:
        shape: its shape.
        dtype: its type in the file; that of the base where diffs are added.
        layers: pieces that cover it; those of every further layer are added to it (diff checkpoints).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layers: tuple[tuple[Piece, ...], ...]

    @staticmethod
    def of(tensor: Tensor, mapped: bool = False) -> "Part":
        """The whole of a tensor; `mapped`: it lies in a memory-mapped file."""
        return Part(tuple(tensor.shape), tensor.dtype, ((Piece(tensor, mapped=mapped),),))

    @property
    def is_floating_point(self) -> bool:
        """Whether it holds numbers with a fraction."""
        return self.dtype.is_floating_point

    @property
    def nbytes(self) -> int:
        """Its size in its own type."""
        return self.numel() * self.dtype.itemsize

    def numel(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()

    def rows(self, start: int, stop: int) -> "Part":
        """Its rows start to stop, as many as there are."""
        return self.narrow(0, start, stop)

    def narrow(self, dimension: int, start: int, stop: int) -> "Part":
        """What lies from start to stop in a dimension (0 rows, 1 columns); beyond the end there is nothing."""
        start, stop = min(start, self.shape[dimension]), min(stop, self.shape[dimension])
        shape = (*self.shape[:dimension], stop - start, *self.shape[dimension + 1 :])
        cut = Piece.cut_rows if dimension == 0 else Piece.cut_columns
        layers = tuple(
            tuple(kept for piece in layer if (kept := cut(piece, start, stop)) is not None) for layer in self.layers
        )
        return replace(self, shape=shape, layers=layers)

    def plus(self, diff: "Part") -> "Part":
        """The sum with a diff of the same shape: computed in float32, rounded to this part's type."""
        return replace(self, layers=self.layers + diff.layers)

    def interleave(self, heads: int) -> "Part":
        """Rows in Meta's order from rows in Hugging Face's, for wq and wk.

        In each head, Hugging Face has the first values of all rotated pairs, then the second ones; Meta has pairs.
        """
        half = self.shape[0] // heads // 2
        layers = []
        for layer in self.layers:
            pieces = []
            for start in range(0, self.shape[0], half):
                head, second = divmod(start // half, 2)
                cuts = (piece.cut_rows(start, start + half) for piece in layer)
                pieces += [
                    cut._replace(row=2 * (head * half + cut.row) + second, step=2 * cut.step) for cut in cuts if cut
                ]
            layers.append(tuple(pieces))
        return replace(self, layers=tuple(layers))

    def deinterleave(self, heads: int) -> "Part":
        """Rows in Hugging Face's order from rows in Meta's; the inverse of `interleave`."""
        size = self.shape[0] // heads
        layers = []
        for layer in self.layers:
            pieces: list[Piece] = []
            for start in range(0, self.shape[0], size):
                for piece in layer:
                    if cut := piece.cut_rows(start, start + size):
                        pieces += _halves(cut, start, size // 2)
            layers.append(tuple(pieces))
        return replace(self, layers=tuple(layers))

    def copy_into(self, target: Tensor) -> None:
        """Reads it into `target`, which has its shape, on any device and of any type."""
        if len(self.layers) == 1:
            for piece in self.layers[0]:
                piece.copy_into(target)
            return
        for start, stop in blocks_of(self.shape):
            self.rows(start, stop)._add_up_into(target[start:stop])

    def _add_up_into(self, target: Tensor) -> None:
        total = torch.empty(self.shape, dtype=torch.float32)
        summand = torch.empty_like(total)
        for place, layer in enumerate(self.layers):
            for piece in layer:
                piece.copy_into(summand if place else total)
            if place:
                total.add_(summand)
        target.copy_(total.to(self.dtype))

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """A tensor of its own with the part's values."""
        target = torch.empty(self.shape, dtype=dtype, device=device)
        if target.device.type == "cpu" and target.nbytes >= _HUGE_FROM_BYTES:
            # The system then clears two megabytes at a time: a third of the time of 4096 bytes at a time.
            _advise(target, _MADV_HUGEPAGE)
        self.copy_into(target)
        return target

    def in_place(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The tensor in the file itself where nothing has to be copied: whole, in one piece, of this type, on a CPU."""
        if len(self.layers) > 1 or len(self.layers[0]) > 1 or dtype != self.dtype or device.type != "cpu":
            return None
        source = self.layers[0][0].source
        return source if source.is_contiguous() and tuple(source.shape) == self.shape else None


def blocks_of(shape: tuple[int, ...], most_bytes: int = _BLOCK_BYTES) -> list[tuple[int, int]]:
    """Ranges of rows that hold at most `most_bytes` in float32, but at least a row each."""
    row_bytes = 4 * torch.Size(shape[1:]).numel()
    count = max(1, most_bytes // max(1, row_bytes))
    return [(start, min(start + count, shape[0])) for start in range(0, shape[0], count)]


def _halves(piece: Piece, start: int, half: int) -> Iterator[Piece]:
    """Splits a piece of one head's rows, counted from the head's first, into the rows of either half.

    Rows at even places go to the first half of the head, which begins at `start` in the part, those at odd places to
    the second.
    """
    for second in (0, 1):
        first = next((k for k in (0, 1) if (piece.row + k * piece.step) % 2 == second), None)
        if first is None or first >= len(piece.source):
            continue
        every = 2 if piece.step % 2 else 1
        row = (piece.row + first * piece.step) // 2 + second * half
        yield piece._replace(source=piece.source[first::every], row=start + row, step=every * piece.step // 2)


def _span_bytes(tensor: Tensor) -> int:
    """Bytes from a tensor's first value to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _bring_pages(block: Tensor) -> None:
    """Maps the pages of a block at once, unless most of them hold what is not needed."""
    if _span_bytes(block) <= 2 * block.nbytes:
        _advise(block, _MADV_POPULATE_READ)


def release_pages(tensor: Tensor) -> None:
    """Lets go of a mapped tensor's pages: read once, they would count as this process's memory until it ends.

    The mapping is private and was not written to, so the pages (and what else lies in the first and the last of them)
    can be read again from the file if they are needed.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        _advise(tensor, mmap.MADV_DONTNEED)


def _advise(tensor: Tensor, advice: int) -> None:
    """madvise on a tensor's pages, the first and the last included; advice the system does not know has no effect."""
    if not hasattr(mmap, "MADV_DONTNEED") or not tensor.numel():
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + _span_bytes(tensor) - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)
