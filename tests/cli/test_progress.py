"""What a run tells while it goes: a bar on a terminal, plain lines anywhere else, both on standard error."""

import re
import shutil
from pathlib import Path

import pytest

from tests.cli.commands import QUICKSTART, environment, invoke, metrics, start
from tests.cli.terminal import Terminal

SHORT = (*QUICKSTART, "train.epochs=3", "checkpoint.every_epochs=1", "checkpoint.keep=2")


def test_the_first_lines_say_what_will_be_done_and_the_last_ones_what_was(tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = invoke(*SHORT, "--output", output)
    assert result.exit_code == 0
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
    result = invoke(*SHORT, "--output", tmp_path, "data.validation.fraction=0.25", "data.validation.every_steps=4")
    assert result.exit_code == 0, result.stderr
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
