"""The settings of LoRA pairs, against PEFT: their factor, which matrices have one, and what is dropped in training."""

import json
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_acc.core.data.batches import draws_of
from llama_acc.core.errors import UserError
from llama_acc.core.model.layers import gated_linear, normed_linears
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.model.tuning import tuning_of
from llama_acc.core.model.tuning.adapter import Adapter
from llama_acc.core.model.tuning.lora import LoRA, LoRABiasNorm
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.step import apply_activation_checkpointing, apply_compile
from tests.core.checkpoint.test_tuned import base_under, made, write_tuned
from tests.core.model.test_tuning import tuned_model
from tests.core.tiny import SMALL, difference, loaded_model
from tests.core.train.documents import adamw, loss_of, random_documents, step

FACTORS = {
    LoRA(4, lora_alpha=6): 1.5,
    LoRA(4, use_rslora=True): 2.0,
    LoRA(4, lora_alpha=1.5, lora_targets=("wv", "wq", "w2"), use_rslora=True): 0.75,
}
DROPPING = LoRA(4, lora_dropout=0.5)
DOCUMENTS, LENGTHS = random_documents(8, SMALL.vocab_size), [7, 1, 20]


@pytest.mark.parametrize("pairs", FACTORS, ids=["alpha", "rslora", "targets"])
def test_twenty_steps_are_those_of_peft(pairs: LoRA, tmp_path: Path) -> None:
    """On an adapter that was exported; tests/core/checkpoint/test_tuned.py has merges, and biases."""
    import transformers
    from peft import PeftModel

    source = write_tuned(tmp_path / "source", pairs)
    hf = made(base_under(source, tmp_path / "base"), tmp_path / "hf", "hf").folder
    adapter = made(source, tmp_path / "adapter", "peft", base=hf).folder
    base = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    theirs: Any = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    read = theirs.peft_config["default"]
    assert (FACTORS[pairs], pairs.lora_alpha or 4, pairs.use_rslora) == (pairs.factor, read.lora_alpha, read.use_rslora)
    assert (read.r, read.lora_dropout, len(read.target_modules)) == (4, pairs.lora_dropout, len(pairs.lora_targets))
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02)
    expected = []
    for _ in range(20):
        loss = sum(_loss(theirs, document) for document in DOCUMENTS.documents) / DOCUMENTS.label_tokens()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item()))
    model = loaded_model(source)
    ours, batches = adamw(model), DOCUMENTS.dealt(5, 3)
    results = [step(model, ours, batches, DOCUMENTS.label_tokens(), 1e-3) for _ in range(20)]
    for result, (wanted_loss, wanted_norm) in zip(results, expected, strict=True):
        assert result.loss.item() == pytest.approx(wanted_loss, rel=1e-4)
        assert result.grad_norm.item() == pytest.approx(wanted_norm, rel=1e-3)
    assert expected[-1][0] < 0.9 * expected[0][0]


def _loss(model: Any, document: dict[str, list[int]]) -> Tensor:
    tokens, labels = (torch.tensor(document[key]) for key in ("tokens", "labels"))
    return F.cross_entropy(model(tokens[None]).logits[0, :-1], labels[1:], reduction="sum")


def test_what_llama2_accessory_has_is_all_that_its_files_say() -> None:
    assert LoRA(4, lora_alpha=4).to_arguments() == {"lora_rank": 4, "bias_tuning": False, "norm_tuning": False}
    said = {"lora_alpha": 8, "lora_targets": ["wq"], "use_rslora": True, "lora_dropout": 0.1}
    arguments = json.loads(json.dumps({**LoRA(4).to_arguments(), **said, "dim": 8}))
    read, rest = tuning_of("llama_peft", arguments)
    assert (read, rest) == (LoRA(4, lora_alpha=8, lora_targets=("wq",), use_rslora=True), {"dim": 8})
    assert isinstance(read, LoRA)
    assert read.lora_dropout == 0.1
    adapter = Adapter(4, 2, 5, lora_targets=("wv", "wq"))
    assert tuning_of("llama_adapter", adapter.to_arguments()) == (adapter, {})
    with pytest.raises(UserError, match=r"LoRA pairs is not usable:\n.*lora_targets.0: should be 'wq', "):
        tuning_of("llama_peft", {**LoRA(4).to_arguments(), "lora_targets": ["wx"]})


def test_what_has_no_pairs_or_no_place_in_peft_is_refused() -> None:
    with pytest.raises(UserError, match=r"tuning\.lora_alpha is about LoRA pairs\nset tuning.lora_rank besides"):
        Adapter(0, 2, 5, lora_alpha=2.0).check({"dim": 8}, 2)
    with pytest.raises(UserError, match="PEFT has no place for biases of matrices without a LoRA pair"):
        LoRABiasNorm(4, lora_targets=("wq",)).peft_config()
    recipe = Recipe.load("alpaca", ["tuning.method=lora", "tuning.lora_targets=[wv, wq]", "tuning.lora_alpha=32"])
    assert (
        recipe.tuning.resolved().to_keys(LoRA())
        == "tuning.method=lora tuning.lora_alpha=32.0 tuning.lora_targets=[wq,wv]"
    )
    assert (
        LoRA().to_keys(recipe.tuning.resolved()).startswith("tuning.method=lora tuning.lora_alpha=null tuning.lora_t")
    )


