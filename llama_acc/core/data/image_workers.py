"""Processes that decode pictures ahead of the training loop.

They are started anew, not forked, and import no torch: light, and safe beside CUDA and threads. They hold nothing, so
they may be killed at any time; they end when the pipe from their parent does, however that one ends, and leave Ctrl-C
and SIGTERM to it. What they make is a function of the job alone, so their number changes nothing.

A request is a line of JSON; so is an answer, followed by as many bytes as it says.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.images import ImageError, ImageJob, Transform, check_header, pixels, shown_reference, thumbnail
from llama_acc.core.errors import RunError

_Result = TypeVar("_Result")
_MOST = 8
# The same modules are found as here, whatever the folder the worker is started in.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from llama_acc.core.data.image_workers import serve; serve()"
)


def default_workers(processes_here: int = 1) -> int:
    """How many workers each of so many training processes on this machine takes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // processes_here - 1, 1), _MOST)


class ImageWorkers:
    """A pool of worker processes. Use it in a `with` block: they end with it."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="images")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker() for _ in range(count)]
        self._closed = False
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> "ImageWorkers":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, whatever they are doing."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)

    def load(self, job: ImageJob) -> "Future[NDArray[np.uint8]]":
        """The pixels of a job, [3, size, size], made in the background; errors as those of `images.pixels`."""
        return self._submit(lambda worker: worker.load(job))

    def thumbnail(self, reference: str, side: int, max_pixels: int) -> "Future[bytes]":
        """See `images.thumbnail`."""
        return self._submit(lambda worker: worker.thumbnail(reference, side, max_pixels))

    def check(self, references: Sequence[str], max_pixels: int) -> "Future[list[str | None]]":
        """For each picture what `images.check_header` finds wrong with it."""
        return self._submit(lambda worker: worker.check(references, max_pixels))

    def prefetched(self, batches: Iterable[Sequence[ImageJob]], ahead: int) -> Iterator[NDArray[np.uint8]]:
        """The pixels of each batch [n, 3, size, size], in this order, while up to `ahead` more are being made.

        Raises:
            RunError: a picture that was there when the data was checked can no longer be read.
        """
        waiting: deque[tuple[Sequence[ImageJob], list[Future[NDArray[np.uint8]]]]] = deque()
        for batch in batches:
            waiting.append((batch, [self.load(job) for job in batch]))
            if len(waiting) > ahead:
                yield _stacked(*waiting.popleft())
        while waiting:
            yield _stacked(*waiting.popleft())

    def _submit(self, ask: "Callable[[_Worker], _Result]") -> "Future[_Result]":
        def answer() -> _Result:
            worker = self._idle.get()
            try:
                return ask(worker)
            except _WorkerGone as error:
                if self._closed:
                    raise RunError("the image workers were ended") from error
                raise RunError(
                    f"a process that decodes images {error}", "if memory ran out: lower data.images.workers"
                ) from error
            finally:
                self._idle.put(worker)

        return self._threads.submit(answer)


def _stacked(jobs: Sequence[ImageJob], futures: "list[Future[NDArray[np.uint8]]]") -> NDArray[np.uint8]:
    arrays = []
    for job, future in zip(jobs, futures, strict=True):
        try:
            arrays.append(future.result())
        except ImageError as error:
            place = f"the image {shown_reference(job.reference)} {error.message}"
            raise RunError(
                f"{place}, though it could be opened before", "mend it, then continue with --resume"
            ) from error
    return np.stack(arrays) if arrays else np.zeros((0, 3, 0, 0), np.uint8)


class _WorkerGone(Exception):
    """A worker process has ended."""


class _Worker:
    """One process; it answers one request at a time."""

    def __init__(self) -> None:
        # In a session of its own, a Ctrl-C in the terminal does not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._lock = threading.Lock()

    def load(self, job: ImageJob) -> NDArray[np.uint8]:
        """What `images.pixels` gives."""
        transform = job.transform
        _, data = self._ask({"load": [job.reference, transform.crop, transform.size, job.seed, job.max_pixels]})
        return np.frombuffer(data, np.uint8).reshape(3, transform.size, transform.size)

    def thumbnail(self, reference: str, side: int, max_pixels: int) -> bytes:
        """What `images.thumbnail` gives."""
        return self._ask({"thumbnail": [reference, side, max_pixels]})[1]

    def check(self, references: Sequence[str], max_pixels: int) -> list[str | None]:
        """What is wrong with each."""
        problems: list[str | None] = self._ask({"check": [list(references), max_pixels]})[0]
        return problems

    def kill(self) -> None:
        """Ends the process; who waits for its answer is told."""
        self._process.kill()
        with self._lock:  # nobody is reading any more
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _ask(self, request: dict[str, Any]) -> tuple[Any, bytes]:
        """The facts and the bytes of an answer.

        Raises:
            ImageError: the answer is one.
            _WorkerGone: there is none.
        """
        with self._lock:
            answer, data = self._exchange(json.dumps(request).encode() + b"\n")
            if answer is None or len(data) < answer["bytes"]:
                raise _WorkerGone(f"ended: {_how(self._process.wait())}")
        if answer["error"] is not None:
            raise ImageError(answer["error"])
        return answer["facts"], data

    def _exchange(self, request: bytes) -> tuple[dict[str, Any] | None, bytes]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(request)
            stdin.flush()
            line = stdout.readline()
            answer = json.loads(line) if line.endswith(b"\n") else None
            return answer, stdout.read(answer["bytes"]) if answer is not None else b""
        except (OSError, ValueError) as error:  # ValueError: the pipe was closed on this side
            raise _WorkerGone("cannot be reached") from error


def _how(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def serve() -> None:
    """What a worker process does: it answers requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Whatever a library prints must not stand among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            facts, data, error = None, b"", None
            try:
                facts, data = _answer(json.loads(line))
            except ImageError as found:
                error = found.message
            head = {"facts": facts, "error": error, "bytes": len(data)}
            answers.write(json.dumps(head).encode() + b"\n" + data)
            answers.flush()
    os._exit(0)  # nothing to clean up; the pipe may be broken


def _answer(request: dict[str, Any]) -> tuple[Any, bytes]:
    if "check" in request:
        references, max_pixels = request["check"]
        return [_header_problem(reference, max_pixels) for reference in references], b""
    if "thumbnail" in request:
        return None, thumbnail(*request["thumbnail"])
    reference, crop, size, seed, max_pixels = request["load"]
    return None, pixels(ImageJob(reference, Transform(crop, size), tuple(seed), max_pixels)).tobytes()


def _header_problem(reference: str, max_pixels: int) -> str | None:
    try:
        check_header(reference, max_pixels)
    except ImageError as error:
        return error.message
    return None
