from dataclasses import replace

import pytest
import torch

from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig, config_from_params
from llama_acc.core.model.transformer import (
    Transformer,
    build_on_meta,
    freeze_untrained,
    initialize,
    shapes_of,
)
from llama_acc.core.model.tuning import FULL, METHODS, Tuning, tuning_of
from llama_acc.core.model.tuning.adapter import Adapter
from llama_acc.core.model.tuning.bias_norm import BiasNorm
from llama_acc.core.model.tuning.lora import LoRA, LoRABiasNorm
from tests.core.tiny import SMALL, cached_logits, difference, document_logits, random_model

TUNINGS = {
    "bias_norm": BiasNorm(),
    "lora": LoRA(4),
    "lora_bias_norm": LoRABiasNorm(4),
    "adapter": Adapter(0, 2, 5),
    "adapter with LoRA and a new gate": Adapter(4, SMALL.n_layers, 5, True),
}
TUNED = list(TUNINGS)


def tuned_model(tuning: Tuning, config: ModelConfig = SMALL) -> Transformer:
    """A random model in which everything the method adds says something."""
    model = random_model(replace(config, tuning=tuning))
    generator = torch.Generator().manual_seed(1)
    added = shapes_of(config).keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in added and name != "prefix":
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("method", TUNED)
def test_what_a_method_adds_is_described_and_changes_nothing_at_the_start(method: str) -> None:
    config, tokens = replace(SMALL, tuning=TUNINGS[method]), torch.arange(20)
    plain, tuned = build_on_meta(SMALL, torch.float32), build_on_meta(config, torch.float32)
    assert config.base() == SMALL
    for model in (plain, tuned):
        model.to_empty(device="cpu")
        initialize(model, 3)
    assert torch.equal(document_logits(plain, [tokens])[0], document_logits(tuned, [tokens])[0])


@pytest.mark.parametrize("mine", [FULL, *TUNINGS.values()], ids=["full", *TUNINGS])
def test_a_checkpoint_s_files_say_the_method(mine: Tuning) -> None:
    # "frozen" adds and trains nothing; tests/core/model/test_vision.py has it.
    assert {"full", "frozen", *(tuning.method for tuning in TUNINGS.values())} == set(METHODS)
    config = replace(SMALL, tuning=mine)
    read, shape = tuning_of(mine.llama_type, config.to_params())
    assert read == mine
    assert config_from_params(shape) == SMALL


def test_what_llama2_accessory_s_files_do_not_say_has_its_defaults() -> None:
    assert tuning_of("llama_peft", {"dim": 8}) == (BiasNorm(), {"dim": 8})
    assert tuning_of("llama_peft", {"lora_rank": 16}) == (LoRABiasNorm(16), {})
    assert tuning_of("llama_peft", {"bias_tuning": False, "norm_tuning": False}) == (FULL, {})
    assert tuning_of("llama_adapter", {})[0].with_num_layers(32) == Adapter(0, 32, 30)
    assert tuning_of("llama_adapter", {"prefix_layers": 3})[0].with_num_layers(32) == Adapter(0, 3, 30)
    assert TUNINGS["lora"].with_num_layers(32) == TUNINGS["lora"]


@pytest.mark.parametrize("method", ["adapter", "adapter with LoRA and a new gate"])
def test_grouped_queries_share_the_prefix_s_keys_and_values(method: str) -> None:
    """As the model with a copy of them for each query head."""
    grouped = tuned_model(TUNINGS[method])
    groups = SMALL.n_heads // SMALL.kv_heads
    assert groups > 1
    plain = random_model(replace(SMALL, n_kv_heads=None, tuning=TUNINGS[method]))
    repeated = (".wk.weight", ".wv.weight", ".wk.lora_b.weight", ".wv.lora_b.weight")
    with torch.no_grad():
        for (name, target), (_, source) in zip(plain.named_parameters(), grouped.named_parameters(), strict=True):
            if name.endswith(repeated):
                source = source.unflatten(0, (SMALL.kv_heads, -1)).repeat_interleave(groups, 0).flatten(0, 1)
            target.copy_(source)
    tokens = torch.arange(24)
    expected = document_logits(plain, [tokens])[0]
    assert difference(document_logits(grouped, [tokens])[0], expected) < 1e-5
    assert difference(cached_logits(grouped, tokens, [10, *[1] * 14]), expected) < 1e-5


def test_what_no_method_is_is_refused() -> None:
    with pytest.raises(UserError, match="it is a checkpoint of kind 'llama_ens'"):
        tuning_of("llama_ens", {})
    with pytest.raises(UserError, match="no tuning method has"):
        tuning_of("llama_peft", {"norm_tuning": False})


def kept_bytes(model: Transformer, tokens: torch.Tensor) -> int:
    """Bytes of the activations that a forward pass leaves for the backward pass, each storage once."""
    freeze_untrained(model)
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, tokens, [len(tokens)], tokens.roll(-1))
    assert loss.requires_grad
    return sum(kept.values())


def test_lora_keeps_nothing_that_full_training_does_not_but_its_low_products() -> None:
    tokens = torch.arange(40)
    full = kept_bytes(random_model(), tokens)
    head = 4 * SMALL.dim * SMALL.vocab_size  # the gradient of the output matrix, which is made at once
    for method in ("bias_norm", "lora"):
        tuning = TUNINGS[method]
        low = 4 * len(tokens) * getattr(tuning, "lora_rank", 0) * 7 * SMALL.n_layers
        assert kept_bytes(tuned_model(tuning), tokens) <= full - head + low, method