def test_each_product_of_a_pair_is_without_what_its_mask_drops() -> None:
    """Values and gradients are those that autograd finds by the equation."""
    model: Any = tuned_model(LoRA(4, lora_alpha=2, lora_dropout=0.3))
    model.before_blocks(LENGTHS, [1, 2, 3])
    block = model.layers[0]
    norm, wo, w2 = block.attention_norm, block.attention.wo, block.feed_forward.w2
    projections = (block.attention.wq, block.attention.wk, block.attention.wv)
    x, gate, up = (torch.randn(28, width, requires_grad=True) for width in (SMALL.dim, *[SMALL.hidden_dim] * 2))

    def equation(layer: Any, inputs: Tensor) -> Tensor:
        (dropped,) = layer.masks()
        low = (inputs * ~dropped / 0.7) @ layer.lora_a.weight.T
        return inputs @ layer.weight.T + 0.5 * low @ layer.lora_b.weight.T

    assert all(not torch.equal(wo.masks()[0], layer.masks()[0]) for layer in projections)
    for layers, leaves, found, expected in (
        (
            projections,
            [x],
            torch.cat(normed_linears(x, norm, projections), 1),
            torch.cat([equation(layer, norm(x)) for layer in projections], 1),
        ),
        ([wo], [x], wo(x), equation(wo, x)),
        ([w2], [gate, up], gated_linear(gate * 1, up * 1, w2), equation(w2, F.silu(gate) * up)),
    ):
        assert difference(found, expected) < 1e-4
        of = [*leaves, *(matrix.weight for layer in layers for matrix in (layer.lora_a, layer.lora_b))]
        direction = torch.randn(found.shape)
        gradients = [torch.autograd.grad(y, of, direction) for y in (found, expected)]
        assert all(difference(*pair) < 1e-4 for pair in zip(*gradients, strict=True))


def test_dropout_has_the_mean_and_the_spread_of_peft_s() -> None:
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear

    model: Any = tuned_model(LoRA(4, lora_alpha=2, lora_dropout=0.3))
    wo = model.layers[0].attention.wo
    config, base = LoraConfig(r=4, lora_alpha=2, lora_dropout=0.3), nn.Linear(SMALL.dim, SMALL.dim, bias=False)
    theirs, x, found = Linear(base, "default", config, r=4, lora_alpha=2), torch.randn(28, SMALL.dim), []
    with torch.no_grad():
        for matrix, own in ((base, wo), (theirs.lora_A["default"], wo.lora_a), (theirs.lora_B["default"], wo.lora_b)):
            matrix.weight.copy_(own.weight)
        expected = torch.stack([theirs(x) for _ in range(4000)])
        for seed in range(4000):
            model.before_blocks(LENGTHS, draws_of([3, 4, 5], [1, 1, 1], seed, 1))
            found.append(wo(x))
        model.before_blocks(LENGTHS, [])
        assert difference(torch.stack(found).mean(0), wo(x)) < 0.03
    assert difference(torch.stack(found).mean(0), expected.mean(0)) < 0.03
    assert difference(torch.stack(found).std(0), expected.std(0)) < 0.1


def curve(model: Transformer, *sizes: int, lr: float = 1e-2) -> list[float]:
    """The losses of three epochs of a step, in micro-batches of these sizes, as the trainer gives them."""
    optimizer, items, losses = adamw(model), iter(range(24)), []
    for epoch in range(3):
        batches = [
            replace(batch, draws=draws_of([next(items) % 8 for _ in batch.lengths], batch.example_sizes, 0, epoch))
            for batch in DOCUMENTS.dealt(*sizes)
        ]
        losses.append(step(model, optimizer, batches, DOCUMENTS.label_tokens(), lr).loss.item())
    return losses


@pytest.mark.parametrize("way", ["micro-batches", "recomputed", pytest.param("compiled", marks=pytest.mark.soak)])
def test_what_is_dropped_is_a_function_of_seed_epoch_and_item(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, other = curve(tuned_model(DROPPING), 8), tuned_model(DROPPING)
    if way == "recomputed":
        apply_activation_checkpointing(other)
    if way == "compiled":
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
        apply_compile(other)
    assert curve(other, *((3, 1, 4) if way == "micro-batches" else (8,))) == pytest.approx(expected, rel=1e-5)
    assert curve(tuned_model(LoRA(4)), 8) != pytest.approx(expected, rel=1e-3)
    assert len({*draws_of([3, 4], [1, 1], 0, 1), *draws_of([3], [1], 0, 2), *draws_of([3], [1], 1, 1)}) == 4


def test_nothing_is_dropped_in_validation() -> None:
    dropping, batches, labels = tuned_model(DROPPING), DOCUMENTS.dealt(8), DOCUMENTS.label_tokens()
    curve(dropping, 8, lr=0.0)
    assert loss_of(dropping, batches, labels) == loss_of(tuned_model(LoRA(4)), batches, labels)
