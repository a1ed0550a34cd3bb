"""Quantising a checkpoint's matrices on the way into a file."""

from collections.abc import Callable

import torch
from torch import Tensor

from llama_acc.core.checkpoint.computed import Computed
from llama_acc.core.checkpoint.lazy import Part
from llama_acc.core.checkpoint.quantized import Packed, quantised
from llama_acc.core.model.nf4 import empty_scales, packed_shape

_CPU = torch.device("cpu")


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
        return Computed.by(lambda start, stop: self.packed(name, part).rows(start, stop, torch.float32), part.shape)

    def tensors(self, name: str, part: Part) -> dict[str, Computed]:
        """What a quantised checkpoint has of a matrix, by the ends of their names."""
        rows, columns = part.shape
        room = nf4_shapes(rows, columns)

        def taker(leaf: str) -> Callable[[int, int], Tensor]:
            def compute(start: int, stop: int) -> Tensor:
                packed = self.packed(name, part)
                tensor: Tensor = packed.values if leaf == "weight" else getattr(packed.scales, leaf)
                return tensor[start:stop]

            return compute

        return {leaf: Computed.by(taker(leaf), shape, dtype) for leaf, (shape, dtype) in room.items()}


def nf4_shapes(rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of a quantised matrix's tensors, by the ends of their names."""
    scales = empty_scales(rows, columns, torch.device("meta"))
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in scales._asdict().items()}
    return {"weight": (packed_shape(rows, columns), torch.uint8), **found}
