"""A run that is killed or stopped goes on later, and is then the run it would have been; nothing half is left."""

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_acc.core.atomic import check_manifest
from tests.cli.commands import PATIENCE, QUICKSTART, environment, invoke, lines_of, metrics, start, wait_until

# 48 steps of a few milliseconds, saved every 4.
LONG = (*QUICKSTART, "train.epochs=12", "checkpoint.every_epochs=1", "checkpoint.keep=2")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the commands that are started have it: the bits of a sum depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def latest_step(output: Path) -> int:
    """How many steps the newest checkpoint has done; it is whole."""
    checkpoint = output / (output / "latest").read_text().strip()
    check_manifest(checkpoint, verify=True)
    step: int = json.loads((checkpoint / "state" / "progress.json").read_text())["step"]
    return step


def same_run(output: Path, other: Path) -> None:
    assert metrics(output) == metrics(other)
    ends = [load_file(folder / "epoch11" / "state" / "training-00-of-01.safetensors") for folder in (output, other)]
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        assert torch.equal(ends[0][name], ends[1][name]), name
    weights = [(folder / "epoch11" / "consolidated.00-of-01.model.pth").read_bytes() for folder in (output, other)]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in other.iterdir())


def test_a_run_stopped_and_killed_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    output = tmp_path / "run with a space"
    command: tuple[object, ...] = (*LONG, "--output", output)
    for at, number, code in ((6, signal.SIGTERM, 143), (20, signal.SIGKILL, -9)):
        with start(*command) as process:
            wait_until(lambda at=at: lines_of(output) >= at, process)  # type: ignore[misc]
            process.send_signal(number)
            said, remarks = process.communicate()
        assert process.returncode == code, remarks
        assert said == ""
        saved = latest_step(output)
        if number == signal.SIGKILL:
            assert saved % 4 == 0
            assert at - 8 <= saved <= lines_of(output)  # the newest one may still be written
        else:
            assert "SIGTERM: saving after this step, then stopping" in remarks
            assert f"stopped; resume with: llama-acc finetune --output '{output}' --resume" in remarks
            assert "Traceback" not in remarks
            assert saved == lines_of(output) < 48
            assert "SIGTERM" in (output / "report.md").read_text()
        # The run's own recipe says how to go on.
        command = ("finetune", "--device", "cpu", "--output", output, "--resume")
    done = invoke(*command)
    assert done.exit_code == 0, done.stderr
    assert f"resuming from {output}/epoch" in done.stderr
    assert f", {saved} of 48 steps done" in done.stderr
    uninterrupted = tmp_path / "uninterrupted"
    assert invoke(*LONG, "--output", uninterrupted).exit_code == 0
    same_run(output, uninterrupted)


def test_a_second_ctrl_c_ends_at_once_without_saving(tmp_path: Path) -> None:
    """Its steps take a second, so that the second one comes within the step the first one waits for."""
    output = tmp_path / "run"
    slow = "model.params={dim: 512, n_layers: 3, n_heads: 8, multiple_of: 256, max_seq_len: 256}"
    large = ["train.global_batch_size=32", "train.batch_size=1", "data.max_tokens=256"]
    with start(*QUICKSTART, slow, *large, "--output", output) as process:
        wait_until(lambda: lines_of(output) >= 1, process)
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        while "SIGINT: saving after this step" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    assert lines_of(output) == 1
    assert not list(output.glob("epoch*"))
    assert not (output / "latest").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_ends_a_run_before_its_first_step_leaves_nothing(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what is encoded without a cache stay: after a kill, the next run finds what nobody holds any more."""
    large, temporary, output = tmp_path / "large.jsonl", tmp_path / "tmp", tmp_path / "run"
    large.write_text("".join(f'{{"instruction": "go {i}", "output": "{i} {i}"}}\n' for i in range(60_000)))
    temporary.mkdir()
    variables = {"LLAMA_ACC_CACHE_GIB": "0", "TMPDIR": str(temporary)}
    with start(*QUICKSTART, "--data", large, "--output", output, env=environment(**variables)) as process:
        wait_until(lambda: any(temporary.glob("*/*.tokens")), process)
        process.send_signal(number)
        said, remarks = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (130 if number == signal.SIGINT else -number, ""), remarks
    assert "Traceback" not in remarks
    if number == signal.SIGINT:
        assert "stopped by Ctrl-C" in remarks
        assert not output.exists()
    else:
        assert any(temporary.iterdir())
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tempfile, "tempdir", None)
        assert invoke(*QUICKSTART, "--dry-run", "--no-timing").exit_code == 0
    assert [path.name for path in temporary.iterdir() if path.name.startswith(".llama-acc")] == []


@pytest.mark.parametrize("keep", [1, 2, 0])
def test_keep_counts_the_newest_checkpoints(tmp_path: Path, keep: int) -> None:
    saving = ("train.epochs=3", "checkpoint.every_epochs=1", f"checkpoint.keep={keep}")
    result = invoke(*QUICKSTART, "--output", tmp_path / "run", *saving)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "run").glob("epoch*")) == ["epoch0", "epoch1", "epoch2"][-keep:]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="what a process reads is told by Linux")
def test_ctrl_c_does_not_wait_for_a_large_file_to_be_read(tmp_path: Path) -> None:
    huge, output = tmp_path / "huge.jsonl", tmp_path / "run"
    with huge.open("wb") as file:
        file.truncate(1 << 42)  # an hour's reading, of nothing
    with start(*QUICKSTART, "--data", huge, "--output", output) as process:
        wait_until(lambda: _is_reading(process.pid, huge), process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 130


def _is_reading(process: int, path: Path) -> bool:
    files = Path(f"/proc/{process}/fd")
    try:
        return any(os.readlink(file) == str(path) for file in files.iterdir())
    except OSError:  # one was closed meanwhile
        return False
