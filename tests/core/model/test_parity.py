"""The same numbers as Meta's own code (golden values) and as transformers, in every way of computing them."""

import random

import pytest
import torch
from torch import Tensor

from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer
from tests.core.tiny import GOLDEN, cached_logits, difference, document_logits, loaded_model, random_model

TOLERANCE = 1e-5


def random_config(seed: int) -> ModelConfig:
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    return ModelConfig(
        dim=heads * draw.choice([4, 8, 14]),
        n_layers=draw.choice([1, 2, 3]),
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        vocab_size=draw.choice([97, 128]),
        multiple_of=draw.choice([1, 16, 64]),
        ffn_dim_multiplier=draw.choice([None, 1.0, 1.3]),
        norm_eps=draw.choice([1e-5, 1e-6]),
        rope_theta=draw.choice([10000.0, 1e6]),
        max_seq_len=64,
        rope_scaling=draw.choice([None, 0.25, 0.5]),
    )


def random_documents(config: ModelConfig, lengths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(config.vocab_size, (length,), generator=generator) for length in lengths]


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from interleaved pairs, as Meta's code rotates, to halves, as transformers does."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def transformers_logits(model: Transformer, tokens: Tensor) -> Tensor:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "linear", "factor": 1 / config.rope_scaling}
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    names = {
        "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
        "norm": "model.norm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for name, parameter in model.state_dict().items():
        prefix, _, inner = name.removesuffix(".weight").rpartition(".") if "layers" not in name else ("", "", "")
        if name.startswith("layers."):
            _, layer, inner = name.removesuffix(".weight").split(".", 2)
            prefix = f"model.layers.{layer}."
        heads = {"attention.wq": config.n_heads, "attention.wk": config.kv_heads}.get(inner)
        state[f"{prefix}{names[inner]}.weight"] = parameter if heads is None else halves(parameter, heads)
    theirs.load_state_dict(state)
    with torch.no_grad():
        return theirs.eval()(tokens.unsqueeze(0)).logits[0]


def ways(length: int) -> dict[str, list[int]]:
    """How a document may be fed to a cache: in chunks of these sizes."""
    return {
        "at once": [length],
        "prefill, then one by one": [length // 2] + [1] * (length - length // 2),
        "one by one": [1] * length,
        "in chunks": [3, 1, 7, length - 11],
    }


@pytest.mark.parametrize("name", ["llama", "peft_normbias", "adapter"])
def test_logits_are_those_of_metas_and_llama2_accessorys_code(name: str) -> None:
    model = loaded_model(GOLDEN / name)
    golden = torch.load(GOLDEN / name / "golden.pt", weights_only=True)
    if name != "llama":
        names = sorted(f"llma.{name}" for name, parameter in model.named_parameters() if parameter.requires_grad)
        assert names == golden["trainable"]
    packed = document_logits(model, list(golden["tokens"]))
    for tokens, logits, in_stream in zip(golden["tokens"], golden["logits"], packed, strict=True):
        assert difference(in_stream, logits) < TOLERANCE
        assert difference(document_logits(model, [tokens])[0], logits) < TOLERANCE
        for way, chunks in ways(len(tokens)).items():
            assert difference(cached_logits(model, tokens, chunks), logits) < TOLERANCE, way


@pytest.mark.parametrize("seed", range(8))
def test_logits_are_those_of_transformers_uncached_cached_and_in_a_stream(seed: int) -> None:
    config = random_config(seed)
    model = random_model(config, seed)
    before, document, after = random_documents(config, [5, 33, 18], seed)
    expected = transformers_logits(model, document)
    assert difference(document_logits(model, [document])[0], expected) < TOLERANCE
    assert difference(document_logits(model, [before, document, after])[1], expected) < TOLERANCE
    for way, chunks in ways(len(document)).items():
        assert difference(cached_logits(model, document, chunks), expected) < TOLERANCE, way


def test_the_random_shapes_cover_what_a_params_file_can_say() -> None:
    configs = [random_config(seed) for seed in range(8)]
    assert {config.kv_heads == config.n_heads for config in configs} == {True, False}
    assert {config.ffn_dim_multiplier is None for config in configs} == {True, False}
    assert {config.rope_theta for config in configs} == {1e4, 1e6}
    assert {config.rope_scaling is None for config in configs} == {True, False}


def test_bf16_logits_are_near_those_of_float32() -> None:
    exact, rounded = random_model(), random_model(dtype=torch.bfloat16)
    document = random_documents(exact.config, [40], 1)
    assert difference(document_logits(rounded, document)[0], document_logits(exact, document)[0]) < 0.03


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been_fed() -> None:
    from llama_acc.core.model.attention import KVCache

    model = random_model()
    kept, forgotten, other = random_documents(model.config, [10, 20, 6], 2)
    cache = KVCache(model.config.n_layers)
    with torch.no_grad():
        model(torch.cat([kept, forgotten]), torch.arange(30), [30], caches=[cache])
        cache.truncate(10)
        assert cache.length == 10
        logits = model.logits(model(other, torch.arange(10, 16), [6], caches=[cache]))
    assert difference(logits, document_logits(model, [torch.cat([kept, other])])[0][10:]) < TOLERANCE


def test_a_cache_grows_past_its_first_room_without_changing_the_past() -> None:
    model = random_model()
    (document,) = random_documents(model.config, [300], 3)
    (expected,) = document_logits(model, [document])
    assert difference(cached_logits(model, document, [250] + [1] * 10 + [40]), expected) < TOLERANCE


def test_later_tokens_and_other_documents_never_change_a_prediction() -> None:
    model = random_model()
    first, second, changed = random_documents(model.config, [12, 9, 9], 4)
    both = document_logits(model, [first, second])
    assert difference(document_logits(model, [first, changed])[0], both[0]) < TOLERANCE
    assert difference(document_logits(model, [changed, second])[1], both[1]) < TOLERANCE
    prefix = document_logits(model, [first[:7]])[0]
    assert difference(both[0][:7], prefix) < TOLERANCE
