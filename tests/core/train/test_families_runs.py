"""Runs of each family through `finetune`, step by step what a plain loop around transformers' own model does."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.data.dataset import Dataset
from tests.core.model.test_families import FAMILIES, their_model, write_family
from tests.core.train.runs import metrics, plan_of, run

STEPS, WARMUP, CLIP = 20, 2, 0.5
TUNED = ("llama3.2, tied", "qwen3, tied, window on some")
CHOSEN = (*TUNED, "mistral, window", "qwen2", "smollm3", "granite")
SETTINGS = (
    *("model.params=null", "train.epochs=5", "train.warmup_epochs=0.5"),
    *("optimizer.min_lr=0", "optimizer.weight_decay=0.1", f"optimizer.clip_grad_norm={CLIP}"),
)


def words_for(folder: Path, *more: str) -> tuple[str, ...]:
    """Twenty steps of the quickstart from a folder that transformers saved."""
    return (f"model.pretrained={folder}", *SETTINGS, *more)


def padded(data: Dataset, items: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as transformers takes it: tokens, mask and labels, [items, longest]."""
    documents = [data.document(int(item)) for item in items]
    shape = len(documents), max(len(tokens) for tokens, _ in documents)
    tokens, mask, labels = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.full(shape, -100)
    for row, (own, is_label) in enumerate(documents):
        tokens[row, : len(own)] = torch.from_numpy(own)
        mask[row, : len(own)] = 1
        labels[row, : len(own)] = torch.from_numpy(own).long().masked_fill(~torch.from_numpy(is_label), -100)
    return tokens, mask, labels


def plain_loop(model: Any, words: tuple[str, ...], lr: float = 2e-3) -> list[dict[str, float]]:
    """Loss, norm and rate of each step with torch's AdamW and transformers' schedule, on the same examples."""
    from transformers import get_cosine_schedule_with_warmup

    plan = plan_of(*words)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.dim() == 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    curve = []
    for step in range(STEPS):
        tokens, mask, labels = padded(plan.train, plan.items(step))
        logits = model(input_ids=tokens, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        curve.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return curve


def assert_same_curve(output: Path, expected: list[dict[str, float]]) -> None:
    actual = metrics(output)
    assert len(actual) == len(expected) == STEPS
    for key in expected[0]:
        for steps, tolerance in ((3, 1e-5), (STEPS, 2e-4)):  # rounding grows at LoRA's rate
            found, wanted = ([line[key] for line in lines[:steps]] for lines in (actual, expected))
            assert found == pytest.approx(wanted, rel=tolerance), key
    assert actual[-1]["loss"] < 0.9 * actual[0]["loss"]
    assert max(line["grad_norm"] for line in expected) > CLIP


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's model as transformers saves it, with the quickstart's vocabulary."""
    root = tmp_path_factory.mktemp("families")
    made = {name: root / f"{place}" for place, name in enumerate(CHOSEN)}
    for name, folder in made.items():
        write_family(folder, {**FAMILIES[name], "vocab_size": 640, "max_position_embeddings": 256})
    return made


# That their layers compute and learn as transformers' own do: tests/core/model/test_families.py.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] * (name not in TUNED)) for name in CHOSEN]
)
def test_a_run_learns_step_by_step_what_a_plain_loop_of_transformers_does(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    words = words_for(folders[name])
    run(tmp_path, *words)
    assert_same_curve(tmp_path, plain_loop(their_model(folders[name]), words))


@pytest.mark.parametrize("name", TUNED)
def test_a_run_with_lora_learns_step_by_step_what_peft_does(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    words = words_for(folders[name], "tuning.method=lora", "tuning.lora_rank=4", "optimizer.lr=2e-2")
    run(tmp_path / "run", *words)
    # A warm-up's first step has rate 0: what it leaves is what training starts from.
    run(tmp_path / "start", *words, "train.max_steps=2", "checkpoint.every_steps=1", "checkpoint.trainable_only=true")
    convert(Request(tmp_path / "start" / "epoch0-iter1", tmp_path / "adapter", "peft", base=folders[name]))
    theirs = PeftModel.from_pretrained(their_model(folders[name]), str(tmp_path / "adapter"), is_trainable=True)
    assert_same_curve(tmp_path / "run", plain_loop(theirs, words, 2e-2))


def test_two_matrices_that_differ_are_trained_as_two_whatever_the_file_says(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["llama3.2, tied"], tmp_path / "two")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    words = words_for(folder, "train.max_steps=3")
    run(tmp_path / "run", *words)
    expected = plain_loop(their_model(folder), words)
    assert metrics(tmp_path / "run")[2]["loss"] == pytest.approx(expected[2]["loss"], rel=1e-5)
