"""What a run tells while it goes: a bar on a terminal, plain lines anywhere else, both on standard error."""

import io
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_acc.cli import console, run_console
from tests.cli.commands import DRY, QUICKSTART, complete, environment, invoke, metrics, start
from tests.cli.terminal import Terminal

SHORT = (*QUICKSTART, "train.epochs=3", "checkpoint.every_epochs=1", "checkpoint.keep=2")


def test_the_first_lines_say_what_will_be_done_and_the_last_ones_what_was(tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = complete(*SHORT, "--output", output)
    lines = [line for line in result.stderr.splitlines() if line != "loading PyTorch"]
    subjects = ["recipe", "model", "weights", "parameters", "data", "template"]
    subjects += ["answers end", "steps", "warning", "learning rate", "checkpoints"]
    assert [line.split("  ")[0] for line in lines[: len(subjects)]] == subjects
    assert [line for line in lines if line.startswith("saved ")] == [f"saved {output}/epoch{i}" for i in range(3)]
    facts = r"  loss \d+\.\d{4}  lr \S+  [\d,]+ tokens/s  \d+\.\d\d GiB"
    assert re.fullmatch(f"step 1/12{facts}", next(line for line in lines if line.startswith("step 1/12")))
    assert any(re.fullmatch(f"step 12/12{facts}", line) for line in lines)
    last = metrics(output)[-1]["loss"]
    assert lines[-1] == f"loss {last:.4f}; the report is {output}/report.md; talk to it with:"
    assert result.stdout == f"llama-acc chat --ckpt {output}\n"


def test_validation_is_told_and_logged(tmp_path: Path) -> None:
    result = complete(*SHORT, "--output", tmp_path, "data.validation.fraction=0.25", "data.validation.every_steps=4")
    assert "validation" in [line.split("  ")[0] for line in result.stderr.splitlines()]
    validations = [line for line in metrics(tmp_path) if "validation_loss" in line]
    assert [line["step"] for line in validations] == [0, 4, 8, 9]
    for line in validations:
        assert f"step {line['step']}: validation loss {line['validation_loss']:.4f}" in result.stderr


def test_a_pipe_gets_plain_lines_and_a_run_whose_reader_leaves_goes_on_to_its_end(tmp_path: Path) -> None:
    """`llama-acc finetune ... 2>&1 | head` loses its remarks, not its work."""
    with start(*SHORT, "--output", tmp_path / "run", env=environment(FORCE_COLOR="1")) as process:
        assert process.stderr is not None
        read = ""
        for line in process.stderr:
            read += line
            if line.startswith("step 1/12  loss "):
                break
        assert not set(read) & set("━\r")
        process.stderr.close()
        assert process.wait() == 0
    assert (tmp_path / "run" / "latest").read_text() == "epoch2\n"


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    with Terminal(*SHORT, "--output", tmp_path / "run", term="xterm") as terminal:
        terminal.expect("parameters")
        terminal.expect("━━━━")
        assert terminal.end() == 0
        shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.seen)
        assert "12/12" in shown
        assert f"llama-acc chat --ckpt {tmp_path / 'run'}" in shown


def test_a_name_with_spaces_is_quoted_where_it_is_to_be_typed(
    tmp_path: Path, trained_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(trained_once, tmp_path / "my run"))
    result = invoke("finetune", "--device", "cpu", "--output", output, "--resume", "train.epochs=2")
    assert result.stdout == f"llama-acc chat --ckpt '{output}'\n"
    # Without --output the folder is named after the recipe.
    monkeypatch.chdir(tmp_path)
    assert invoke(*QUICKSTART, "train.epochs=1").stdout == "llama-acc chat --ckpt runs/quickstart\n"


# Whoever waits sees what for, and how long


class _Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: self.now))


def _step(number: int, tokens: int) -> dict[str, Any]:
    facts = {"loss": 1.0, "lr": 0.1, "tokens_per_second": 1.0, "peak_memory_gib": 1.0}
    return {"step": number, "tokens": tokens, **facts}


@pytest.mark.parametrize("seconds", [0.5, 80.0, 4000.0])
def test_the_time_left_is_told_from_the_second_step_on_by_tokens(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps of 150 tokens on the average; the second one has 200."""
    plan: Any = SimpleNamespace(total_steps=10, steps_per_epoch=5, train=SimpleNamespace(tokens=750))
    clock, shown = _Clock(monkeypatch), io.StringIO()
    monkeypatch.setattr(console, "err", console.Console(file=shown, width=200))
    monkeypatch.setattr(run_console, "time", console.time)
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    watcher = run_console.RunConsole()
    watcher.step(_step(1, 100), plan)
    clock.now += seconds
    watcher.step(_step(2, 200), plan)
    first, second = shown.getvalue().splitlines()
    assert "left" not in first
    assert second.endswith(f"  {console.duration(8 * 150 / (200 / seconds))} left")


@pytest.mark.parametrize(("term", "shows"), [("xterm", True), ("dumb", False)])
def test_a_dumb_terminal_gets_lines_as_a_pipe_does(term: str, shows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(console, "err", console.Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert console.shows_bars() == shows


def test_the_bar_of_slow_work_knows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich forgets what is older than half a minute, unless it is told not to."""
    monkeypatch.setattr(console, "err", console.Console(file=io.StringIO(), force_terminal=True, width=80))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with console.Progress("question") as watcher:
        watcher("answered", 0, 10)
        assert watcher._bars.speed_estimate_period >= 1e9


def test_what_takes_longer_than_a_moment_is_told_once_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "err", console.Console(file=shown, width=80))
    monkeypatch.setattr(console, "_SIGN_AFTER", 0.01)
    console.working("first", after=3600.0)
    console.working("second")
    deadline = time.monotonic() + 30
    while "second" not in shown.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    console.working("second, further", key="second")
    console.working(None)
    assert shown.getvalue() == "second\n"


def test_a_dry_run_shows_on_a_terminal_what_it_does_and_its_results_as_they_come(tmp_path: Path) -> None:
    with Terminal(*DRY, "--output", tmp_path / "run", term="xterm") as terminal:
        for text in ("loading PyTorch", "label tokens", "example 2", "predicting the memory", "at its fullest"):
            terminal.expect(text)
        terminal.expect("timing a micro-batch")
        terminal.expect("for the steps (from one timed step on cpu)")
        assert terminal.end() == 0


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "perplexity", "--ckpt", "no-such-run", "--data", "x.json"),
        ("convert-checkpoint", "no-such-run", "new", "--to", "hf"),
        ("convert-data", "check", "no-such-file.json"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_imports_for_seconds_says_so(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str | None] = []
    monkeypatch.setattr(console, "working", lambda text, *key, **after: said.append(text))
    assert invoke(*words).exit_code == 2
    assert said[0] is not None
    assert said[0].startswith("loading")
