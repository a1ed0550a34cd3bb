"""What kernels take for themselves within an operation and give back: no tensor of the program shows it.

A CPU's libraries are asked for it by doing the operation once, or a part of a large one: for a bf16 product, oneDNN
copies blocks of the operands for every thread where the CPU multiplies bf16, and sums the whole result in float32 where
it does not. Attention's buffers are left out: they come and go where less is in use than in the feed-forward layer.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from llama_acc.core.device import device_type
from llama_acc.core.model import nf4

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.addmm_: 1}  # at which argument the first matrix is
_WORK = 1 << 30  # multiplications that are done to find out
_BLOCKS = 1024  # rows and columns of a result from which a product takes no more for its blocks (oneDNN 3.x)


class _Like(NamedTuple):
    """A tensor but for its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def workspace(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Bytes that an operation takes besides its results and gives back before it returns."""
    packet = operation._overloadpacket
    if packet is _aten._flash_attention_backward:
        return _flash_backward(args[1], args[2], len(args[6]) - 1)
    if not args or not isinstance(args[0], Tensor) or device_type(args[0]) != "cpu":
        return 0
    # Compared by name: the library is imported only where something is quantized.
    if packet._qualified_op_name == "bitsandbytes::gemm_4bit":
        # On a CPU it writes the matrix out, and its blocks' magnitudes in float32, and multiplies.
        x, _, (rows, columns) = args[:3]
        weight = torch.empty((rows, columns), dtype=x.dtype, device="meta")
        written = rows * columns * x.element_size() + 4 * (rows * columns // nf4.BLOCK)
        return written + cpu_workspace(_aten.linear.default, (x, weight), {})
    return cpu_workspace(operation, args, kwargs)


def _flash_backward(q: Tensor, k: Tensor, documents: int) -> int:
    """FlashAttention's backward pass for q [T, H, D] and k [T, K, D] sums the queries' gradients in float32, with room
    for 128 rows more a document and head dimensions rounded up, keeps a number a row, and, where heads share keys,
    makes every head's own gradients of keys and values first (mha_varlen_bwd in PyTorch's flash_api.cpp)."""
    rows, heads, width = q.shape
    rounded_rows = rows + 128 * documents
    rounded_width = -(-width // 32) * 32 if width <= 128 else -(-width // 64) * 64
    shared = 2 * heads * k.shape[0] * width * q.element_size() if k.shape[1] != heads else 0
    return heads * rounded_rows * 4 * (rounded_width + 1) + shared


def cpu_workspace(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Bytes that an operation on a CPU takes besides its results; its arguments may have no values.

    A large product is done with so many rows and columns that its blocks are as large as the whole one's.
    """
    packet = operation._overloadpacket
    if packet is _aten.linear:  # in inference mode it is not taken apart before
        x, weight, bias = (*args, None)[:3]
        product = (x.reshape(-1, x.shape[-1]), weight.t())
        operation, args = (_aten.mm.default, product) if bias is None else (_aten.addmm.default, (bias, *product))
        packet = operation._overloadpacket
    likes = [_like(argument) for argument in args]
    # Other products are MKL's, whose memory is not torch's.
    if (first := _PRODUCTS.get(packet)) is not None and likes[first].dtype == torch.bfloat16:
        (rows, width), columns = likes[first].shape, likes[first + 1].shape[1]
        part = (rows, columns)
        if rows * width * columns > _WORK:
            part = (min(rows, _BLOCKS), min(columns, _BLOCKS))
        shapes = {first: (part[0], width), first + 1: (width, part[1])}
        operands = tuple(_cut(like, shapes.get(place, part)) for place, like in enumerate(likes))
        options = tuple((name, _cut(_like(value), part)) for name, value in sorted(kwargs.items()))
        taken = _asked(operation, operands, options, torch.get_num_threads())
        sums = 4 * part[0] * part[1]  # of the whole result in float32, where the CPU does not multiply bf16
        return taken if taken < sums else taken - sums + 4 * rows * columns
    return 0


def _like(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return _Like(tuple(argument.shape), tuple(argument.stride()), argument.dtype)
    return tuple(argument) if isinstance(argument, list) else argument


def _cut(like: Any, shape: tuple[int, int]) -> Any:
    """The first rows and columns of an operand or a result; what is broadcast stays."""
    if not isinstance(like, _Like):
        return like
    sizes = tuple(size if size == 1 else limit for size, limit in zip(like.shape[::-1], shape[::-1], strict=False))
    return like._replace(shape=sizes[::-1])


@lru_cache(maxsize=4096)
def _asked(operation: Any, likes: tuple[Any, ...], named: tuple[tuple[str, Any], ...], threads: int) -> int:
    results: list[Any] = []
    with _disable_current_modes(), torch.no_grad(), garbage_kept():
        args, kwargs = tree_map(
            lambda a: torch.empty_strided(*a[:2], dtype=a.dtype) if isinstance(a, _Like) else a,
            (list(likes), dict(named)),
            is_leaf=lambda a: isinstance(a, _Like),
        )
        peak = peak_cpu_bytes(lambda: results.append(operation(*args, **kwargs)))
        given = {argument.data_ptr() for argument in tree_leaves((args, kwargs)) if isinstance(argument, Tensor)}
        made = [tensor for tensor in tree_leaves(results) if isinstance(tensor, Tensor)]
        return peak - sum(tensor.nbytes for tensor in made if tensor.data_ptr() not in given)


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Collects no garbage: a tensor that this freed would count as memory given back. A fifth of a simulation, too."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def peak_cpu_bytes(work: Callable[[], None]) -> int:
    """The most bytes that torch's CPU allocator had given out at a time while `work` was done.

    The profiler hears of this thread and of those that work for it. What others free is not counted as given back.
    """
    # Its own events are not asked for: making a Python object of every operation takes longer than the work.
    profiler = profile(profile_memory=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its library would tell standard error that it starts and stops
    with profiler:
        work()
    results: Any = profiler.kineto_results
    waiting = results.experimental_event_tree()
    events = []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            events.append(event)
    if not events:
        return 0
    first = min(events, key=lambda event: event.start_time_ns).extra_fields
    before = first.total_allocated - first.alloc_size
    return max(0, *(event.extra_fields.total_allocated - before for event in events))
