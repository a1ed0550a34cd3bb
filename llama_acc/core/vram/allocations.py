"""Every allocation and every free that torch's CPU allocator reports to the profiler, added up."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig


def peak_cpu_bytes(work: Callable[[], None]) -> int:
    """The most bytes that torch's CPU allocator had given out at a time while `work` was done."""
    autograd: Any = torch.autograd
    # torch.profiler.profile on top of these makes a Python object of every operation, which takes longer than the work.
    settings = autograd.ProfilerConfig(
        autograd.ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig()
    )
    watched = {autograd.ProfilerActivity.CPU}
    with _silenced():
        autograd._prepare_profiler(settings, watched)
        autograd._enable_profiler(settings, watched)
    try:
        work()
    finally:
        with _silenced():
            result: Any = autograd._disable_profiler()
    events = [event for event in result.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


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
