"""One token at a time on a CPU: logits are those of the model's own passes, whatever its family and its matrices."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from llama_acc.core.checkpoint.load import Weights, fill
from llama_acc.core.generate.decode_cpu import DecodeOnCPU
from llama_acc.core.generate.decode_graph import DecodeGraph
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.transformer import Transformer, build_on_meta, fuse_quantized, pack_small, quantize_on_meta
from llama_acc.core.model.tuning.lora import LoRA
from tests.core.tiny import CPU, SMALL, difference, document_logits, random_model

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwen": {"qkv_bias": True, "qk_norm": True, "sliding_window": 7, "window_layers": (1,)},
    "granite": {
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
    },
    "smollm3": {"nope_layers": (0,), "tie_word_embeddings": True},
    "LoRA": {"tuning": LoRA(4)},
}


def one_by_one(model: Transformer, tokens: torch.Tensor, begun: int = 3) -> torch.Tensor:
    """Logits of a document whose first tokens are fed together, in the second slot of a cache."""
    assert DecodeGraph.takes_step_of(model)
    cache, decode = KVCache(model.config.n_layers).beside(1), DecodeOnCPU(model)
    cache.layers = KVCache(model.config.n_layers).layers
    with torch.inference_mode():
        first = model.logits(model(tokens[:begun], torch.arange(begun), [begun], caches=[cache]))
        rest = [decode([int(token)], [cache])[0] for token in tokens[begun:]]
    assert cache.length == len(tokens)
    return torch.cat([first, *rest])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("packs", [False, True])
def test_logits_are_those_of_a_whole_document(name: str, packs: bool) -> None:
    model = random_model(replace(SMALL, **VARIANTS[name], max_seq_len=512), seed=3).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.01)  # biases and B of LoRA's pairs are 0 at the start
    if packs:
        pack_small(model)
    tokens = torch.arange(270) * 7 % SMALL.vocab_size  # the cache grows after 256
    with torch.inference_mode():
        assert difference(one_by_one(model, tokens), document_logits(model, [tokens])[0]) < 2e-6


@pytest.mark.parametrize("quantized", [False, True])
def test_in_bfloat16_logits_are_those_of_the_models_own_steps_up_to_its_rounding(quantized: bool) -> None:
    model = build_on_meta(replace(SMALL, dim=128, multiple_of=64), torch.bfloat16).requires_grad_(False)
    if quantized:
        quantize_on_meta(model)
    fill(model, Weights.of(dict(random_model(model.config).named_parameters())), CPU, torch.bfloat16, copy=False)
    fuse_quantized(model, 1 << 40)
    tokens = torch.arange(40)
    with torch.inference_mode():
        assert difference(one_by_one(model, tokens), document_logits(model, [tokens])[0]) < 3e-2
