"""What kernels take for themselves within an operation and give back: no tensor of the program shows it.

A CPU's libraries are asked for it by doing the operation once, or a part of a large one: for a bf16 product, oneDNN
copies blocks of the operands for every thread where the CPU multiplies bf16, and sums the whole result in float32 where
it does not; torch's attention has buffers for every thread and every head.

Torch's CPU allocator reports to the profiler, which hears only of its own thread and of those that work for it. What a
thread of gloo is the last to let go of would never be given back, so the allocator is told to count in all threads.
"""

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import _EventType, _ExperimentalConfig
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from llama_acc.core.device import device_type
from llama_acc.core.model import nf4

_aten = torch.ops.aten
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_backward
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.addmm_: 1}  # at which argument the first matrix is
_ATTENTION = {  # at which argument the queries are
    _aten._scaled_dot_product_flash_attention_for_cpu: 0,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 1,
}
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
    if packet is _FLASH_BACKWARD:
        return _flash_backward(args[1], args[2])
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


def _flash_backward(q: Tensor, k: Tensor) -> int:
    """FlashAttention's backward pass sums the queries' gradients in float32 over rows and head dimensions rounded up,
    keeps a number a row, and, where heads share keys, makes every head's own gradients of keys and values first
    (mha_bwd in PyTorch's flash_api.cpp)."""
    _, heads, rows, width = q.shape
    rounded_rows = -(-rows // 128) * 128
    rounded_width = -(-width // 32) * 32 if width <= 128 else -(-width // 64) * 64
    shared = 2 * heads * k.shape[2] * width * q.element_size() if k.shape[1] != heads else 0
    return heads * rounded_rows * 4 * (rounded_width + 1) + shared


def cpu_workspace(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Bytes that an operation on a CPU takes besides its results; its arguments may have no values."""
    packet = operation._overloadpacket
    if packet is _aten.linear:  # in inference mode it is not taken apart before
        x, weight, bias = (*args, None)[:3]
        factors = (x.reshape(-1, x.shape[-1]), weight.t())
        if bias is None:
            return cpu_workspace(_aten.mm.default, factors, {})
        return cpu_workspace(_aten.addmm.default, (bias, *factors), {})
    likes = [_like(argument) for argument in args]
    named = {name: _like(value) for name, value in sorted(kwargs.items())}
    first = _PRODUCTS.get(packet)
    # Other products are MKL's, whose memory is not torch's.
    if first is not None and likes[first].dtype == torch.bfloat16:
        return _of_product(operation, likes, named, first)
    if packet in _ATTENTION:
        return _of_attention(operation, likes, named, _ATTENTION[packet])
    return 0


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
    # The float32 sums of a whole result grow with it, number by number; blocks do not.
    half_rows, half_columns = (part_rows // 2, part_columns) if part_rows > 1 else (1, part_columns // 2)
    if taken - of_part(half_rows, half_columns) == 4 * (part_rows * part_columns - half_rows * half_columns):
        taken += 4 * (rows * columns - part_rows * part_columns)
    return taken


def _cut(like: Any, shape: tuple[int, int]) -> Any:
    """The first rows and columns of an operand or a result; what is broadcast stays."""
    if not isinstance(like, _Like):
        return like
    sizes = tuple(size if size == 1 else limit for size, limit in zip(like.shape[::-1], shape[::-1], strict=False))
    return like._replace(shape=sizes[::-1])


def _of_attention(operation: Any, likes: list[Any], named: dict[str, Any], first: int) -> int:
    """What attention takes, of so few heads that it is done soon: for every thread, and for every head."""
    (_, heads, rows, width), keys = likes[first].shape, likes[first + 1].shape
    groups, shared_by = keys[1], heads // keys[1]

    def of_part(part: int, threads: int | None = None) -> int:
        limits = {heads: part * shared_by, groups: part}
        fewer = [
            like._replace(shape=(like.shape[0], limits[like.shape[1]], *like.shape[2:]))
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
    torch.set_num_threads(threads or usual)
    try:
        return _asked_once(operation, tuple(likes), tuple(named.items()), threads or usual)
    finally:
        torch.set_num_threads(usual)


@lru_cache(maxsize=4096)
def _asked_once(operation: Any, likes: tuple[Any, ...], named: tuple[tuple[str, Any], ...], threads: int) -> int:
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
    """The most bytes that torch's CPU allocator had given out at a time while `work` was done."""
    autograd: Any = torch.autograd
    # torch.profiler.profile on top of these makes a Python object of every operation, which takes longer than the work.
    settings = autograd.ProfilerConfig(
        autograd.ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig()
    )
    watched = {autograd.ProfilerActivity.CPU}
    with _every_thread_counted():
        with _silenced():
            autograd._prepare_profiler(settings, watched)
            autograd._enable_profiler(settings, watched)
        try:
            work()
        finally:
            with _silenced():
                result: Any = autograd._disable_profiler()
    events, waiting = [], result.experimental_event_tree()
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


@contextlib.contextmanager
def _every_thread_counted() -> Iterator[None]:
    """Has the allocator's sum follow what threads free that the profiler does not watch (c10's CPUAllocator.cpp). Where
    torch was built in a way that hides the switch, only what gloo's threads free is counted wrongly."""
    flag = None
    for library in (Path(torch.__file__).parent / "lib").glob("libc10.*"):
        with contextlib.suppress(OSError, ValueError):
            flag = ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_report_cpu_memory_usage")
            flag.value = True
    try:
        yield
    finally:
        if flag is not None:
            flag.value = False


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Lets standard error lead nowhere: the profiler's library tells there that it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
