"""A run that was stopped and resumed is, to the bit, the run that never was."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_acc.core.atomic import write_manifest
from llama_acc.core.errors import UserError
from llama_acc.core.finetune import finetune
from llama_acc.core.interrupt import Interrupted
from llama_acc.core.train.callback import Callback
from llama_acc.core.train.log import MetricsLog, read_metrics
from tests.core.train.runs import (
    assert_bitwise_equal,
    losses,
    metrics,
    names,
    quickstart,
    run,
    saved_state,
    saved_weights,
)


class Notes(Callback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def assert_same_run(resumed: Path, whole: Path, last: str = "epoch2") -> None:
    lines = metrics(resumed)
    assert [line for line in lines if "loss" in line] == [line for line in metrics(whole) if "loss" in line]
    # A run that was stopped validated once more, at its end.
    assert all(line in lines for line in metrics(whole))
    assert_bitwise_equal(saved_weights(resumed / last), saved_weights(whole / last))
    assert_bitwise_equal(saved_state(resumed / last), saved_state(whole / last))


@pytest.mark.parametrize("stops", [["train.max_steps=6"], ["train.max_steps=4", "train.max_steps=9"]], ids=str)
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=fp32"],
        ["train.precision=bf16"],
        ["train.precision=bf16", "checkpoint.dtype=fp32"],
        ["train.precision=fp32", "checkpoint.dtype=bf16", "data.validation.fraction=0.25", "train.global_batch_size=6"],
    ],
    ids=str,
)
def test_resume_is_bitwise_the_uninterrupted_run(overrides: list[str], stops: list[str], tmp_path: Path) -> None:
    common = ["train.epochs=3", "checkpoint.every_epochs=0", *overrides]
    if any("validation" in override for override in overrides):
        common.append("data.validation.every_steps=5")
    run(tmp_path / "whole", *common)
    for number, stop in enumerate(stops):
        run(tmp_path / "resumed", *common, stop, resume=number > 0)
    assert len(losses(tmp_path / "resumed")) < 12
    run(tmp_path / "resumed", *common, resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_what_a_killed_run_logged_after_its_last_checkpoint_is_done_again(tmp_path: Path) -> None:
    common = ["train.epochs=3", "checkpoint.every_steps=2"]
    run(tmp_path / "whole", *common)
    run(tmp_path / "killed", *common, "train.max_steps=6")
    log = tmp_path / "killed" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 7, "loss": 99.0}\n{"step": 8, "lo')
    (tmp_path / "killed" / ".writing-epoch1-iter3").mkdir()
    (tmp_path / "killed" / ".writing-epoch1-iter3" / "config.json").write_text("{")
    run(tmp_path / "killed", *common, resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert not any(name.startswith(".") for name in names(tmp_path / "killed"))


def test_a_signal_saves_and_ends_the_run_which_then_resumes_to_the_bit(tmp_path: Path) -> None:
    class Impatient(Notes):
        def step(self, metrics: dict[str, Any], plan: object) -> None:
            if metrics["step"] == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.getsignal(signal.SIGTERM)
    events = Impatient()
    run(tmp_path / "whole", "train.epochs=3", "checkpoint.every_epochs=0")
    with pytest.raises(Interrupted) as stopped:
        run(
            tmp_path / "stopped",
            *("train.epochs=3", "checkpoint.every_epochs=0"),
            callback=events,
            handle_signals=True,
        )
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is previous
    assert any(text.startswith("SIGTERM: saving after this step") for text in events.texts)
    assert (tmp_path / "stopped" / "latest").read_text() == "epoch1-iter1\n"
    assert "stopped by SIGTERM; continue it with --resume" in (tmp_path / "stopped" / "report.md").read_text()
    run(tmp_path / "stopped", "train.epochs=3", "checkpoint.every_epochs=0", resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_resume_with_nothing_left_to_do_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = metrics(tmp_path), saved_weights(tmp_path / "epoch1"), names(tmp_path)
    finished = run(tmp_path, resume=True)
    assert finished.checkpoint == tmp_path / "epoch1"
    assert metrics(tmp_path) == before[0]
    assert_bitwise_equal(saved_weights(tmp_path / "epoch1"), before[1])
    assert names(tmp_path) == before[2]


def test_resume_without_a_checkpoint_starts_at_step_zero_and_says_so(tmp_path: Path) -> None:
    events = Notes()
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "metrics.jsonl").write_text('{"step": 1, "loss": 99.0}\n')
    run(tmp_path / "resumed", resume=True, callback=events)
    run(tmp_path / "fresh")
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "fresh")
    assert any("no whole checkpoint" in text and "starting at step 0" in text for text in events.texts)


def test_keys_that_make_it_another_run_are_all_listed(tmp_path: Path) -> None:
    run(tmp_path, "train.max_steps=2")
    before = (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(UserError) as refused:
        run(tmp_path, "optimizer.lr=3e-3", "train.seed=3", "data.sources.0.template=none", resume=True)
    lines = refused.value.message.splitlines()
    assert lines[0] == f"the recipe is not the one {tmp_path / 'epoch0-iter2'} was trained with:"
    assert lines[1:] == [
        "  data.sources.0.template: 'alpaca' before, 'none' now",
        "  optimizer.lr: 0.002 before, 0.003 now",
        "  train.seed: 0 before, 3 now",
    ]
    assert (tmp_path / "recipe.yaml").read_text() == before


def test_how_long_how_often_saved_and_how_dealt_may_change(tmp_path: Path) -> None:
    run(tmp_path, "train.max_steps=2")
    run(
        tmp_path,
        *("train.epochs=3", "train.batch_size=2", "train.micro_batch_tokens=100", "checkpoint.keep=1"),
        *("checkpoint.every_steps=1", "checkpoint.every_epochs=2", "parallel.data_parallel=fsdp"),
        resume=True,
    )
    assert len(losses(tmp_path)) == 12


def test_other_data_is_refused_and_the_run_left_as_it_was(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    items = [{"instruction": f"Question {i}?", "output": f"Answer {i}."} for i in range(8)]
    data.write_text(json.dumps(items))
    output, source = tmp_path / "run", f"data.sources.0.path={data}"
    run(output, source)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    data.write_text(json.dumps([*items[:-1], {"instruction": "Question 7?", "output": "Another answer."}]))
    with pytest.raises(UserError, match=r"the data is not what .*epoch1 was trained on"):
        run(output, source, "train.epochs=3", resume=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("file", ["state/training-00-of-01.safetensors", "state/progress.json"])
def test_a_damaged_state_is_never_resumed_from(file: str, tmp_path: Path) -> None:
    run(tmp_path, "train.max_steps=2")
    damaged = tmp_path / "epoch0-iter2" / file
    raw = bytearray(damaged.read_bytes())
    raw[-2] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(UserError, match=rf"{file} was changed"):
        run(tmp_path, resume=True)


def test_weights_that_stand_in_for_the_masters_are_checked_before_a_resume(tmp_path: Path) -> None:
    """With float32 weights there are no separate masters: the weights are part of what a resume needs."""
    run(tmp_path, "train.max_steps=2", "train.precision=fp32")
    damaged = tmp_path / "epoch0-iter2" / "consolidated.00-of-01.model.pth"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(UserError, match=r"consolidated\.00-of-01\.model\.pth was changed"):
        run(tmp_path, resume=True)


def test_a_run_of_before_a_key_was_there_resumes_with_its_default(tmp_path: Path) -> None:
    run(tmp_path, "train.max_steps=2")
    kept = tmp_path / "epoch0-iter2" / "recipe.yaml"
    before, key, after = kept.read_text().partition("  on_error: stop\n")
    assert key
    kept.write_text(before + after)
    write_manifest(kept.parent)
    with pytest.raises(UserError, match=r"data\.on_error: 'stop' before, 'skip' now"):
        run(tmp_path, "train.max_steps=3", "data.on_error=skip", resume=True)
    run(tmp_path, "train.max_steps=3", resume=True)
    assert len(losses(tmp_path)) == 3


def test_a_checkpoint_without_state_is_no_place_to_resume_from(tmp_path: Path) -> None:
    run(tmp_path, "train.max_steps=2")
    shutil.rmtree(tmp_path / "epoch0-iter2" / "state")
    with pytest.raises(UserError, match="holds no training state to resume from"):
        run(tmp_path, resume=True)


def test_a_run_with_relative_paths_resumes_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_acc.core.recipe import RECIPES_FOLDER, Recipe

    monkeypatch.chdir(tmp_path)
    shutil.copy(RECIPES_FOLDER / "quickstart" / "instructions.json", "instructions.json")
    run(Path("run"), "data.sources.0.path=instructions.json", "train.max_steps=2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    kept = Recipe.load(tmp_path / "run" / "recipe.yaml", ["train.max_steps=3"])
    finetune(kept, tmp_path / "run", resume=True, device="cpu")
    assert len(losses(tmp_path / "run")) == 3


def line(step: int, loss: float = 1.0) -> dict[str, float]:
    return {"step": step, "loss": loss, "lr": 0.1, "tokens": 9, "tokens_per_second": 9.0, "peak_memory_gib": 0.5}


def test_the_log_is_cut_back_to_the_step_a_run_goes_on_from(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, 0, print) as log:
        for step in (1, 2, 3):
            log.write(line(step))
        log.write({"step": 3, "validation_loss": 0.5})
    with MetricsLog(tmp_path, 2, print) as log:
        log.write(line(3, 30.0))
    assert read_metrics(tmp_path / "metrics.jsonl").lines == [line(1), line(2), line(3, 30.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == ([], [])
    path.write_text(f"{json.dumps(line(1))}\n{json.dumps(line(2))}\n{{'ste")
    assert read_metrics(path) == ([line(1), line(2)], [])


def test_newest_means_written_last_whatever_an_abandoned_run_left(tmp_path: Path) -> None:
    """A kill after a checkpoint took its name and before `latest` named it leaves one from the future."""
    run(tmp_path, "train.epochs=3", "train.max_steps=8", "checkpoint.every_epochs=1", "checkpoint.keep=0")
    (tmp_path / "latest").write_text("epoch0\n")
    run(tmp_path, "train.epochs=3", "train.max_steps=6", "checkpoint.keep=1", resume=True)
    assert (tmp_path / "latest").read_text() == "epoch1-iter2\n"
    assert (tmp_path / "epoch1-iter2").is_dir()
    run(tmp_path, "train.epochs=3", resume=True)
    assert len(losses(tmp_path)) == 12


def test_a_first_checkpoint_that_nothing_names_yet_is_found(tmp_path: Path) -> None:
    common = ["train.epochs=3", "checkpoint.every_epochs=1", "checkpoint.keep=0"]
    run(tmp_path / "whole", *common)
    run(tmp_path / "killed", *common, "train.max_steps=4")
    (tmp_path / "killed" / "latest").unlink()
    events = Notes()
    run(tmp_path / "killed", *common, resume=True, callback=events)
    assert any("epoch0, 4 of 12 steps done" in text for text in events.texts)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_the_random_number_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    torch.manual_seed(11)
    run(tmp_path, "train.max_steps=2")
    torch.manual_seed(22)
    run(tmp_path, resume=True)
    files = [tmp_path / name / "state" / "rng-00000-of-00001.safetensors" for name in ("epoch0-iter2", "epoch1")]
    saved = [load_file(file)["cpu"] for file in files]
    assert torch.equal(saved[0], saved[1])
    assert torch.equal(saved[0], torch.manual_seed(0).get_state())  # of train.seed


def test_quickstart_overrides_are_what_the_tests_think_they_are() -> None:
    recipe = quickstart("train.max_steps=1")
    assert (recipe.train.epochs, recipe.train.global_batch_size, recipe.train.max_steps) == (2, 8, 1)
