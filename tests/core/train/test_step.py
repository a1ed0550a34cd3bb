import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partialmethod
from queue import SimpleQueue

import pytest
import torch
import torch.nn.functional as F

from llama_acc.core.model.copies import ComputeCopies
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.model.tuning import METHODS
from llama_acc.core.train.optimizer import learning_rate
from llama_acc.core.train.step import StepResult, apply_compile, packed_ahead
from tests.core.tiny import CPU, GOLDEN, SMALL, document_logits, loaded_model, random_model
from tests.core.train.documents import Labelled, adamw, loss_of, random_documents, step, weights_of

DOCUMENTS = random_documents(8, SMALL.vocab_size)


def steps(model: Transformer, sizes: Sequence[int], count: int = 1, lr: float = 1e-2) -> list[StepResult]:
    optimizer = adamw(model)
    labels = DOCUMENTS.label_tokens()
    return [step(model, optimizer, DOCUMENTS.dealt(*sizes), labels, lr) for _ in range(count)]


@pytest.mark.parametrize("name", ["llama", "peft_normbias", "adapter"])
def test_the_golden_training_curve_is_reproduced(name: str) -> None:
    golden = json.loads((GOLDEN / name / "training.json").read_text())
    model = loaded_model(GOLDEN / name)
    settings = {key: golden[key] for key in ("weight_decay", "clip_grad_norm")}
    optimizer = adamw(model, betas=tuple(golden["betas"]), **settings)
    batches = [Labelled(documents) for documents in golden["batches"]]
    assert len(golden["log"]) == len(batches) * golden["epochs"] == 16
    for line in golden["log"]:
        done = line["step"] - 1
        schedule = {key: golden[key] for key in ("epochs", "warmup_epochs", "lr", "min_lr")}
        lr = learning_rate(done / len(batches), **schedule)
        assert lr == pytest.approx(line["lr"], rel=1e-9)
        batch = batches[done % len(batches)]
        assert batch.label_tokens() == line["label_tokens"]
        result = step(model, optimizer, batch.dealt(2, 2), line["label_tokens"], lr)
        assert result.loss.item() == pytest.approx(line["loss"], rel=1e-4)
        assert result.grad_norm.item() == pytest.approx(line["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("sizes", [[8], [1] * 8, [4, 4], [3, 3, 2]], ids=str)
def test_the_loss_is_the_mean_over_the_label_tokens_however_documents_are_dealt(sizes: list[int]) -> None:
    model, whole = random_model(), random_model()
    documents = [torch.tensor(document["tokens"]) for document in DOCUMENTS.documents]
    total = 0.0
    for document, logits in zip(DOCUMENTS.documents, document_logits(model, documents), strict=True):
        total += F.cross_entropy(logits[:-1], torch.tensor(document["labels"][1:]), reduction="sum").item()
    expected, before = total / DOCUMENTS.label_tokens(), weights_of(model)
    assert loss_of(model, DOCUMENTS.dealt(*sizes), DOCUMENTS.label_tokens()) == pytest.approx(expected, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters()), "evaluating trains nothing"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    (result,), (at_once,) = steps(model, sizes), steps(whole, [8])
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert result.grad_norm.item() == pytest.approx(at_once.grad_norm.item(), rel=1e-6)


@pytest.mark.parametrize("method", ["full", "lora", "lora_bias_norm", "adapter"])
def test_copies_that_are_made_once_a_step_change_nothing(method: str) -> None:
    tuned = replace(SMALL, tuning=METHODS[method]().with_num_layers(2))
    plain, copied = (random_model(tuned, dtype=torch.bfloat16) for _ in range(2))
    labels = DOCUMENTS.label_tokens()
    trained = {name: parameter for name, parameter in copied.named_parameters() if parameter.requires_grad}
    copies = ComputeCopies(trained, torch.bfloat16)
    optimizers = adamw(plain), adamw(copied, copies=copies)
    for _ in range(3):
        results = [
            step(model, optimizer, DOCUMENTS.dealt(5, 3), labels, 1e-2)
            for model, optimizer in zip((plain, copied), optimizers, strict=True)
        ]
        assert torch.equal(results[0].loss, results[1].loss)
    assert all(torch.equal(copy, trained[name].to(torch.bfloat16)) for name, copy in copies.tensors.items())
    assert all(torch.equal(parameter, copied.get_parameter(name)) for name, parameter in plain.named_parameters())


@pytest.mark.parametrize("sizes", [[8], [1] * 8, [3, 3, 2]], ids=str)
def test_a_weighted_loss_is_divided_by_the_sum_of_weights_however_documents_are_dealt(sizes: list[int]) -> None:
    weights = [1.0, 0.5, 0.25, 1.0, 0.1, 0.75, 1.0, 0.5]
    weighted, model = Labelled(DOCUMENTS.documents, weights), random_model()
    documents = [torch.tensor(document["tokens"]) for document in weighted.documents]
    total = whole = 0.0
    for document, logits, weight in zip(weighted.documents, document_logits(model, documents), weights, strict=True):
        labels = torch.tensor(document["labels"][1:])
        total += weight * F.cross_entropy(logits[:-1], labels, reduction="sum").item()
        whole += weight * int((labels != -100).sum())
    result, at_once = (
        step(model, adamw(model), weighted.dealt(*dealt), whole, 1e-2)
        for model, dealt in ((model, sizes), (random_model(), [8]))
    )
    assert result.loss.item() == pytest.approx(total / whole, rel=1e-6)
    assert result.grad_norm.item() == pytest.approx(at_once.grad_norm.item(), rel=1e-6)
    halved = Labelled(DOCUMENTS.documents, [0.5] * 8)
    assert loss_of(random_model(), halved.dealt(*sizes), DOCUMENTS.label_tokens() / 2) == pytest.approx(
        loss_of(random_model(), DOCUMENTS.dealt(*sizes), DOCUMENTS.label_tokens()), rel=1e-6
    )


def test_a_thread_makes_the_next_micro_batch_while_one_is_computed() -> None:
    batches, made_by = DOCUMENTS.dealt(5, 3), SimpleQueue[int]()
    ahead = packed_ahead((made_by.put(threading.get_ident()) or batch for batch in batches), CPU)
    first = next(ahead)
    assert made_by.get() == made_by.get(timeout=60) != threading.get_ident(), "it makes the second one by itself"
    results = [first, *ahead]
    assert all(batch.packed is not None for batch in results)
    assert loss_of(random_model(), results, 1) == loss_of(random_model(), batches, 1)


HAS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize(
    ("backend", "sizes"),
    [("aot_eager", [8]), pytest.param("inductor", [5, 3], marks=[pytest.mark.soak, HAS_COMPILER])],
)
def test_compiled_blocks_give_the_same_loss(backend: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the graphs of torch.compile; inductor, which is the default, makes C++ of them, and that takes 20 s."""
    config = replace(SMALL, n_layers=1)
    plain, compiled = random_model(config), random_model(config)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    apply_compile(compiled)
    for expected, actual in zip(steps(plain, sizes, 2), steps(compiled, sizes, 2), strict=True):
        assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert actual.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-4)


def test_bf16_computes_near_float32_and_trains_float32_masters() -> None:
    exact, rounded = random_model(), random_model(dtype=torch.bfloat16)
    before = weights_of(rounded)
    expected, actual = steps(exact, [8], 3), steps(rounded, [8], 3)
    for e, a in zip(expected, actual, strict=True):
        assert a.loss.dtype == a.grad_norm.dtype == torch.float32
        assert a.loss.item() == pytest.approx(e.loss.item(), rel=0.02)
    assert actual[-1].loss < actual[0].loss
    for name, parameter in rounded.named_parameters():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, before[name])
        assert not torch.equal(parameter, parameter.bfloat16().float()), f"{name} was rounded"
