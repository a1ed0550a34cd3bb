from dataclasses import replace

import pytest
import torch

from llama_acc.core.errors import UserError
from llama_acc.core.model.config import config_from_params
from llama_acc.core.model.sharding import split_dimension
from llama_acc.core.model.transformer import Transformer, build_on_meta, initialise
from llama_acc.core.model.tuning import METHODS, Tuning, check_tuning, tuning_of
from tests.core.tiny import SMALL, cached_logits, difference, document_logits, random_model

TUNED = [name for name in METHODS if name != "full"]


def tuning(method: str) -> Tuning:
    return Tuning(method, 4 if METHODS[method].lora else 0)


def tuned_model(method: str) -> Transformer:
    """A random model in which everything the method adds says something."""
    model = random_model(replace(SMALL, tuning=tuning(method)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("method", TUNED)
def test_what_a_method_adds_is_what_the_shape_says(method: str) -> None:
    config = replace(SMALL, tuning=tuning(method))
    model = build_on_meta(config, torch.float32)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == config.parameter_shapes()
    assert config.base() == SMALL


@pytest.mark.parametrize("method", TUNED)
def test_at_the_start_nothing_changes(method: str) -> None:
    tokens = torch.arange(20)
    plain, tuned = (
        build_on_meta(SMALL, torch.float32),
        build_on_meta(replace(SMALL, tuning=tuning(method)), torch.float32),
    )
    for model in (plain, tuned):
        model.to_empty(device="cpu")
        initialise(model, 3)
    assert torch.equal(document_logits(plain, [tokens])[0], document_logits(tuned, [tokens])[0])


def merged(tuned: Transformer) -> Transformer:
    """The plain model that a LoRA model computes."""
    model = random_model()
    matrices, named = dict(model.named_parameters()), dict(tuned.named_parameters())
    with torch.no_grad():
        for name in [name for name in named if name.endswith(".lora_a.weight")]:
            matrix = name.removesuffix(".lora_a.weight")
            product = named[f"{matrix}.lora_b.weight"] @ named[name]
            matrices[f"{matrix}.weight"].copy_(named[f"{matrix}.weight"] + product)
    return model


def test_lora_is_the_sum_of_the_matrix_and_the_product_of_the_pair() -> None:
    tuned, tokens = tuned_model("lora"), torch.arange(24)
    expected = document_logits(merged(tuned), [tokens])[0]
    assert difference(document_logits(tuned, [tokens])[0], expected) < 1e-5
    assert difference(cached_logits(tuned, tokens, [10, *[1] * 14]), expected) < 1e-5


def test_the_gradients_of_a_pair_follow_from_that_of_the_merged_matrix() -> None:
    tuned, tokens = tuned_model("lora"), torch.arange(24)
    whole = merged(tuned)
    for model in (tuned, whole):
        model(tokens, tokens, [24], tokens.roll(-1)).backward()
    named, matrices = dict(tuned.named_parameters()), dict(whole.named_parameters())
    pairs = [name.removesuffix(".lora_a.weight") for name in named if name.endswith(".lora_a.weight")]
    assert len(pairs) == 7 * SMALL.n_layers
    for name in pairs:
        first, second = named[f"{name}.lora_a.weight"], named[f"{name}.lora_b.weight"]
        gradient = matrices[f"{name}.weight"].grad
        assert gradient is not None
        assert first.grad is not None
        assert second.grad is not None
        assert difference(first.grad, second.T @ gradient) < 1e-4, name
        assert difference(second.grad, gradient @ first.T) < 1e-4, name


@pytest.mark.parametrize("method", TUNED)
def test_with_and_without_gradients_the_loss_is_the_same(method: str) -> None:
    model, tokens = tuned_model(method), torch.arange(24)
    where = (tokens, tokens, [24], tokens.roll(-1))
    with torch.no_grad():
        expected = model(*where).item()
    assert model(*where).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "dimension"),
    [
        ("layers.0.attention.wq.bias", 0),
        ("layers.0.feed_forward.w2.bias", None),
        ("layers.0.attention.wk.lora_a.weight", None),
        ("layers.0.attention.wk.lora_b.weight", 0),
        ("layers.0.attention.wo.lora_a.weight", 1),
        ("layers.0.attention.wo.lora_b.weight", None),
        ("exp_avg.layers.0.feed_forward.w1.lora_b.weight", 0),
    ],
)
def test_what_is_added_is_split_with_its_matrix(name: str, dimension: int | None) -> None:
    assert split_dimension(name) == dimension


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_s_files_say_the_method(method: str) -> None:
    mine = tuning(method)
    config = replace(SMALL, tuning=mine)
    read, shape = tuning_of(mine.llama_type, config.to_params())
    assert read == mine
    assert config_from_params(shape) == SMALL


def test_llama2_accessory_s_files_without_arguments_are_bias_norm() -> None:
    assert tuning_of("llama_peft", {"dim": 8}) == (Tuning("bias_norm"), {"dim": 8})
    assert tuning_of("llama_peft", {"lora_rank": 16}) == (Tuning("lora_bias_norm", 16), {})


def test_what_no_method_is_is_refused() -> None:
    with pytest.raises(UserError, match="it is a checkpoint of kind 'llama_ens'"):
        tuning_of("llama_ens", {})
    with pytest.raises(UserError, match="no tuning method has"):
        tuning_of("llama_peft", {"norm_tuning": False})
    with pytest.raises(UserError, match=r"tuning.lora_rank \(65\) is larger than the keys' width \(64\)"):
        check_tuning(Tuning("lora", 65), {"dim": 128, "the keys' width": 64})
