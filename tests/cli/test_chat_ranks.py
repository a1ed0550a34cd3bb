"""`llama-acc chat --nproc`: several processes share a model, and only rank 0 is seen."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.commands import invoke
from tests.cli.jobs import PATIENCE, gone, start_job, workers_of
from tests.core.checkpoint.folders import GROUPED, state, write_consolidated

GREEDY = ("--device", "cpu", "--temperature", "0", "--max-new-tokens", "16")


@pytest.fixture
def of_eight(tmp_path: Path, tokenizer_path: Path) -> Path:
    """A random model, saved at model-parallel size 8."""
    folder = write_consolidated(tmp_path / "of-eight", state(), 8, replace(GROUPED, max_seq_len=512))
    shutil.copy(tokenizer_path, folder)
    return folder


@pytest.mark.parametrize(
    ("processes", "number", "code"),
    [(2, signal.SIGINT, 130), pytest.param(4, signal.SIGKILL, 1, marks=pytest.mark.soak)],
)
def test_ranks_say_the_same_from_the_files_of_eight_until_ctrl_c_or_a_dead_rank_ends_all(
    processes: int, number: signal.Signals, code: int, of_eight: Path
) -> None:
    """It comes while the next question is awaited."""
    talk = "hello\nand then?\n/reset\nhello\n"
    words = ("chat", "--ckpt", of_eight, "--template", "dialogue", *GREEDY)
    alone = invoke(*words, input=talk)
    assert alone.exit_code == 0, alone.stderr
    assert len(alone.stdout) >= 3 * 8
    job = start_job(*words, "--nproc", processes, folder=of_eight)
    assert job.stdin is not None
    assert job.stdout is not None
    job.stdin.write(talk)
    job.stdin.flush()
    assert job.stdout.read(len(alone.stdout)) == alone.stdout
    workers = workers_of(job)
    assert sorted(workers) == list(range(processes))
    if number == signal.SIGINT:
        job.send_signal(number)
    else:
        os.kill(workers[1], number)
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode == code, err
    assert gone(list(workers.values()))
    assert ("rank 1 was killed by SIGKILL" in err) == (number == signal.SIGKILL)
