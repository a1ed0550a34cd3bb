from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from llama_acc.core.data import prepare
from llama_acc.core.data.items import SingleTurn
from llama_acc.core.data.prepare import Batch, Job, Prepared, prepare_batches
from llama_acc.core.data.readers import Checked
from llama_acc.core.data.templates import get_template
from llama_acc.core.errors import RunError
from llama_acc.core.tokenizer import load_tokenizer


def batches(count: int) -> list[Batch]:
    return [[(n * 3 + i, row(f"answer {n} {i}")) for i in range(3)] for n in range(count)]


def row(output: str) -> Checked:
    return Checked("item", SingleTurn("go", None, output), [])


@pytest.fixture
def job(tokenizer_path: Path) -> Job:
    return Job(tokenizer_path, get_template("none"), 64)


def assert_equal(actual: list[Prepared], expected: list[Prepared]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.chunk, b.chunk, strict=True))
        assert (a.stats.all_findings(), a.stats.rows) == (b.stats.all_findings(), b.stats.rows)


def test_workers_give_what_one_process_gives_in_the_same_order(job: Job) -> None:
    tokenizer, given = load_tokenizer(job.tokenizer), batches(60)
    alone = list(prepare_batches(given, job, tokenizer, workers=1))
    assert [int(prepared.chunk.table["item"][0]) for prepared in alone] == list(range(0, 180, 3))
    assert_equal(list(prepare_batches(given, job, tokenizer, workers=3)), alone)


def test_batches_are_read_as_they_are_needed(job: Job) -> None:
    read = []

    def reading() -> "list[Batch]":
        for batch in batches(1000):
            read.append(batch)
            yield batch

    encoded = prepare_batches(reading(), job, load_tokenizer(job.tokenizer), workers=2)
    assert len(list(islice(encoded, 50))) == 50
    encoded.close()
    assert len(read) <= 50 + 2 * 2 + 1


def test_a_worker_that_dies_ends_the_run_with_an_error(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(job.tokenizer)
    encoded = prepare_batches(batches(1000), job, tokenizer, workers=2)
    started = []
    start = prepare.subprocess.Popen
    monkeypatch.setattr(
        prepare.subprocess, "Popen", lambda *args, **kw: started.append(start(*args, **kw)) or started[-1]
    )
    list(islice(encoded, 45))
    started[0].kill()
    with pytest.raises(RunError, match=r"a process that encodes data ended early \(exit code -9\)"):
        list(encoded)
    assert [process.wait(10) for process in started] == [-9, -9]
