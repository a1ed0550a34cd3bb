"""`llama-acc runs`: what runs below a folder are and how far they are, without torch and whatever their state."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.train.run_folder import RunFolder
from tests.cli.commands import DRY, QUICKSTART, complete, invoke, metrics, refused

RUN = (
    *QUICKSTART,
    "train.epochs=2",
    "data.validation.fraction=0.2",
    "train.early_stopping_patience=2",
    "checkpoint.keep=0",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that was stopped after six."""
    folder = tmp_path_factory.mktemp("runs") / "deep" / "first"
    complete(*RUN, "--output", folder, "train.max_steps=6")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "deep" / "first"))


def listed(folder: Path) -> list[dict[str, Any]]:
    result = complete("runs", folder, "--json")
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def of(folder: Path) -> dict[str, Any]:
    (found,) = listed(folder)
    return found


def test_a_run_is_listed_with_how_far_it_is(folder: Path, tmp_path: Path) -> None:
    found, lines = of(tmp_path), metrics(folder)
    facts = {"folder": str(folder), "recipe": "quickstart", "base": "random", "method": "full"}
    assert found == found | facts
    assert (found["state"], found["step"], found["total_steps"]) == ("done", 6, 6)
    assert found["loss"] == [line["loss"] for line in lines if "loss" in line][-1]
    assert found["validation_loss"] == lines[-1]["validation_loss"]
    assert found["tokens_per_second"] > 0
    assert found["problem"] is None
    shown = complete("runs", tmp_path)
    assert shown.stderr == ""
    head, row = shown.stdout.splitlines()
    columns = ("run", "recipe", "base", "method", "state", "wrote", "step", "loss", "validation", "tokens/s")
    assert tuple(head.split()) == columns
    assert f"{folder}  quickstart  random  full    done" in row
    assert f"6/6  {found['loss']:.4f}      {found['validation_loss']:.4f}" in row


def test_running_stopped_and_done_are_told_apart(folder: Path) -> None:
    lock = RunFolder(folder)
    lock.open(resume=True)
    assert of(folder)["state"] == "running"
    lock.close()
    assert of(folder)["state"] == "done"
    recipe = (folder / "recipe.yaml").read_text().replace("max_steps: 6", "max_steps: null")
    (folder / "recipe.yaml").write_text(recipe)
    assert (of(folder)["state"], of(folder)["total_steps"]) == ("stopped", 8)
    # Two validations without a better loss end it early.
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines()
    last = json.loads(lines[-1]) | {"validations_since_best": 2}
    log.write_text("\n".join([*lines[:-1], json.dumps(last), '{"step": 7, "lo']))
    assert of(folder)["state"] == "done"
    # It was killed before the checkpoint of its last step.
    shutil.rmtree(folder / "epoch1-iter2")
    (folder / "latest").write_text("epoch0\n")
    progress = folder / "epoch0" / "state" / "progress.json"
    progress.parent.mkdir(parents=True, exist_ok=True)
    progress.write_text('{"step": 4}')
    assert of(folder)["state"] == "stopped"
    # The checkpoints were taken away when it was done.
    shutil.rmtree(folder / "epoch0")
    assert of(folder)["state"] == "done"


def test_the_last_validation_is_found_however_long_ago_it_was(folder: Path) -> None:
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    validation, last = lines[-1], [line for line in lines if "loss" in line][-1]
    steps = [last | {"step": step, "epoch": step / 4} for step in range(7, 1000)]
    log.write_text("".join(json.dumps(line) + "\n" for line in (*lines, *steps)))
    assert of(folder)["validation_loss"] == validation["validation_loss"]
    assert of(folder)["step"] == 999


def test_damaged_folders_are_told_and_the_newest_comes_first(folder: Path, tmp_path: Path) -> None:
    for name, damage in (
        ("log", lambda copy: (copy / "metrics.jsonl").write_text("{\n{\n")),
        ("recipe", lambda copy: (copy / "recipe.yaml").write_text("name: [")),
        ("keys", lambda copy: (copy / "recipe.yaml").write_text("name: x\n")),
    ):
        damage(Path(shutil.copytree(folder, tmp_path / name)))
    assert invoke(*DRY, "--no-timing", "--output", tmp_path / "planned").exit_code == 0
    (tmp_path / ".hidden").mkdir()
    shutil.copytree(folder, tmp_path / ".hidden" / "run")
    found = listed(tmp_path)
    states = {Path(one["folder"]).name: one["state"] for one in found}
    assert states == {
        "log": "damaged",
        "recipe": "damaged",
        "keys": "damaged",
        "planned": "not started",
        "first": "done",
    }
    assert [one["seen"] for one in found] == sorted((one["seen"] for one in found), reverse=True)
    result = complete("runs", tmp_path)
    assert len(result.stdout.splitlines()) == 6
    assert f"{tmp_path / 'keys'} is damaged: KeyError: 'model'" in result.stderr
    assert len(result.stderr.splitlines()) == 3


def test_where_there_is_no_run_it_says_so(tmp_path: Path) -> None:
    refused(invoke("runs", tmp_path / "nowhere"), "there is no folder", "llama-acc runs FOLDER")
    refused(invoke("runs", tmp_path), "there is no run in", "finetune")
    assert listed(tmp_path) == []
