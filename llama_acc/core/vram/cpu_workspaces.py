"""What the libraries of a CPU take within an operation and give back: asked of them, by doing the operation once.

For a bf16 product, oneDNN copies blocks of the operands for every thread where the CPU multiplies bf16, and sums the
whole result in float32 where it does not; torch's attention has buffers for every thread and every head. How much that
is depends on shapes, strides, the number of threads and the CPU, and no tensor shows it. Of a large operation a part is
done.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from llama_acc.core.vram.allocations import peak_cpu_bytes

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.addmm_: 1}
"""Products of two matrices, and at which argument the first one is."""
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: 0,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 1,
}
"""Attention, and at which argument the queries are."""
_WORK = 1 << 30
"""Multiplications that are done to find out."""
_BLOCKS = 1024
"""Rows and columns of a result from which a product takes no more for its blocks (oneDNN 3.x)."""
_SUM = torch.float32.itemsize


@dataclass(frozen=True)
class _Like:
    """A tensor but for its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


def cpu_workspace(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Bytes that an operation on a CPU takes besides its results; its arguments may have no values."""
    packet = operation._overloadpacket
    named = {name: _like(value) for name, value in sorted(kwargs.items())}
    likes = [_like(argument) for argument in args]
    if packet is _aten.linear:  # in inference mode it is not taken apart before
        return _of_linear(*args, **kwargs)
    if packet in _PRODUCTS:
        first = _PRODUCTS[packet]
        if args[first].dtype != torch.bfloat16:  # other products are MKL's, whose memory is not torch's
            return 0
        return _of_product(operation, likes, named, first)
    if packet in _ATTENTION:
        return _of_attention(operation, likes, named, _ATTENTION[packet])
    return 0


def product_workspace(x: Tensor, rows: int) -> int:
    """Bytes that the product of `x` [..., K] and a matrix [rows, K] takes besides its result."""
    return _of_linear(x, torch.empty((rows, x.shape[-1]), dtype=x.dtype, device="meta"))


def _of_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    flat = x.reshape(-1, x.shape[-1])
    if bias is None:
        return cpu_workspace(_aten.mm.default, (flat, weight.t()), {})
    return cpu_workspace(_aten.addmm.default, (bias, flat, weight.t()), {})


def _like(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _Like(tuple(argument.shape), tuple(argument.stride()), argument.dtype)
    return tuple(argument) if isinstance(argument, list) else argument


def _of_product(operation: Any, likes: list[Any], named: dict[str, Any], first: int) -> int:
    (rows, width), columns = likes[first].shape, likes[first + 1].shape[1]
    if rows * width * columns <= _WORK:
        return _asked(operation, likes, named)

    def of_part(part_rows: int, part_columns: int) -> int:
        shapes = {first: (part_rows, width), first + 1: (width, part_columns)}
        fewer = [_cut(like, shapes.get(place, (part_rows, part_columns))) for place, like in enumerate(likes)]
        return _asked(operation, fewer, {name: _cut(like, (part_rows, part_columns)) for name, like in named.items()})

    part_rows, part_columns = min(rows, _BLOCKS), min(columns, _BLOCKS)
    taken = of_part(part_rows, part_columns)
    # The sums of a whole result grow with it, number by number; blocks do not.
    half_rows, half_columns = (part_rows // 2, part_columns) if part_rows > 1 else (1, part_columns // 2)
    if taken - of_part(half_rows, half_columns) == _SUM * (part_rows * part_columns - half_rows * half_columns):
        taken += _SUM * (rows * columns - part_rows * part_columns)
    return taken


def _cut(like: Any, shape: tuple[int, int]) -> Any:
    """The first rows and columns of an operand or a result; what is broadcast stays."""
    if not isinstance(like, _Like):
        return like
    sizes = tuple(size if size == 1 else limit for size, limit in zip(like.shape[::-1], shape[::-1], strict=False))
    return _Like(sizes[::-1], like.stride, like.dtype)


def _of_attention(operation: Any, likes: list[Any], named: dict[str, Any], first: int) -> int:
    """What attention takes, of so few heads that it is done soon: for every thread, and for every head."""
    (_, heads, rows, width), keys = likes[first].shape, likes[first + 1].shape
    groups, shared_by = keys[1], heads // keys[1]

    def of_part(part: int, threads: int | None = None) -> int:
        limits = {heads: part * shared_by, groups: part}
        fewer = [
            _Like((like.shape[0], limits[like.shape[1]], *like.shape[2:]), like.stride, like.dtype)
            if isinstance(like, _Like) and len(like.shape) > 2 and like.shape[1] in limits
            else like
            for like in likes
        ]
        return _asked(operation, fewer, named, threads)

    busy = -(-torch.get_num_threads() // shared_by)  # every thread has a head to work at
    part = min(groups, max(busy, _WORK // (rows * keys[2] * width * shared_by)))
    if part == groups:
        return of_part(groups)
    # One thread tells what a head takes: several meet by chance.
    return of_part(part) + (groups - part) * (of_part(2, threads=1) - of_part(1, threads=1))


def _asked(operation: Any, likes: list[Any], named: dict[str, Any], threads: int | None = None) -> int:
    usual = torch.get_num_threads()
    threads = threads or usual
    torch.set_num_threads(threads)
    try:
        return _asked_once(operation, tuple(likes), tuple(named.items()), threads)
    finally:
        torch.set_num_threads(usual)


@lru_cache(maxsize=4096)
def _asked_once(operation: Any, likes: tuple[Any, ...], named: tuple[tuple[str, Any], ...], threads: int) -> int:
    results: list[Any] = []
    with _disable_current_modes(), torch.no_grad(), _no_garbage_collected():
        args, kwargs = tree_map(lambda a: a.made() if isinstance(a, _Like) else a, (list(likes), dict(named)))
        peak = peak_cpu_bytes(lambda: results.append(operation(*args, **kwargs)))
        given = {argument.data_ptr() for argument in tree_leaves((args, kwargs)) if isinstance(argument, Tensor)}
        made = [tensor for tensor in tree_leaves(results) if isinstance(tensor, Tensor)]
        return peak - sum(tensor.nbytes for tensor in made if tensor.data_ptr() not in given)


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Lets no tensor of somebody else be freed, which would count as memory given back."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
