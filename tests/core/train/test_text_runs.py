"""Continued pretraining: a run on plain text is one run, however it is split, stopped and measured."""

import json
import math
from pathlib import Path

import pytest

from llama_acc.core.evaluate.perplexity import measure, read_data
from llama_acc.core.generate.chat import Conversation
from llama_acc.core.generate.load import load_model
from llama_acc.core.generate.sampling import Sampling
from tests.core.train.runs import assert_same_run, metrics, plan_of, run

WORDS = ("the answer", "once upon a time", "is in the question", "a town", "what is 10 + 32?", "it is 42")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    documents = [" ".join(WORDS[(i + j * (i % 5 + 1)) % 6] for j in range(1 + i * 7 % 31)) for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def on(corpus: Path, *overrides: str) -> tuple[str, ...]:
    source = (f"data.sources.0.path={corpus}", "data.sources.0.format=text", "data.max_tokens=64")
    return (*source, "train.global_batch_size=6", "train.batch_size=6", "train.max_steps=5", *overrides)


def test_a_step_has_as_many_tokens_however_long_the_documents_are(corpus: Path) -> None:
    plan = plan_of(*on(corpus))
    lengths = plan.train.lengths.tolist()
    assert sorted(set(lengths[:-1])) == [64]
    [file] = plan.report["files"]
    assert (file["documents"], file["items"], plan.report["truncated"]) == (60, len(lengths), 0)
    assert plan.largest_micro_batch(1)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_batches_are_accumulated_and_assigned_as_those_of_items_are(corpus: Path, method: str, tmp_path: Path) -> None:
    settings = [f"tuning.method={method}", "data.validation.fraction=0.2"]
    if method == "lora":
        settings += ["tuning.lora_dropout=0.3", "tuning.lora_rank=4", "optimizer.lr=2e-2"]
    expected = metrics(run(tmp_path / "whole", *on(corpus, *settings)).output)
    found = metrics(run(tmp_path / "parts", *on(corpus, *settings, "train.batch_size=1")).output)
    assert len(expected) == len(found) > 5
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        assert all(math.isclose(one[key], other[key], rel_tol=1e-4) for key in one)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(corpus: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *on(corpus)).output
    run(tmp_path / "run", *on(corpus, "train.max_steps=2"))
    resumed = run(tmp_path / "run", *on(corpus), resume=True).output
    assert_same_run(resumed, whole, (whole / "latest").read_text().strip())


def test_perplexity_is_the_validation_loss_and_chat_continues_the_text(corpus: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("once upon a time there was an answer. " * 40)
    output = run(tmp_path / "run", *on(corpus, f"data.validation.path={held_out}")).output
    loaded = load_model(output, device="cpu")
    found = measure(loaded, read_data(loaded, [str(held_out)], 64, lambda *_: None), 2, lambda *_: None)
    validation = [line["validation_loss"] for line in metrics(output) if "validation_loss" in line][-1]
    assert found.loss == pytest.approx(validation, abs=1e-5)
    assert found.tokens - found.label_tokens == found.items == -(-found.tokens // 64)
    assert (loaded.template.name, loaded.template_from) == ("none", "none, from template.json")
    prompt = loaded.template.render_prompt([]).text
    assert prompt == ""
    asked = Conversation(loaded, Sampling(temperature=0, max_new_tokens=3))
    assert isinstance("".join(asked.ask("once upon a")), str)
