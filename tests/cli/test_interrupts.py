"""A run that is killed or stopped goes on later, and is then the run it would have been; nothing half is left."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_acc.core.atomic import check_manifest
from tests.cli.commands import PATIENCE, QUICKSTART, environment, invoke, lines_of, metrics, run, start, wait_until

# 400 steps of a few milliseconds, saved every 20.
LONG = (*QUICKSTART, "train.epochs=100", "checkpoint.every_epochs=5", "checkpoint.keep=2")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    home = str(tmp_path_factory.mktemp("home"))
    done = run(*LONG, "--output", output, LLAMA_ACC_HOME=home)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"llama-acc chat --ckpt {output}\n"
    assert "\x1b" not in done.stderr
    return output


def latest_step(output: Path) -> int:
    """How many steps the newest checkpoint has done; it is whole."""
    checkpoint = output / (output / "latest").read_text().strip()
    check_manifest(checkpoint, verify=True)
    step: int = json.loads((checkpoint / "state" / "progress.json").read_text())["step"]
    return step


def same_run(output: Path, other: Path) -> None:
    assert metrics(output) == metrics(other)
    ends = [load_file(folder / "epoch99" / "state" / "training-00-of-01.safetensors") for folder in (output, other)]
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        assert torch.equal(ends[0][name], ends[1][name]), name
    weights = [(folder / "epoch99" / "consolidated.00-of-01.model.pth").read_bytes() for folder in (output, other)]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in other.iterdir())


def test_a_run_killed_twice_goes_on_as_if_nothing_had_been(uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command: tuple[object, ...] = (*LONG, "--output", output)
    for at in (70, 210):
        with start(*command) as process:
            wait_until(lambda at=at: lines_of(output) >= at, process)  # type: ignore[misc]
            process.kill()
        assert process.returncode == -signal.SIGKILL
        saved = latest_step(output)
        assert saved % 20 == 0
        assert at - 40 <= saved <= lines_of(output)  # the newest one may still be written
        # The run's own recipe says how to go on.
        command = ("finetune", "--device", "cpu", "--output", output, "--resume")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {output}/epoch" in done.stderr
    assert f", {saved} of 400 steps done" in done.stderr
    same_run(output, uninterrupted)


def test_sigterm_and_ctrl_c_save_and_the_run_goes_on_from_there(uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "run with a space"
    command: tuple[object, ...] = (*LONG, "--output", output)
    for at, number, code in ((70, signal.SIGTERM, 143), (210, signal.SIGINT, 130)):
        with start(*command) as process:
            wait_until(lambda at=at: lines_of(output) >= at, process)  # type: ignore[misc]
            process.send_signal(number)
            said, remarks = process.communicate()
        assert process.returncode == code, remarks
        assert said == ""
        assert f"{number.name}: saving after this step, then stopping" in remarks
        assert f"stopped; resume with: llama-acc finetune --output '{output}' --resume" in remarks
        assert "Traceback" not in remarks
        assert latest_step(output) == lines_of(output) < 400
        assert number.name in (output / "report.md").read_text()
        command = ("finetune", "--device", "cpu", "--output", output, "--resume")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    same_run(output, uninterrupted)


def test_a_second_ctrl_c_ends_at_once_without_saving(tmp_path: Path) -> None:
    """Its steps take seconds, so that the second one comes within the step the first one waits for."""
    output = tmp_path / "run"
    slow = "model.params={dim: 512, n_layers: 6, n_heads: 8, multiple_of: 256, max_seq_len: 256}"
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


def test_ctrl_c_before_the_first_step_leaves_nothing_and_no_traceback(tmp_path: Path) -> None:
    data = tmp_path / "large.jsonl"
    item = json.dumps({"instruction": "a question of many words " * 8, "output": "an answer of many words " * 8})
    data.write_text((item + "\n") * 60_000)
    output = tmp_path / "run"
    with start(*QUICKSTART, "--data", data, "--output", output) as process:
        wait_until(output.exists, process)
        process.send_signal(signal.SIGINT)
        said, remarks = process.communicate()
    assert (process.returncode, said) == (130, ""), remarks
    assert "stopped by Ctrl-C" in remarks
    assert "Traceback" not in remarks
    assert not output.exists()


@pytest.mark.parametrize("keep", [1, 3, 0])
def test_keep_counts_the_newest_checkpoints(tmp_path: Path, keep: int) -> None:
    output = tmp_path / "run"
    result = invoke(
        *QUICKSTART, "--output", output, "train.epochs=6", "checkpoint.every_epochs=1", f"checkpoint.keep={keep}"
    )
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in output.glob("epoch*")) == [f"epoch{i}" for i in range(6)][-keep:]


def test_a_first_checkpoint_that_no_pointer_names_yet_is_found(trained: Path) -> None:
    """A kill can come between writing the checkpoint and naming it in `latest`."""
    (trained / "latest").unlink()
    result = invoke("finetune", "--device", "cpu", "--output", trained, "--resume", "train.epochs=2")
    assert result.exit_code == 0, result.stderr
    assert "4 of 8 steps done" in result.stderr


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_what_is_encoded_without_a_cache_does_not_stay(number: signal.Signals, tmp_path: Path) -> None:
    large, temporary = tmp_path / "large.jsonl", tmp_path / "tmp"
    large.write_text("".join(f'{{"instruction": "go {i}", "output": "{i} {i}"}}\n' for i in range(60_000)))
    temporary.mkdir()
    variables = {"LLAMA_ACC_CACHE_GIB": "0", "TMPDIR": str(temporary)}
    command = (*QUICKSTART, "--data", large, "--output", tmp_path / "run")
    with start(*command, env=environment(**variables)) as process:
        wait_until(lambda: any(temporary.glob("*/*.tokens")), process)
        process.send_signal(number)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}.get(number, -number)
    if number == signal.SIGKILL:
        assert any(temporary.iterdir())
        # The next run finds what nobody holds any more.
        done = run(
            *QUICKSTART, "train.max_steps=1", "train.warmup_epochs=0", "--output", tmp_path / "next", **variables
        )
        assert done.returncode == 0, done.stderr
    assert [path.name for path in temporary.iterdir() if path.name.startswith(".llama-acc")] == []
