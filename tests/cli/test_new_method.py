"""A tuning method is one file: with tests/core/model/scaling.py alone, every command can do what it can with others."""

import json
from pathlib import Path

import pytest
import torch

from llama_acc.core.model.tuning import METHODS
from tests.cli.commands import complete
from tests.cli.test_tuning import answer, train
from tests.core.model.scaling import Scaling

METHODS.pop(Scaling.method, None)  # known in these tests only
SCALED = ("attention.wk", "attention.wv", "feed_forward.w3")
PART = ("tuning.method=scaling", "checkpoint.trainable_only=true", "optimizer.lr=5e-2")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, Scaling.method, Scaling)


def done(*arguments: object) -> str:
    return complete(*arguments).stdout


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    file = run / (run / "latest").read_text().strip() / "consolidated.00-of-01.model.pth"
    tensors: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["model"]
    return tensors


def test_a_method_of_one_file_trains_saves_resumes_talks_and_merges(trained_once: Path, tmp_path: Path) -> None:
    base, whole, stopped = trained_once / (trained_once / "latest").read_text().strip(), tmp_path / "a", tmp_path / "b"
    done(*train(base, whole), *PART, "train.epochs=1")
    done(*train(base, stopped), *PART, "train.epochs=1", "train.max_steps=2")
    done(*train(base, stopped), *PART, "train.epochs=1", "--resume")
    found = weights_of(whole)
    names = {f"llma.layers.{i}.{name}.scale" for i in (0, 1) for name in SCALED}
    assert found.keys() == names
    assert not any(bool((scale == 1).all()) for scale in found.values())
    assert all(torch.equal(scale, found[name]) for name, scale in weights_of(stopped).items())
    tuned = answer(base, whole)
    assert tuned.strip()
    done("convert-checkpoint", whole, tmp_path / "merged", "--to", "meta", "--base", base, "--merge", "--dtype", "fp32")
    assert answer(tmp_path / "merged") == tuned


def test_its_parameters_are_counted_where_memory_is_predicted() -> None:
    shape = "model.params={dim: 64, n_layers: 2, n_heads: 4, multiple_of: 16, vocab_size: 300, max_seq_len: 512}"
    words = ("benchmark-vram", "--recipe", "alpaca", shape, "model.max_seq_len=512", "--max-tokens", 64, "--json")
    parts = json.loads(done(*words, "--tuning", "scaling"))["training"]["parts"]
    # Keys, values and hidden features of two layers in float32, each in blocks of 512 bytes as a GPU allocates them.
    factors = 2 * sum(512 * -(-4 * size // 512) for size in (64, 64, 176))
    assert parts["trainable masters"] == factors
    assert parts["optimizer"] >= 2 * factors
