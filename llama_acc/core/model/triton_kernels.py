"""The kernels of `kernels`, in Triton. A product is rounded before it is added to something, so values are torch's."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (Triton reads a kernel's annotations, and knows no types but its own.)

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 32


@triton.jit
def _dequantize_nf4(packed, absmax, nested, offset, levels, magnitudes, values, count, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    exists = block * 32 < count
    code = tl.load(absmax + block, mask=exists, other=0).to(tl.int32)
    largest = tl.load(magnitudes + code) * tl.load(nested + block // 256, mask=exists, other=0.0) + tl.load(offset)
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    both = tl.load(packed + place, mask=place < count, other=0).to(tl.int32)
    first = tl.load(levels + (both >> 4)) * largest[:, None]
    second = tl.load(levels + (both & 15)) * largest[:, None]
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    found = tl.reshape(tl.join(first, second), (BLOCKS, 64))
    tl.store(values + place, found.to(values.dtype.element_ty), mask=place < 2 * count)


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor,
    offset: Tensor,
    levels: Tensor,
    magnitudes: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The matrix [rows, columns] in `dtype`; see `nf4.Scales`, and `nf4._codes` for levels and magnitudes."""
    values = packed.new_empty(packed.shape[0], 2 * packed.shape[1], dtype=dtype)
    grid = (triton.cdiv(packed.numel(), 32 * _BLOCKS),)
    tensors = (packed, absmax, nested, offset, levels, magnitudes, values)
    _dequantize_nf4[grid](*tensors, packed.numel(), BLOCKS=_BLOCKS, enable_fp_fusion=False)
    return values
