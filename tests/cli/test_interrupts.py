"""A run that is killed or stopped goes on later, and is then the run it would have been; nothing half is left."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama_acc.core.atomic import check_manifest
from tests.cli.commands import PATIENCE, QUICKSTART, complete, environment, invoke, lines_of, start, wait_until
from tests.core.train.runs import assert_same_run

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
    assert_same_run(output, other, "epoch11")
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
    done = complete(*command)
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


# Any command ends with 130 and 143 and no traceback, wherever in it a signal falls


# Runs the command line, which gets a signal where `{place}` puts it.
_PROGRAM = """
import os, signal, sys, time
def send():
    os.kill(os.getpid(), {number})
class Importing:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            if {module!r} != "typer":
                from llama_acc.cli import stopping
                stopping._IMPORT_PATIENCE = 60.0  # a slow machine is not what is tried
            send()
            time.sleep(0.1)  # it must not be broken off here
            print("went on", file=sys.stderr)
            if {module!r} != "typer":
                stopping._IMPORT_PATIENCE = 0.0
sys.meta_path.insert(0, Importing())
def in_reading():
    from llama_acc.core.errors import UserError
    import llama_acc.core.data.convert.run as run
    def swallowed(*arguments, **named):
        try:
            send()
            time.sleep(9)
        except: pass
        while True:
            time.sleep(0.01)
    def damaged(*arguments, **named):
        try:
            send()
            time.sleep(9)
        except BaseException as error:
            raise UserError("the file is damaged: copy it again") from error
    run.convert = {{"swallowed": swallowed, "damaged": damaged}}[{place!r}]
if {place!r} != "importing":
    in_reading()
from llama_acc.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("place", "module", "number"),
    [
        ("importing", "typer", signal.SIGINT),  # the command has not begun
        ("importing", "llama_acc.core.data.convert.run", signal.SIGTERM),  # it has, and imports what it needs
        ("swallowed", "", signal.SIGINT),
        ("damaged", "", signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_command_wherever_it_falls(
    place: str, module: str, number: signal.Signals, tmp_path: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "Why?", "output": "So."}]))
    program = _PROGRAM.format(number=int(number), place=place, module=module)
    done = subprocess.run(
        [sys.executable, "-c", program, "convert-data", "alpaca", data, "--output", tmp_path / "converted.json"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE,
    )
    assert done.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], done.stderr
    assert not re.search("Traceback|damaged|Error", done.stderr), done.stderr
    assert done.stdout == ""
    if module == "typer":
        assert done.stderr == ""
    else:
        assert place == "importing" or not (tmp_path / "converted.json").exists()
        assert f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}" in done.stderr
        assert ("went on" in done.stderr) == bool(module)


def test_ignored_signals_stay_ignored() -> None:
    """As `nohup` and a shell's `&` have it."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "from llama_acc.cli import stopping; stopping.watch();"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, callable(signal.getsignal(signal.SIGTERM)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.stdout == "True True\n", done.stderr
