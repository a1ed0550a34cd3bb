"""Worker processes that check and encode. Threads would share one interpreter lock, which most of the work holds.

A worker is a fresh interpreter that knows the parent by one socket: nothing is forked, so threads and process groups
of the parent do not matter, and the parent's main module is not run again. It ends when the parent does.
"""

import contextlib
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe

from llama_acc.core.data.prepare import Batch, Job, Prepared, prepare_batch
from llama_acc.core.errors import RunError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer

# So many batches are encoded here before it is worth while to start workers, which takes them half a second.
_ALONE = 8
_MOST = 32


def prepare_batches(batches: Iterable[Batch], job: Job, tokenizer: Tokenizer, workers: int) -> Iterator[Prepared]:
    """Checks and encodes batches, in their order; here if they are few, else in worker processes.

    Args:
        batches: of rows, read as they are needed.
        job: what to make of them.
        tokenizer: the one the job names.
        workers: how many processes; with fewer than two, all is done here.

    Raises:
        RunError: a worker died.
    """
    waiting = iter(batches)
    for count, batch in enumerate(waiting, start=1):
        yield prepare_batch(batch, job, tokenizer)
        if count == _ALONE and workers > 1:
            break
    with contextlib.ExitStack() as stack:
        first = next(waiting, None)
        if first is not None:
            pool = stack.enter_context(_Pool(job, min(workers, _MOST)))
            yield from pool.prepare(first, waiting)


class _Pool:
    """Some workers, and a thread for each of them that hands it batches."""

    def __init__(self, job: Job, count: int) -> None:
        self._workers = [_Worker(job) for _ in range(count)]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def prepare(self, first: Batch, rest: Iterator[Batch]) -> Iterator[Prepared]:
        """Keeps every worker busy and two batches for each in memory."""
        under_way: deque[Future[Prepared]] = deque([self._threads.submit(self._prepare, first)])
        for batch in rest:
            under_way.append(self._threads.submit(self._prepare, batch))
            if len(under_way) >= 2 * len(self._workers):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def _prepare(self, batch: Batch) -> Prepared:
        worker = self._free.get()
        try:
            return worker.prepare(batch)
        finally:
            self._free.put(worker)


class _Worker:
    """One worker process, seen from the parent."""

    def __init__(self, job: Job) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                # Each of them is one of many.
                "TOKENIZERS_PARALLELISM": "false",
            }
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C in the terminal does not reach it
            )
        self._connection.send(job)

    def prepare(self, batch: Batch) -> Prepared:
        try:
            self._connection.send(batch)
            answer: Prepared = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise RunError(
                f"a process that encodes data ended early (exit code {code})", "the machine may be short of memory"
            ) from error
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def _serve(connection: Connection) -> None:
    """What a worker does until the parent is gone."""
    job: Job = connection.recv()
    tokenizer = load_tokenizer(job.tokenizer, threads=1)
    while True:
        batch: Batch = connection.recv()
        connection.send(prepare_batch(batch, job, tokenizer))


if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError):
        _serve(Connection(int(sys.argv[1])))
