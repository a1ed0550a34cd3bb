"""NF4: matrices in four bits (QLoRA, arXiv:2305.14314), made and read by bitsandbytes.

A matrix's values, row after row, are cut into blocks of 64. Of each block there is the largest magnitude (absmax), and
of each value, divided by that, the nearest of 16 levels. The magnitudes, less their mean, are kept in eight bits, in
blocks of 256 ("double quantization"). So a value takes 4 + 8/64 + 32/(64*256) bits, 4.127.
"""

import ctypes
import logging
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_acc.core.device import device_type
from llama_acc.core.errors import UserError
from llama_acc.core.model.copies import cast
from llama_acc.core.model.kernels import use_kernels

BLOCK, NESTED_BLOCK = 64, 256
MOST_RANK = 128  # of pairs that `add_product_` has room for
# Values quantized at a time: on a CPU, fewer make more calls, for each of which threads wait for Python's lock. Of
# these, so many are compared at a time that the results stay in a core's cache.
_PIECE, _PIECE_CPU, _COMPARED = 1 << 24, 1 << 19, 1 << 17

# On a CPU, more rows than these are multiplied faster by a matrix that is written out (measured on a Zen 4 core); the
# kernel takes so many rows of the matrix at a time.
FUSED_ROWS, _FUSED_STEP = 8, 32


class Scales(NamedTuple):
    """What belongs to a matrix's packed values, for n blocks."""

    absmax: Tensor  # [n] uint8, the blocks' largest magnitudes
    nested: Tensor  # [n / 256] float32, the largest ones of these, less the mean
    offset: Tensor  # [1] float32, their mean


@cache
def _library() -> Any:
    # On some processors it says which faster kernel it has not found.
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    # torch's compiler takes two seconds to import. The library imports it to compile functions that nothing here calls,
    # and torch with an operator's first call, to keep the compiler out of it: that can wait until it is there.
    torch_: Any = torch
    torch_compile, keep_out = torch_.compile, torch_._disable_dynamo

    def keep_out_later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return keep_out(**options)
        kept_out = keep_out(function, **options)
        return lambda *args, **named: (kept_out if "torch._dynamo" in sys.modules else function)(*args, **named)

    torch_.compile, torch_._disable_dynamo = lambda model=None, **_: model or (lambda made: made), keep_out_later
    try:
        import bitsandbytes
    finally:
        logger.setLevel(level)
        torch_.compile, torch_._disable_dynamo = torch_compile, keep_out
    return bitsandbytes


@cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels of NF4, and the 256 that magnitudes are rounded to."""
    functional = _library().functional
    return functional.get_4bit_type("nf4", device=device), functional.create_dynamic_map().to(device)


def prepare(device: torch.device) -> None:
    """Loads the library, and makes what all matrices share."""
    _codes(device)


def packed_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of a matrix's packed values, which are bytes.

    Raises:
        UserError: an odd number of columns.
    """
    if columns % 2:
        raise UserError(f"a matrix of {columns} columns cannot be quantized: their number must be even")
    return rows, columns // 2


def empty_scales(rows: int, columns: int, device: torch.device | None = None) -> Scales:
    """Room for the scales of a matrix [rows, columns]."""
    blocks = -(-rows * columns // BLOCK)
    return Scales(
        torch.empty(blocks, dtype=torch.uint8, device=device),
        torch.empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32, device=device),
        torch.empty(1, dtype=torch.float32, device=device),
    )


def nbytes(rows: int, columns: int) -> int:
    """Bytes of a quantized matrix [rows, columns]."""
    scales = empty_scales(rows, columns, torch.device("meta"))
    return rows * columns // 2 + sum(tensor.nbytes for tensor in scales)


