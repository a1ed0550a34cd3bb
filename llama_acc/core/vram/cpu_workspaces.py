"""What the libraries of a CPU take within an operation and give back: asked of them, by doing the operation once.

oneDNN copies blocks of the operands of a bf16 product, and torch's attention has buffers of its own; both for every
thread. How much that is depends on shapes, strides, the number of threads and the CPU, and no tensor shows it.
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
    if packet is _aten.linear:  # in inference mode it is not taken apart before
        return _of_linear(*args, **kwargs)
    if packet in _PRODUCTS:
        first = _PRODUCTS[packet]
        if args[first].dtype != torch.bfloat16:  # other products are MKL's, whose memory is not torch's
            return 0
        likes, named = _smaller_product([_like(argument) for argument in args], named, first)
    elif packet in _ATTENTION:
        likes = _fewer_heads([_like(argument) for argument in args], _ATTENTION[packet])
    else:
        return 0
    return _asked(operation, tuple(likes), tuple(named.items()), torch.get_num_threads())


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


def _smaller_product(likes: list[Any], named: dict[str, Any], first: int) -> tuple[list[Any], dict[str, Any]]:
    """The product of as many rows and columns as tell what blocks take."""
    (rows, width), columns = likes[first].shape, likes[first + 1].shape[1]
    if rows * width * columns <= _WORK:
        return likes, named
    limits = (min(rows, _BLOCKS), min(columns, _BLOCKS))

    def cut(like: _Like, shape: tuple[int, ...]) -> _Like:
        sizes = tuple(size if size == 1 else limit for size, limit in zip(like.shape[::-1], shape[::-1], strict=False))
        return _Like(sizes[::-1], like.stride, like.dtype)

    shapes = {first: (limits[0], width), first + 1: (width, limits[1])}
    fewer = [cut(like, shapes.get(place, limits)) for place, like in enumerate(likes)]
    return fewer, {name: cut(like, limits) if isinstance(like, _Like) else like for name, like in named.items()}


def _fewer_heads(likes: list[Any], first: int) -> list[Any]:
    """Attention in so few heads that it is done soon; a thread works at one head at a time."""
    _, heads, rows, width = likes[first].shape
    others = likes[first + 1].shape[1]
    kept = max(1, min(others, _WORK // (rows * likes[first + 1].shape[2] * width * heads // others)))
    limits = {heads: kept * heads // others, others: kept}
    return [
        _Like((like.shape[0], limits[like.shape[1]], *like.shape[2:]), like.stride, like.dtype)
        if isinstance(like, _Like) and len(like.shape) > 2 and like.shape[1] in limits
        else like
        for like in likes
    ]


@lru_cache(maxsize=4096)
def _asked(operation: Any, likes: tuple[Any, ...], named: tuple[tuple[str, Any], ...], threads: int) -> int:
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
