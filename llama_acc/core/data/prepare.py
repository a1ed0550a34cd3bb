"""What is done with the rows of a data file, some at a time: they are looked at, and their items encoded.

Of a large file worker processes do it: threads would share one interpreter lock, which most of the work holds. A worker
is a fresh interpreter that knows the parent by one socket: nothing is forked, so threads and process groups of the
parent do not matter, and the parent's main module is not run again. It ends when the parent does.
"""

import contextlib
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import NamedTuple

from llama_acc.core.data.checks import DatasetStats, merged_finding
from llama_acc.core.data.encode import Chunk, encode_chunk
from llama_acc.core.data.readers import Checked
from llama_acc.core.data.templates import PromptFormat
from llama_acc.core.errors import RunError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer

Batch = Sequence[tuple[int, Checked]]
"""Rows of a file and their numbers from 0: items, and what is none."""

KEPT_PLACES = 20
"""Of what is found in a file, for each kind."""

# So many batches are prepared here before it is worth while to start workers, which takes them half a second.
_ALONE = 40
_MOST = 32


@dataclass(frozen=True)
class Job:
    """What to make of items."""

    tokenizer: Path
    template: PromptFormat
    max_tokens: int
    image_positions: int = 0


class Prepared(NamedTuple):
    """What became of a batch."""

    chunk: Chunk
    """Its items as documents."""
    stats: DatasetStats
    """What was found in its rows."""


def prepare_batch(batch: Batch, job: Job, tokenizer: Tokenizer) -> Prepared:
    """Encode the items of a batch, and look at all of its rows."""
    items = [(index, row.item) for index, row in batch if row.item is not None]
    stats = DatasetStats(KEPT_PLACES)
    chunk = encode_chunk(items, job.template, tokenizer, job.max_tokens, job.image_positions)
    merged, stops, marks = set(chunk.merged), job.template.text_stops(tokenizer), job.template.marks(tokenizer)
    for index, row in batch:
        stats.add(row, stops, marks)
        if row.item is not None and index in merged:
            stats.findings.add(merged_finding(row.item, row.where, job.template))
    return Prepared(chunk, stats)


def prepare_batches(batches: Iterable[Batch], job: Job, tokenizer: Tokenizer, workers: int) -> Iterator[Prepared]:
    """Prepare batches, in their order; here if they are few, else in worker processes.

    Every worker is kept busy, with two batches for each in memory.

    Args:
        batches: of rows, read as they are needed.
        job: what to make of them.
        tokenizer: the one the job names.
        workers: how many processes; with fewer than two, all is done here.

    Raises:
        RunError: a worker died.
    """
    waiting = iter(batches)
    for batch in islice(waiting, _ALONE if workers > 1 else None):
        yield prepare_batch(batch, job, tokenizer)
    first = next(waiting, None)
    if first is None:
        return
    count = min(workers, _MOST)
    started: list[_Worker] = []
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def prepare(batch: Batch) -> Prepared:
        worker = idle.get()
        try:
            return worker.prepare(batch)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(count)
    under_way: deque[Future[Prepared]] = deque()
    try:
        for _ in range(count):
            started.append(_Worker(job))
            idle.put(started[-1])
        for batch in chain([first], waiting):
            under_way.append(threads.submit(prepare, batch))
            if len(under_way) >= 2 * count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.close()


class _Worker:
    """One worker process, seen from the parent."""

    def __init__(self, job: Job) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                # Each of them is one of many.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "TOKENIZERS_PARALLELISM": "false",
                },
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


def serve(descriptor: int) -> None:
    """What a worker does until the parent is gone."""
    with contextlib.suppress(EOFError, OSError), Connection(descriptor) as connection:
        job: Job = connection.recv()
        tokenizer = load_tokenizer(job.tokenizer, threads=1)
        while True:
            batch: Batch = connection.recv()
            connection.send(prepare_batch(batch, job, tokenizer))