@torch.no_grad()
def quantize(
    read: Callable[[int, Tensor], object], shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Scales]:
    """Quantizes a matrix that is never held as a whole, unless its rows do not consist of whole blocks.

    `read` is given a row's number and a tensor, [n, columns] float32 on `device`, and writes n rows to it. Returns the
    packed values, [rows, columns / 2] bytes, and the scales.
    """
    rows, columns = shape
    packed = torch.empty(packed_shape(rows, columns), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-rows * columns // BLOCK), dtype=torch.float32, device=device)
    on_cpu = device.type == "cpu" and rows * columns % BLOCK == 0
    step = min(rows, max(1, (_PIECE_CPU if on_cpu else _PIECE) // columns)) if columns % BLOCK == 0 else rows
    piece = torch.empty(step, columns, dtype=torch.float32, device=device)
    room = _Room(piece.numel()) if on_cpu else None
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        read(start, values := piece[: stop - start])
        codes, largest = packed[start:stop].view(-1), absmax[start * columns // BLOCK : -(-stop * columns // BLOCK)]
        if room is not None:
            _quantize_into(values, codes, largest, room)
        else:
            made, state = _library().functional.quantize_4bit(values, quant_type="nf4", blocksize=BLOCK)
            codes.copy_(made.view(-1))
            largest.copy_(state.absmax)
    return packed, round_absmax(absmax)


class _Room:
    """For what is made of n values on the way: the system takes longer to give new memory than numpy to fill it."""

    def __init__(self, n: int) -> None:
        self.scaled, self.codes = np.empty(n, dtype=np.float32), np.empty(n, dtype=np.uint8)
        self.is_below = np.empty((15, min(n, _COMPARED)), dtype=np.bool_)


def _quantize_into(values: Tensor, packed: Tensor, largest: Tensor, room: _Room) -> None:
    """Writes the codes of n float32 values, two in a byte, and the largest magnitudes of their blocks.

    What the library computes on a CPU with a search for every value, which takes ten times as long (0.50). numpy's
    comparisons are vectorized, and let other threads run.
    """
    n, blocks = values.numel(), values.view(-1, BLOCK)
    scaled, codes = room.scaled[:n], room.codes[:n]
    as_blocks = torch.from_numpy(scaled).view(-1, BLOCK)
    torch.amax(torch.abs(blocks, out=as_blocks), 1, out=largest)
    torch.mul(blocks, (1.0 / largest.clamp(min=1e-38)).view(-1, 1), out=as_blocks)
    for start in range(0, n, _COMPARED):
        part = slice(start, min(start + _COMPARED, n))
        is_below = room.is_below[:, : part.stop - start]
        np.less_equal(scaled[part], _bounds(), out=is_below)
        np.add.reduce(is_below.view(np.uint8), axis=0, dtype=np.uint8, out=codes[part])
    pairs = np.subtract(15, codes, out=codes).view("<u2")
    packed.numpy()[:] = pairs << 4 | pairs >> 8


@cache
def _bounds() -> NDArray[np.float32]:
    """Half-way between the levels, as the library rounds them, [15, 1]."""
    levels = _codes(torch.device("cpu"))[0]
    return ((levels[1:] + levels[:-1]) / 2).view(-1, 1).numpy()


def round_absmax(absmax: Tensor) -> Scales:
    """The scales of a matrix whose blocks have these magnitudes, [n] float32, which are used up."""
    offset = absmax.mean().view(1)
    rounded, state = _library().functional.quantize_blockwise(absmax.sub_(offset), blocksize=NESTED_BLOCK)
    return Scales(rounded, state.absmax, offset)


def read_absmax(scales: Scales) -> Tensor:
    """The largest magnitudes of a matrix's blocks, [n] float32."""
    code = _codes(scales.absmax.device)[1]
    found: Tensor = _library().functional.dequantize_blockwise(
        scales.absmax, absmax=scales.nested, code=code, blocksize=NESTED_BLOCK
    )
    return found.float() + scales.offset


def _state(packed: Tensor, absmax: Tensor, dtype: torch.dtype, scales: Scales | None = None) -> Any:
    """What bitsandbytes wants to be told of packed values [rows, columns / 2], whose magnitudes `scales` may hold."""
    state = _library().functional.QuantState
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    levels, magnitudes = _codes(packed.device)
    nested = {}
    if scales is not None:
        inner = state(absmax=scales.nested, code=magnitudes, blocksize=NESTED_BLOCK, dtype=torch.float32)
        nested = {"offset": scales.offset.view(()), "state2": inner}
    # Where blocks go across rows, its CPU kernel (0.50) is right for one row only.
    shape = torch.Size((1, rows * columns) if columns % BLOCK else (rows, columns))
    return state(absmax=absmax, shape=shape, code=levels, blocksize=BLOCK, quant_type="nf4", dtype=dtype, **nested)


def dequantize(packed: Tensor, scales: Scales, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, columns] in `dtype` out of its packed values [rows, columns / 2] and scales."""
    if use_kernels(packed):
        return torch.ops.llama_acc.dequantize_nf4(packed, *scales, *_codes(packed.device), dtype)
    state = _state(packed, scales.absmax, dtype, scales)
    values: Tensor = _library().functional.dequantize_4bit(packed.view(-1, 1), state)
    return values.view(packed.shape[0], -1)


def dequantize_rows(packed: Tensor, absmax: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start to stop of a matrix, [stop - start, columns] in `dtype`, from its values and `read_absmax`."""
    columns = 2 * packed.shape[1]
    # Where blocks go across the rows, all are read.
    first, last = (start, stop) if columns % BLOCK == 0 else (0, len(packed))
    part, blocks = packed[first:last], absmax[first * columns // BLOCK : -(-last * columns // BLOCK)]
    state = _state(part, blocks.contiguous(), dtype)
    values: Tensor = _library().functional.dequantize_4bit(part.reshape(-1, 1), state)
    return values.view(len(part), -1)[start - first : stop - first]


def dense(weight: Tensor, scales: Scales | None, dtype: torch.dtype) -> Tensor:
    """A matrix in `dtype`: quantized if it has scales, else of any type."""
    return cast(weight, dtype) if scales is None else dequantize(weight, scales, dtype)


def has_kernel(x: Tensor, packed: Tensor) -> bool:
    """Whether `add_product_` takes x [T, columns]: of more tokens it is faster to write the matrix out."""
    is_one = use_kernels(x) and not torch.is_grad_enabled() and x.dim() == 2 and x.is_contiguous()
    return is_one and len(x) * x.element_size() <= 128 and packed.shape[1] % (BLOCK // 2) == 0


def add_product_(
    y: Tensor, x: Tensor, packed: Tensor, scales: Scales, pairs: Any, factor: float = 1.0,
    first: bool = False, sizes: Sequence[int] = (), bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Adds factor * (x W^T + f * (x A^T) B^T + bias) to y [T, rows], in place; or is it, if `first`. W [rows, columns]
    may be up to three, with `sizes` rows; `pairs` are A [matrices * rank, columns], B [rows, rank] and f, or None."""
    weight, pairs = [packed, *scales, *_codes(packed.device)], pairs or (None, None, 1.0)
    torch.ops.llama_acc.add_product_nf4_(y, x, weight, *pairs, bias, list(sizes), factor, first)
    return y


def few_rows(x: Tensor, packed: Tensor, scales: Scales) -> Tensor | None:
    """x [T, columns] times a quantized matrix [rows, columns] transposed, without gradients and without writing the
    matrix out; None: the library has no kernel for that, or `fuse` was not called."""
    if x.dtype == torch.bfloat16 and len(x) <= FUSED_ROWS and hasattr(packed, "fused"):
        x, y = x.contiguous(), x.new_empty(len(x), len(packed))
        fused_product(x, packed, y)()
        return y
    if device_type(x) != "cpu" and len(x) == 1 and x.shape[1] % BLOCK == 0:
        return _library().matmul_4bit(x, packed.view(-1, 1), _state(packed, scales.absmax, x.dtype, scales))
    return None


def fused_product(x: Tensor, packed: Tensor, y: Tensor) -> Callable[[], object]:
    """What writes x [T, columns] times a matrix that `fuse` has had, transposed, to y [T, rows] when it is called: all
    three have to be there then, as it knows their addresses."""
    values, state = packed.fused  # type: ignore[attr-defined]
    if not _library().__version__.startswith("0.50."):  # in which the kernel has these arguments
        return lambda: y.copy_(_library().functional.gemv_4bit(x, values, state=state))
    # What the library's operator calls, which takes three times as long as the kernel does for a small matrix.
    kernel, int64 = _library().cextension.lib.gemv_4bit_inference_cpu_nf4_bf16, ctypes.c_int64
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, values, state.absmax, y)]
    rows, columns = map(int64, state.shape)
    return partial(kernel, int64(len(x)), rows, columns, *pointers, int64(BLOCK), columns, rows)


def fuse(packed: Tensor, scales: Scales) -> None:
    """Keeps a matrix a second time, as a CPU's kernel for few rows of bf16 reads it, if there is one. It must not
    change any more.

    What bitsandbytes' own `_convert_weight_packed_for_cpu` makes, which takes ten times as long (0.50): of 32 rows, a
    byte has a value of one of the first 16 in its lower half, and that of the row 16 further on in its upper one.
    """
    rows, half = packed.shape
    if not _is_fused_on_cpu() or rows % _FUSED_STEP or half % (BLOCK // 2) or hasattr(packed, "fused"):
        return
    low, high = packed.detach().view(rows // 32, 2, 16, half).unbind(1)
    values = torch.empty(rows // 32, half, 16, 2, dtype=torch.uint8)
    values[..., 0] = (high & 0xF0).bitwise_or_(low >> 4).transpose(1, 2)
    values[..., 1] = (high << 4).bitwise_or_(low & 0xF).transpose(1, 2)
    state = _state(packed, read_absmax(scales), torch.bfloat16)
    state.absmax = state.absmax.view(rows, 2 * half // BLOCK).t().to(torch.bfloat16).contiguous()
    state.packing_format_for_cpu = True
    setattr(packed, "fused", (values.view(rows, half), state))  # noqa: B010


@cache
def _is_fused_on_cpu() -> bool:
    functional = _library().functional
    return hasattr(functional, "_convert_weight_packed_for_cpu") and functional.has_avx512bf16()
