"""Making a matrix in NF4 nearer to what it stands for: one number at a time, all others as they are.

Where E is by how much a matrix is off and G the gram matrix of its inputs, its products are off by tr(E G E^T). As a
function of one of its values that is a parabola, and so it is of the scale of one block. The best that the format has
is what lies nearest to the parabola's lowest point: of the 16 numbers, or of the 256 magnitudes a scale can have. So
no step makes the error larger. (QuantEase, arXiv:2309.01885, goes over values so; scales are not numbers there that
are rounded themselves.) Rows have nothing to do with each other: a step is made in all of them at once.
"""

import torch
from torch import Tensor

from llama_acc.core.model import nf4
from llama_acc.core.model.nf4 import BLOCK, Scales

SWEEPS = 4
"""How often all values and scales are gone over; more gains little."""


def descend(weight: Tensor, places: Tensor, scales: Scales, gram: Tensor) -> tuple[Tensor, Scales]:
    """A matrix whose products are off by less, or by as much.

    Args:
        weight: [out, in], float32: what it stands for.
        places: [out, in] uint8, of its values among NF4's numbers.
        scales: of its blocks.
        gram: [in, in], float32, of its inputs; its diagonal is positive.

    Returns:
        Its places and scales. Of the scales, only the magnitudes' places differ.
    """
    matrix = _Matrix(weight, places, scales)
    for _ in range(SWEEPS):
        # Computed anew each time, so that rounding errors do not add up.
        slope = gram @ (weight.t() - matrix.values())
        for start in range(0, weight.shape[1], BLOCK):
            columns = slice(start, start + BLOCK)
            change = matrix.improve(columns, slope[columns], gram[columns, columns])
            slope.addmm_(gram[:, columns], change, alpha=-1)
    return matrix.places.t().contiguous(), matrix.scales()


class _Matrix:
    """A matrix on the way. Columns lie in rows here, where they are read and written as a whole.

    Attributes:
        places: [in, out] uint8.
    """

    def __init__(self, weight: Tensor, places: Tensor, scales: Scales) -> None:
        self.places = places.t().contiguous()
        self._scales = scales
        rows, columns = weight.shape
        # How many columns have a scale together; where blocks go across the rows, scales stay what they are.
        self._of_block = BLOCK if columns % BLOCK == 0 else 1

        def by_column(of_blocks: Tensor) -> Tensor:
            of_each = of_blocks if self._of_block == BLOCK else of_blocks.repeat_interleave(BLOCK)[: weight.numel()]
            return of_each.view(rows, -1).t().contiguous()

        nested = scales.nested.repeat_interleave(nf4.NESTED_BLOCK)[: len(scales.absmax)]
        self._absmax, self._nested = by_column(scales.absmax), by_column(nested)
        self._magnitudes = by_column(nf4.magnitudes(scales)).clamp_(min=1e-12)

    def values(self) -> Tensor:
        """[in, out]."""
        return nf4.numbers(self.places) * self._magnitudes.repeat_interleave(self._of_block, 0)

    def scales(self) -> Scales:
        """Those of its blocks now."""
        if self._of_block == 1:
            return self._scales
        return self._scales._replace(absmax=self._absmax.t().flatten())

    def improve(self, columns: slice, slope: Tensor, gram: Tensor) -> Tensor:
        """Goes over some columns, a block wide: first their scales, then their values.

        Args:
            columns: which.
            slope: [n, out], the gram matrix times by how much the matrix is too small, for these.
            gram: [n, n], of these.

        Returns:
            [n, out], by how much the values are larger now.
        """
        numbers = nf4.numbers(self.places[columns])
        block = slice(columns.start // self._of_block, columns.stop // self._of_block)
        before = numbers * self._magnitudes[block]
        if self._of_block == BLOCK:
            self._improve_scales(block, numbers, slope, gram)
        values = numbers.mul_(self._magnitudes[block])
        left = slope - gram @ (values - before)
        scales = self._magnitudes[block].expand_as(values)
        for i, scale in enumerate(scales):
            best = values[i] + left[i] / gram[i, i]
            place, number = nf4.nearest(best / scale)
            change = number * scale - values[i]
            left.addr_(gram[i], change, alpha=-1)
            values[i] += change
            self.places[columns.start + i] = place
        return values - before

    def _improve_scales(self, block: slice, numbers: Tensor, slope: Tensor, gram: Tensor) -> None:
        """Those of one block of each row, [1, out]."""
        curvature = ((gram @ numbers) * numbers).sum(0, keepdim=True).clamp_(min=1e-12)
        best = self._magnitudes[block] + (slope * numbers).sum(0, keepdim=True) / curvature
        absmax, magnitudes = nf4.nearest_magnitudes(best, self._nested[block], self._scales.offset)
        is_scale = magnitudes > 0
        self._absmax[block] = torch.where(is_scale, absmax, self._absmax[block])
        self._magnitudes[block] = torch.where(is_scale, magnitudes, self._magnitudes[block])
