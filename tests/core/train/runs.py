"""Runs of the shipped quickstart recipe, made small: 32 items, four optimizer steps an epoch."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_acc.core.finetune import Finished, finetune
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.plan import Plan, make_plan
from llama_acc.core.train.runs import Callback
from tests.undrawn import undrawn

_SMALL = (
    "model.params={dim: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, multiple_of: 16, max_seq_len: 256}",
    "train.epochs=2",
    "train.warmup_epochs=0.5",
)
TIMED = ("tokens_per_second", "peak_memory_gib")


def quickstart(*overrides: str) -> Recipe:
    return Recipe.load("quickstart", [*_SMALL, *overrides])


def run(output: Path, *overrides: str, resume: bool = False, drawn: bool = False, **options: Any) -> Finished:
    with nullcontext() if drawn else undrawn():
        return finetune(quickstart(*overrides), output, resume=resume, device="cpu", **options)


def plan_of(*overrides: str) -> Plan:
    return make_plan(quickstart(*overrides), Callback())


def metrics(output: Path) -> list[dict[str, Any]]:
    """The log without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output) if "loss" in line]


def saved_weights(checkpoint: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(checkpoint / "consolidated.00-of-01.model.pth", weights_only=True)["model"]
    return weights


def saved_state(checkpoint: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "state" / "training-00-of-01.safetensors")


def assert_bitwise_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def assert_same_run(output: Path, expected: Path, last: str = "epoch1") -> None:
    """The same log, weights and training state, to the bit."""
    assert metrics(output) == metrics(expected)
    for saved in (saved_weights, saved_state):
        assert_bitwise_equal(saved(output / last), saved(expected / last))


def curve(output: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics(output) if "loss" in line]


def assert_same_curve(output: Path, expected: Path) -> None:
    """Loss and gradient norm within 1e-5 at the first step and 1e-4 over all."""
    for step, (actual, wanted) in enumerate(zip(curve(output), curve(expected), strict=True)):
        assert actual == pytest.approx(wanted, rel=1e-5 if step == 0 else 1e-4), step


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Notes(Callback):
    """Keeps what a run notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)
