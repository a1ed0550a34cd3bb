"""The recipe `caption-quickstart`: from nothing to captions of drawings it has never seen."""

import json
from pathlib import Path

import pytest

from llama_acc.core.data.drawings import SPLITS
from tests.cli.commands import invoke


def exact(run: Path, split: str) -> float:
    """Which part of a split's captions a run gets right to the letter."""
    result = invoke("caption", "--ckpt", run, f"drawn:{split}", "--json", "--device", "cpu", "--batch-size", 64)
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == SPLITS[split]
    return sum(line["caption"] == line["expected"] for line in lines) / len(lines)


def test_after_half_a_minute_many_drawings_are_captioned(tmp_path: Path) -> None:
    """It was a quarter of them; by chance it would be one in 3,444."""
    words = ("finetune", "--recipe", "caption-quickstart", "--output", tmp_path, "--device", "cpu", "train.epochs=4")
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (0, f"llama-acc caption --ckpt {tmp_path} IMAGE\n"), result.stderr
    assert exact(tmp_path, "held-out") >= 0.1


@pytest.mark.soak
def test_all_drawings_are_captioned(tmp_path: Path) -> None:
    result = invoke("finetune", "--recipe", "caption-quickstart", "--output", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert exact(tmp_path, "held-out") >= 0.95
