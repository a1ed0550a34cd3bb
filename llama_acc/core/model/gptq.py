"""Rounding a matrix to NF4 so that what it computes comes out right, not each of its values by itself.

The columns are rounded one after the other; the error of each is made up for by those that are left, as far as the
inputs seen in calibration allow it (GPTQ, arXiv:2210.17323). The scale of a block is searched for: the one of least
error, where each value counts by how large its inputs are, need not be the block's largest value. The result has the
format of `nf4`, and is computed with by the same code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_acc.core.model import nf4
from llama_acc.core.model.coordinate_descent import descend
from llama_acc.core.model.nf4 import BLOCK, Scales

DAMPING = 0.01
"""What is added to the diagonal of the inputs' gram matrix, as a fraction of its mean."""
# What a block's scale may be, as fractions of its largest value.
_SCALES = [0.65 + 0.025 * step for step in range(17)]
_PIECE = 512  # blocks looked at together: what stays in a processor's cache
_COLUMNS = 128  # rounded before the columns behind them are corrected, in one matrix product


def calibrated(weight: Tensor, gram: Tensor) -> tuple[Tensor, Scales]:
    """A matrix in NF4.

    Args:
        weight: [out, in], float32.
        gram: [in, in], the sum of x x^T over the inputs x that it was given in calibration.

    Returns:
        The packed values, [out, in / 2] bytes, and the scales.
    """
    damped = gram.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    scales = nf4.round_magnitudes(_magnitudes(weight, damped.diagonal().float()))
    # What the scales are after their own rounding is what the values are rounded with.
    of_each = nf4.magnitudes(scales).repeat_interleave(BLOCK)[: weight.numel()].view_as(weight)
    places = _places(weight, of_each.clamp(min=1e-12), inverse)
    places, scales = descend(weight, places, scales, damped.float())
    return nf4.pack(places), scales


def _magnitudes(weight: Tensor, importance: Tensor) -> Tensor:
    """For each block the scale of least error, its values weighted by `importance` [in] of their columns."""
    room = -weight.numel() % BLOCK
    values = F.pad(weight.flatten(), (0, room)).view(-1, BLOCK)
    weights = F.pad(importance.expand_as(weight).flatten(), (0, room)).view(-1, BLOCK)
    pieces = zip(values.split(_PIECE), weights.split(_PIECE), strict=True)
    return torch.cat([_scales_of_least_error(*piece) for piece in pieces])


def _scales_of_least_error(values: Tensor, weights: Tensor) -> Tensor:
    """[n] for n blocks, [n, 64] each."""
    largest = values.abs().amax(1, keepdim=True).clamp(min=1e-12)
    best, least = largest, torch.full_like(largest, math.inf)
    for fraction in _SCALES:
        scale = fraction * largest
        error = (nf4.nearest(values / scale)[1].mul_(scale) - values).square_().mul_(weights).sum(1, keepdim=True)
        is_less = error < least
        best, least = torch.where(is_less, scale, best), torch.where(is_less, error, least)
    return best.flatten()


def _places(weight: Tensor, scales: Tensor, inverse: Tensor) -> Tensor:
    """The place of each value among NF4's numbers, [out, in] uint8.

    Args:
        weight: [out, in].
        scales: of each value.
        inverse: of the inputs' gram matrix; float64.
    """
    # Columns that matter most come first, while there are others to make up for them.
    order = inverse.diagonal().argsort()
    factor = torch.linalg.cholesky(inverse[order][:, order], upper=True).float()
    # Columns lie in rows here, where they are read and written as a whole.
    left, scales = weight.t()[order].contiguous(), scales.t()[order].contiguous()
    places = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for start in range(0, len(left), _COLUMNS):
        stop = min(start + _COLUMNS, len(left))
        errors = torch.empty_like(left[start:stop])
        for column in range(start, stop):
            places[column], numbers = nf4.nearest(left[column] / scales[column])
            error = (left[column] - numbers * scales[column]) / factor[column, column]
            left[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    ordered = torch.empty_like(places)
    ordered[order] = places
    return ordered.t().contiguous()
