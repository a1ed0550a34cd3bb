"""Products of matrices: sums of them for gradients, and a CPU's, where torch's own choice of a library is a slow one.

Shapes: T rows, x [T, in], weight [out, in]; the result is [T, out] in the type of both.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_acc.core.device import device_type

_onednn: Any = torch.backends.mkldnn
# From so many elements on, AMX multiplies a matrix and a vector faster than vector instructions.
_AMX_FROM = 400_000
# Rows that matrices are reordered for; of others the product is right, too.
_TYPICAL_ROWS = 16
# From so many multiplications on, a product for training pays for the code that oneDNN makes for its shape.
_ONEDNN_FROM = 1 << 26
# oneDNN keeps half a megabyte of code for each shape of a matrix and number of rows that it is multiplied with: there
# are to be few of these numbers, most of them up to as many as replies are generated together.
_ROW_STEP, _MOST_ROWS = 4, 32


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies x [T, in] and weight [out, in] in training.

    MKL, which torch takes for float32 on a CPU, has 115 to 190 GFLOP/s for most of these products, oneDNN 195 to 220
    (measured on two Zen 4 cores); of two transposed matrices, which a weight's gradient is a product of, MKL has more.
    """
    is_large = x.dtype == torch.float32 and len(x) * weight.numel() >= _ONEDNN_FROM
    # The compiler has its own ways to oneDNN.
    return is_large and device_type(x) == "cpu" and _onednn.is_available() and not torch.compiler.is_compiling()


def product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in] transposed, both of one type: the products of training, without gradients."""
    if not by_onednn(x, weight):
        return F.linear(x, weight) if out is None else torch.mm(x, weight.t(), out=out)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y if out is None else out.copy_(y)


def accumulator(weight: Tensor, terms: int) -> Tensor:
    """Where `add_product` sums that many terms of a weight's gradient: in float32 if there is more than one."""
    if not terms:
        return torch.zeros_like(weight)
    return torch.empty_like(weight, dtype=weight.dtype if terms == 1 else torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Adds the product a @ b to `total`, or writes it there if it is the first. `total` may be of a wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif device_type(total) == "cuda":  # the product itself is of the wider type
        torch.ops.llama_acc.add_wide_product_(total, a, b, first)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def gradient_sum(weight: Tensor, terms: int = 1) -> tuple[Tensor, bool]:
    """Where a backward pass sums that many terms of a weight's gradient. True: it is the one that the micro-batches
    before have left there, which a GPU adds to, so that nothing is to be added up afterwards."""
    is_kept = device_type(weight) == "cuda" and not torch.compiler.is_compiling() and weight.is_leaf
    if is_kept and weight.grad is not None:
        return weight.grad, True
    return accumulator(weight, terms), False


def weight_gradient(weight: Tensor, d_y: Tensor, x: Tensor) -> Tensor | None:
    """The gradient of a weight for its product with x, out of that of the product; None: it was added where it is."""
    total, is_begun = gradient_sum(weight)
    add_product(total, d_y.t(), x, first=not is_begun)
    return None if is_begun else total


def add_masked_product(total: Tensor, a: Tensor, b: Tensor, mask: Tensor | None) -> None:
    """Adds the product a @ b, with 0 in the places of the mask, to `total`, of the same type."""
    if mask is not None:
        total.add_((a @ b).masked_fill_(mask, 0))
    elif by_onednn(a, b):
        total.add_(product(a, b.t()))
    else:
        total.addmm_(a, b)


def several_rows(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of several rows [T, in] on a CPU: replies that are generated together."""
    rows, reordered = x.shape[0], getattr(weight, "reordered", None)
    is_float32, are_few = x.dtype == torch.float32, rows <= _MOST_ROWS
    is_for_onednn = _onednn.is_available() and (x.dtype == torch.bfloat16 or (is_float32 and are_few))
    if not is_for_onednn or torch.compiler.is_compiling():  # the compiler has its own ways to oneDNN
        return F.linear(x, weight)
    step = _ROW_STEP if are_few else 16 if rows <= 128 else 64
    x = F.pad(x, (0, 0, 0, -rows % step))
    if not are_few or (reordered is None and not is_float32):
        return F.linear(x, weight)[:rows]  # in bfloat16 it takes oneDNN itself
    # MKL, which torch takes for float32, needs 1.1 to 1.6 times as long as oneDNN for few rows, and many times as long
    # where threads have to wait for each other (measured on two Zen 4 cores).
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight if reordered is None else reordered, None, "none", [], "")
    return y[:rows]


def reorder_for_rows(weights: Iterable[Tensor]) -> None:
    """Keeps these matrices a second time as oneDNN reads them: else it reorders them for each product, which takes a
    third of the time for 16 rows. They must not change any more. All memory that this takes is taken now."""
    known = set[tuple[torch.Size, torch.dtype]]()
    for weight in weights:
        fits = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
        if fits and _onednn.is_available() and not hasattr(weight, "reordered"):
            made = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TYPICAL_ROWS)
            setattr(weight, "reordered", made)  # noqa: B010
            if (weight.shape, weight.dtype) not in known:
                known.add((weight.shape, weight.dtype))
                for rows in range(_ROW_STEP, _MOST_ROWS + 1, _ROW_STEP):
                    several_rows(weight.new_zeros(rows, weight.shape[1]), weight)


def one_row(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of one row [1, in] on a CPU."""
    y = x.new_empty(1, len(weight))
    row_product(x, weight, y)()
    return y


def row_product(x: Tensor, weight: Tensor, y: Tensor) -> Callable[[], object]:
    """What writes `F.linear` of one row x [1, in] to y [1, out] when it is called, on a CPU: generation, where the
    libraries' products of matrices fall short."""
    rows, columns = weight.shape
    threads = torch.get_num_threads()
    if x.dtype == torch.float32 and threads > 1 and rows % threads == 0:
        # The library reads a matrix with one thread if there is one vector to multiply; as a batch of matrices, one
        # for each thread, it is read with all.
        parts = weight.view(threads, rows // threads, columns).mT
        return partial(torch.bmm, x.expand(threads, 1, columns), parts, out=y.view(threads, 1, rows // threads))
    by_vector = partial(torch.mv, weight, x[0], out=y[0])
    if x.dtype != torch.bfloat16 or not _onednn.enabled or (rows * columns >= _AMX_FROM and _has_amx()):
        return by_vector
    # oneDNN takes 1.1 to 4 times as long as torch's own product of a matrix and a vector, at every size (measured
    # on two Zen 4 cores); with AMX (a Sapphire Rapids core), half to three quarters, but for small matrices.
    return partial(_without_onednn, by_vector)


def _without_onednn(compute: Callable[[], object]) -> None:
    torch._C._set_mkldnn_enabled(False)  # what `_onednn.enabled` calls, in a quarter of its time
    try:
        compute()
    finally:
        torch._C._set_mkldnn_enabled(True)


@cache
def _has_amx() -> bool:
    """Whether the processor has matrix instructions for bf16; before torch says, it is taken to have none."""
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return bool(capabilities().get("amx_bf16"))
