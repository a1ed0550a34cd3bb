"""`llama-acc chat --nproc`: several processes share a model, and only rank 0 is seen."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.commands import invoke
from tests.cli.jobs import PATIENCE, gone, start_job, workers_of
from tests.cli.terminal import Terminal
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


def test_on_a_terminal_ctrl_c_stops_the_answer_of_all_ranks_and_they_answer_the_next_question(of_eight: Path) -> None:
    """And in an empty line it leaves."""
    flags = ("--template", "dialogue", "--device", "cpu", "--temperature", "0", "--max-new-tokens", "400")
    with Terminal("chat", "--ckpt", of_eight, *flags, "--nproc", 2, term="xterm") as terminal:
        for question in ("hello\r", "/retry\r"):
            terminal.expect("\x1b[?2004h")
            terminal.type(question)
            terminal.expect("\x1b[?2004l")
            terminal.expect("tokens/s")
            assert not terminal.echoes()
            terminal.type("\x03")
        terminal.expect("\x1b[?2004h")
        terminal.expect("tokens/s")
        terminal.type("\x03")
        assert terminal.end() == 0
        assert terminal.echoes()
    assert "context 512 of" not in terminal.seen, "as far as it would have gone"
