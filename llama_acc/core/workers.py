"""Processes that do work ahead of whoever needs its results.

They are started anew, not forked, and import no torch unless the work does: light, and safe beside CUDA and threads.
They end when their parent does, however that one ends, and leave Ctrl-C and SIGTERM to it.
"""

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import TypeVar

from llama_acc.core.errors import RunError
from llama_acc.core.interrupt import held_back

_Job = TypeVar("_Job")
_Pool = TypeVar("_Pool", bound="WorkerPool")
_Result = TypeVar("_Result")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """A pool of worker processes, started as there is work. Use it in a `with` block: they end with it."""

    def __init__(self, count: int, work: str, hint: str) -> None:
        """At most `count` processes, of which `work` says what each does, such as "encodes data", and `hint` what to do
        about it where one is killed."""
        self._count, self._killed = count, (f"a process that {work} was killed", hint)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self: _Pool) -> _Pool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers after what they are at."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def map_ahead(
        self, function: Callable[[_Job], _Result], groups: Iterable[Sequence[_Job]], ahead: int
    ) -> Iterator[list[_Result]]:
        """The results of each group's jobs, in order, while up to `ahead` more groups are under way.

        Raises:
            RunError: a worker was killed.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._count, _Spawn(), _watch_parent)
        waiting: deque[list[Future[_Result]]] = deque()
        try:
            for group in groups:
                with held_back(), _main_hidden():  # from workers that start: Ctrl-C is the parent's
                    waiting.append([self._pool.submit(function, job) for job in group])
                if len(waiting) > ahead:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        except BrokenProcessPool as error:
            raise RunError(*self._killed) from error


class _Worker(SpawnProcess):
    """A process that can be ended though it is deaf to SIGTERM: if one dies, the pool ends the others."""

    def terminate(self) -> None:
        self.kill()


class _Spawn(SpawnContext):
    Process = _Worker


@contextmanager
def _main_hidden() -> Iterator[None]:
    """A worker that is started here does not run the main module again, which may be a script that trains."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _watch_parent() -> None:
    """Ends a worker when its parent was killed. (The pool's own pipe does not: every worker holds both of its ends.)"""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
