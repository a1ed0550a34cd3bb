"""Tensors that are computed out of parts in files, some rows at a time: differences, merged matrices, four bits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_acc.core.checkpoint.parts import Part
from llama_acc.core.checkpoint.quantised import Packed, quantised
from llama_acc.core.model.nf4 import empty_scales, packed_shape

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Computed:
    """What a `Part` is to those who read it, but computed.

    Attributes:
        shape: its shape.
        compute: gives rows start to stop of the whole, in every column.
        row: its first row in the whole.
        column: its first column in the whole.
    """

    shape: tuple[int, ...]
    compute: Callable[[int, int], Tensor]
    row: int = 0
    column: int = 0

    def rows(self, start: int, stop: int) -> "Computed":
        """Its rows start to stop."""
        return self.narrow(0, start, stop)

    def narrow(self, dimension: int, start: int, stop: int) -> "Computed":
        """What lies from start to stop in a dimension (0 rows, 1 columns); beyond the end there is nothing."""
        start, stop = min(start, self.shape[dimension]), min(stop, self.shape[dimension])
        shape = (*self.shape[:dimension], stop - start, *self.shape[dimension + 1 :])
        if dimension == 0:
            return replace(self, shape=shape, row=self.row + start)
        return replace(self, shape=shape, column=self.column + start)

    def copy_into(self, target: Tensor) -> None:
        """Computes it into a tensor of its shape."""
        values = self.compute(self.row, self.row + self.shape[0])
        if len(self.shape) == 2:
            values = values[:, self.column : self.column + self.shape[1]]
        target.copy_(values)


Source = Part | Computed


def read_block(source: Source, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start to stop of a source in a type."""
    block = torch.empty((stop - start, *source.shape[1:]), dtype=dtype)
    source.rows(start, stop).copy_into(block)
    return block


def read_all(source: Source, dtype: torch.dtype = torch.float32) -> Tensor:
    """A whole source in a type."""
    values = torch.empty(source.shape, dtype=dtype)
    source.copy_into(values)
    return values


def difference(minuend: Source, subtrahend: Source) -> Computed:
    """One minus the other, in float32."""

    def compute(start: int, stop: int) -> Tensor:
        first = read_block(minuend, start, stop, torch.float32)
        return first.sub_(read_block(subtrahend, start, stop, torch.float32))

    return Computed(minuend.shape, compute)


def merged(matrix: Source, lora_a: Source, lora_b: Source) -> Computed:
    """matrix [out, in] + lora_b [out, rank] @ lora_a [rank, in], in float32."""

    def compute(start: int, stop: int) -> Tensor:
        second = read_block(lora_b, start, stop, torch.float32)
        return read_block(matrix, start, stop, torch.float32).addmm_(second, read_all(lora_a))

    return Computed(matrix.shape, compute)


def rounded(source: Source, dtype: torch.dtype) -> Computed:
    """What it is after rounding to a type."""
    return Computed(source.shape, lambda start, stop: read_block(source, start, stop, dtype))


def deinterleaved(source: Source, heads: int) -> Source:
    """Rows in Hugging Face's order from rows in Meta's, for what wq and wk have; see `Part.deinterleave`."""
    if isinstance(source, Part):
        return source.deinterleave(heads)
    size = source.shape[0] // heads

    def compute(start: int, stop: int) -> Tensor:
        first, last = start // size, -(-stop // size)
        values = read_block(source, first * size, last * size, torch.float32)
        # In each head: the first values of all pairs, then the second ones.
        ordered = values.unflatten(0, (last - first, size // 2, 2)).transpose(1, 2).flatten(0, 2)
        return ordered[start - first * size : stop - first * size]

    return Computed(source.shape, compute)


class Quantiser:
    """Matrices of a checkpoint in NF4, by name. The last one asked for is at hand, so that memory is that of one."""

    def __init__(self) -> None:
        self._last: tuple[str, Packed] | None = None

    def packed(self, name: str, part: Part) -> Packed:
        """The matrix of that name."""
        if self._last is None or self._last[0] != name:
            self._last = None  # not two at a time
            self._last = name, Packed(*quantised(part, _CPU))
        return self._last[1]

    def rounded(self, name: str, part: Part) -> Computed:
        """The matrix as it is after quantising and dequantising, in float32."""
        return Computed(part.shape, lambda start, stop: self.packed(name, part).rows(start, stop, torch.float32))

    def tensors(self, name: str, part: Part) -> dict[str, tuple[Computed, torch.dtype]]:
        """What a quantised checkpoint has of a matrix, by the ends of their names, with their types."""
        rows, columns = part.shape
        room = nf4_shapes(rows, columns)

        def taker(leaf: str) -> Callable[[int, int], Tensor]:
            def compute(start: int, stop: int) -> Tensor:
                packed = self.packed(name, part)
                tensor: Tensor = packed.values if leaf == "weight" else getattr(packed.scales, leaf)
                return tensor[start:stop]

            return compute

        return {leaf: (Computed(shape, taker(leaf)), dtype) for leaf, (shape, dtype) in room.items()}


def nf4_shapes(rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of a quantised matrix's tensors, by the ends of their names."""
    scales = empty_scales(rows, columns, torch.device("meta"))
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in scales._asdict().items()}
    return {"weight": (packed_shape(rows, columns), torch.uint8), **found}
