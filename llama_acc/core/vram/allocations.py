"""What torch's CPU allocator has given out, as it tells the profiler with every allocation and every free.

The profiler hears only of its own thread and of those that work for it. A buffer that a thread of gloo is the last to
let go of would never be given back, so the allocator is told to count in all threads, and its own sum is taken.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType, _ExperimentalConfig


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
    events = [event for event in _all(result.experimental_event_tree()) if event.tag == _EventType.Allocation]
    if not events:
        return 0
    first = min(events, key=lambda event: event.start_time_ns).extra_fields
    before = first.total_allocated - first.alloc_size
    return max(0, *(event.extra_fields.total_allocated - before for event in events))


def _all(events: list[Any]) -> Iterator[Any]:
    """Events, and those within them."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        yield event


@contextlib.contextmanager
def _every_thread_counted() -> Iterator[None]:
    """Has the allocator's sum follow what threads free that the profiler does not watch (c10's CPUAllocator.cpp)."""
    flag = _flag()
    if flag is None:
        yield
        return
    flag.value = True
    try:
        yield
    finally:
        flag.value = False


def _flag() -> ctypes.c_bool | None:
    """The allocator's switch; None where torch was built in a way that hides it: then only buffers that gloo's threads
    free are counted wrongly."""
    for library in (Path(torch.__file__).parent / "lib").glob("libc10.*"):
        with contextlib.suppress(OSError, ValueError):
            return ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_report_cpu_memory_usage")
    return None


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
