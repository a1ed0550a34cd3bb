"""Twelve kills at any moment, also while a checkpoint is being written: the run is the uninterrupted one in the end."""

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_acc.core.atomic import check_manifest
from tests.cli.commands import lines_of, metrics, run, start, wait_until

_KILLS = 12
# 360 steps; a checkpoint of 9 MiB every second one takes about as long as the two steps before it.
_RUN = (
    "finetune", "--recipe", "quickstart", "--device", "cpu", "train.epochs=90", "checkpoint.every_epochs=1",
    "checkpoint.every_steps=2", "checkpoint.keep=2",
)  # fmt: skip


def _latest(output: Path) -> int:
    """The step of the checkpoint `latest` names, every byte of which is as it was written; 0 without one."""
    if not (output / "latest").exists():
        return 0
    checkpoint = output / (output / "latest").read_text().strip()
    check_manifest(checkpoint, verify=True)
    step: int = json.loads((checkpoint / "state" / "progress.json").read_text())["step"]
    return step


def _writing(output: Path) -> bool:
    return any(output.glob(".writing-epoch*"))


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_any_moment_lose_nothing(tmp_path: Path, seed: int) -> None:
    plain, output = tmp_path / "plain", tmp_path / "killed"
    assert run(*_RUN, "--output", plain).returncode == 0
    chance = random.Random(seed)
    saved, hit_a_checkpoint = 0, 0
    for kill in range(_KILLS):
        # A resume first cuts the log back to the checkpoint.
        goal = lines_of(output) + chance.randint(1, 25)
        during_a_checkpoint, delay = kill % 2 == 0, chance.uniform(0, 0.02)
        with start(*_RUN, "--output", output, *(["--resume"] if kill else [])) as process:
            wait_until(lambda goal=goal: lines_of(output) >= goal, process)  # type: ignore[misc]
            if during_a_checkpoint:
                wait_until(lambda: _writing(output), process)
            time.sleep(delay)
            process.kill()
        hit_a_checkpoint += _writing(output)
        assert _latest(output) >= saved
        saved = _latest(output)
    assert hit_a_checkpoint > 0
    done = run(*_RUN, "--output", output, "--resume")
    assert done.returncode == 0, done.stderr
    assert f", {saved} of 360 steps done" in done.stderr
    assert metrics(output) == metrics(plain)
    assert {path.name for path in output.iterdir()} == {path.name for path in plain.iterdir()}
    states = [load_file(folder / "epoch89" / "state" / "training-00-of-01.safetensors") for folder in (plain, output)]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
