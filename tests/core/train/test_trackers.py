"""Trackers: a run is the same one there after a resume, no point comes twice, none that fails stops a run. The real
packages: tests/soak/test_trackers.py."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.errors import UserError
from llama_acc.core.train import trackers
from tests.core.train.runs import Notes, losses, names, run

# What a package is asked for, as a package that writes it down; without a network, as where nobody is logged in.
_WANDB = """
import json, pathlib
Settings = setup = lambda *given, **settings: settings
def login(prompt): return False
def init(**settings): return Run(settings)
class Run:
    def __init__(self, settings):
        self.path = pathlib.Path(settings["dir"]) / "wandb.jsonl"
        self.write(settings)
    def write(self, what):
        with self.path.open("a") as file:
            file.write(json.dumps(what) + "\\n")
    def log(self, values, step):
        self.write([step, sorted(values)])
    def finish(self, exit_code):
        self.write(exit_code)
"""
TRACKED = ("train.trackers=[tensorboard,wandb]", "data.validation.fraction=0.2", "data.validation.every_steps=4")


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)


def received(output: Path) -> list[Any]:
    return [json.loads(line) for line in (output / "wandb.jsonl").read_text().splitlines()]


def points(output: Path) -> list[tuple[int, bool]]:
    return [(one[0], "validation_loss" in one[1]) for one in received(output) if isinstance(one, list)]


def test_a_resumed_run_is_the_same_run_there_and_no_point_comes_twice(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(output, *TRACKED, "train.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep=0")
    # As if it had been killed before the checkpoint of step 4, and again while it computed step 3.
    shutil.rmtree(output / "epoch0")
    (output / "latest").unlink()
    run(output, *TRACKED, "train.max_steps=3", resume=True)
    shutil.rmtree(output / "epoch0-iter3")
    (output / "latest").unlink()
    run(output, *TRACKED, resume=True)
    began = [one for one in received(output) if isinstance(one, dict)]
    assert len({one["id"] for one in began}) == 1
    assert {(one["resume"], one["mode"], one["name"]) for one in began} == {("allow", "offline", "run")}
    validated = {0, 4, 8}
    assert points(output) == [(n, kind) for n in range(9) for kind in (False, True) if n in validated or not kind][1:]
    assert [one for one in received(output) if isinstance(one, int)] == [0, 0, 0]
    assert len(losses(output)) == 8


def test_one_that_is_used_from_a_resume_on_gets_what_was_before(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(output, "train.max_steps=2")
    run(output, "train.max_steps=4", TRACKED[0], resume=True)
    assert points(output) == [(step, False) for step in (1, 2, 3, 4)]


def test_the_recipe_is_its_configuration_without_secrets(tmp_path: Path) -> None:
    run(tmp_path / "run", *TRACKED, "description=https://user:hidden@host/data?token=hidden", "train.max_steps=2")
    config = received(tmp_path / "run")[0]["config"]
    assert config["description"] == "https://host/data"
    assert config["train"]["max_steps"] == 2
    assert "hidden" not in (tmp_path / "run" / "wandb.jsonl").read_text()


@pytest.mark.parametrize("broken", ["def init", "def log", "def finish"])
def test_one_that_fails_ends_with_a_line_and_the_run_goes_on(broken: str, tmp_path: Path) -> None:
    fails = "raise ConnectionError('no route to host')"
    failing = re.sub(rf"({broken}\(.*\)): *\n +.*|({broken}\(.*\)): .*", rf"\1\2: {fails}", _WANDB)
    assert fails in failing
    (tmp_path / "packages" / "wandb.py").write_text(failing)
    notes = Notes()
    run(tmp_path / "run", *TRACKED, callback=notes)
    said = [text for text in notes.texts if "curves end here" in text]
    assert said == [
        f"Weights & Biases's curves end here (no route to host); metrics.jsonl in {tmp_path / 'run'} has all"
    ]
    assert len(losses(tmp_path / "run")) == 8
    assert "tensorboard" in names(tmp_path / "run")


def test_a_damaged_record_of_trackers_begins_new_runs_there(tmp_path: Path) -> None:
    output, notes = tmp_path / "run", Notes()
    run(output, TRACKED[0], "train.max_steps=2")
    (output / trackers.FILE).write_text("{")
    run(output, TRACKED[0], "train.max_steps=4", resume=True, callback=notes)
    assert any("trackers begin new runs" in text for text in notes.texts)
    assert points(output) == [(step, False) for step in (1, 2, 1, 2, 3, 4)]


def test_a_package_that_is_not_installed_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlflow.*not installed") as refused:
        run(tmp_path / "run", "train.trackers=[mlflow]")
    assert refused.value.hint is not None
    assert "pip install 'llama-acc[mlflow]'" in refused.value.hint
    assert not (tmp_path / "run").exists()
