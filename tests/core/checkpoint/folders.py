"""Checkpoint folders of every layout, written with plain torch, safetensors and transformers: nothing of ours. And what
is read of them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.load import Weights, read_weights
from llama_acc.core.model.config import ModelConfig
from tests.core.tiny import random_model

# Grouped-query attention that goes into eight ranks.
GROUPED = ModelConfig(dim=64, n_layers=2, n_heads=16, n_kv_heads=8, vocab_size=304, multiple_of=32, max_seq_len=128)
ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
COLUMNS = ("wo", "w2", "tok_embeddings")


def state(config: ModelConfig = GROUPED, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights by Meta's names."""
    return {name: tensor.to(dtype) for name, tensor in random_model(config, seed).state_dict().items()}


def shard(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """One rank's tensors, by the rule LLaMA2-Accessory's files follow."""
    found = {}
    for name, tensor in tensors.items():
        leaf = name.split(".")[-2]
        if leaf in ROWS or leaf in COLUMNS:
            tensor = tensor.chunk(size, 0 if leaf in ROWS else 1)[rank].clone()
        found[name] = tensor
    return found


def write_meta(folder: Path, tensors: Mapping[str, Tensor], size: int = 1, config: ModelConfig = GROUPED) -> Path:
    """Meta's layout, with a vocabulary size of -1 as Meta writes it."""
    folder.mkdir(parents=True)
    for rank in range(size):
        torch.save(shard(tensors, rank, size), folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(replace(config, vocab_size=-1).to_params()))
    return folder


def write_consolidated(
    folder: Path,
    tensors: Mapping[str, Tensor],
    size: int = 1,
    config: ModelConfig | None = GROUPED,
    kind: str = "model",
) -> Path:
    """The layout of LLaMA2-Accessory; `kind` "model-diff" makes a diff."""
    folder.mkdir(parents=True)
    for rank in range(size):
        named = {f"llma.{name}": tensor for name, tensor in shard(tensors, rank, size).items()}
        torch.save({"model": named}, folder / f"consolidated.{rank:02d}-of-{size:02d}.{kind}.pth")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config.to_params()))
        (folder / "meta.json").write_text('{"llama_type": "llama"}')
    return folder


def write_huggingface(folder: Path, config: ModelConfig = GROUPED, seed: int = 0, **options: Any) -> Path:
    """A random LLaMA that transformers makes and saves; `options` go to its config."""
    import transformers

    torch.manual_seed(seed)
    settings = transformers.LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        **{"initializer_range": 0.15, **options},
    )
    transformers.LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


def tensors_of(*folders: Path) -> dict[str, Tensor]:
    """What is read of checkpoints over each other."""
    return values_of(read_weights([inspect(folder) for folder in folders]))


def values_of(weights: Weights) -> dict[str, Tensor]:
    """Tensors in memory."""
    return {name: part.to(part.dtype) for name, part in weights.tensors.items()}


def same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether they have the same names, types and bits, NaN and -0 included."""
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == tensor.dtype and torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in expected.items()
    )


def huggingface_logits(folder: Path, tokens: Tensor) -> Tensor:
    """What transformers computes in float32 from a folder: [T, V]."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens[None]).logits[0]
