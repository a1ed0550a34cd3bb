"""The same numbers as Meta's own code (golden values) and as transformers, in every way of computing them."""

import random

import pytest
import torch
from torch import Tensor

from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import ModelConfig
from tests.core.model.test_vision_parity import huggingface_llama
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


# Their shapes have all that a params file can say, and its absence.
@pytest.mark.parametrize("seed", [1, 2, 4, 6])
def test_logits_are_those_of_transformers_uncached_cached_and_in_a_stream(seed: int) -> None:
    config = random_config(seed)
    model = random_model(config, seed)
    before, document, after = random_documents(config, [5, 33, 18], seed)
    with torch.no_grad():
        expected = huggingface_llama(model)(document.unsqueeze(0)).logits[0]
    assert difference(document_logits(model, [document])[0], expected) < TOLERANCE
    assert difference(document_logits(model, [before, document, after])[1], expected) < TOLERANCE
    for way, chunks in ways(len(document)).items():
        assert difference(cached_logits(model, document, chunks), expected) < TOLERANCE, way


def test_a_cache_grows_past_its_first_room_and_a_truncated_one_goes_on_as_if_the_rest_had_never_been_fed() -> None:
    model = random_model()
    (document,) = random_documents(model.config, [300], 3)
    (expected,) = document_logits(model, [document])
    assert difference(cached_logits(model, document, [250] + [1] * 10 + [40]), expected) < TOLERANCE
    kept, forgotten, other = random_documents(model.config, [10, 20, 6], 2)
    cache = KVCache(model.config.n_layers)
    with torch.no_grad():
        model(torch.cat([kept, forgotten]), torch.arange(30), [30], caches=[cache])
        cache.truncate(10)
        assert cache.length == 10
        logits = model.logits(model(other, torch.arange(10, 16), [6], caches=[cache]))
    assert difference(logits, document_logits(model, [torch.cat([kept, other])])[0][10:]) < TOLERANCE
