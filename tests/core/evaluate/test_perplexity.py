"""Perplexity is that of the labelled tokens, by the model and the prompt format of the checkpoint."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from llama_acc.core.data.batches import build
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.evaluate.perplexity import Perplexity, measure, read_data
from llama_acc.core.generate.load import LoadedModel, load_model
from tests.core.tiny import document_logits
from tests.core.train.runs import metrics, run

ITEMS = [
    {"instruction": f"Name the number {i}.", "input": "in words" * (i % 2), "output": f"It is {i}, " * (i + 1)}
    for i in range(7)
]


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held-out.json"
    path.write_text(json.dumps(ITEMS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in float32 that was validated on the data."""
    output = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ACC_HOME", str(tmp_path_factory.mktemp("home")))
        run(output, f"data.validation.path={data}", "data.max_tokens=120", "train.precision=fp32", "train.batch_size=3")
    return output


@pytest.fixture(scope="module")
def loaded(trained: Path) -> LoadedModel:
    return load_model(trained, device="cpu")


def measured(model: LoadedModel, data: Path, max_tokens: int | None = None, batch_size: int = 8) -> Perplexity:
    return measure(model, read_data(model, [str(data)], max_tokens, quiet), batch_size, quiet)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_loss_is_the_validation_loss_of_the_run(
    batch_size: int, trained: Path, loaded: LoadedModel, data: Path
) -> None:
    expected = [line["validation_loss"] for line in metrics(trained) if "validation_loss" in line][-1]
    found = measured(loaded, data, 120, batch_size)
    assert found.loss == pytest.approx(expected, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_it_is_the_mean_over_the_labelled_tokens(loaded: LoadedModel, data: Path) -> None:
    items = read_data(loaded, [str(data)], None, quiet)
    losses = []
    for number in range(len(items)):
        batch = build(items, [number])
        (logits,) = document_logits(loaded.model, [torch.from_numpy(batch.tokens)])
        losses.append(
            torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(batch.targets), ignore_index=-100, reduction="sum"
            )
        )
    found = measured(loaded, data)
    assert found.loss == pytest.approx(float(sum(losses)) / found.label_tokens, abs=1e-5)


def test_a_format_that_cannot_say_what_is_predicted_is_refused(trained: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained / (trained / "latest").read_text().strip(), folder)
    (folder / "manifest.json").unlink()
    settings = json.loads((folder / "template.json").read_text())
    (folder / "template.json").write_text(json.dumps({**settings, "prompt": "Q: {instruction}\nA:"}))
    with pytest.raises(UserError, match=r"max-tokens \(257\) is more than the model's context \(256\)"):
        read_data(load_model(folder, device="cpu", template="alpaca"), [str(data)], 257, quiet)
    with pytest.raises(UserError, match="'alpaca' is not one that comes with llama-acc"):
        read_data(load_model(folder, device="cpu"), [str(data)], None, quiet)
    (folder / "template.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="it ends a reply with no special token") as error:
        read_data(load_model(folder, device="cpu"), [str(data)], None, quiet)
    assert "--template" in str(error.value.hint)
    assert len(read_data(load_model(folder, device="cpu", template="alpaca"), [str(data)], None, quiet)) == 7


def test_a_model_that_is_broken_has_no_perplexity(trained: Path, data: Path) -> None:
    broken = load_model(trained, device="cpu")
    broken.model.norm.weight = torch.nn.Parameter(torch.full_like(broken.model.norm.weight, torch.nan), False)
    with pytest.raises(RunError, match="the loss over the data is nan"):
        measured(broken, data)
