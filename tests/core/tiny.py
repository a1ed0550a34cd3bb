"""Small models and streams of documents, and how far two results are apart."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.load import fill, read_weights, with_rows
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer, build_on_meta, initialize

CPU = torch.device("cpu")
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SMALL = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, multiple_of=16, max_seq_len=256)


def random_model(config: ModelConfig = SMALL, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A float32 model computing in `dtype`, whose random weights are large enough for its logits to matter."""
    model = build_on_meta(config, dtype)
    model.to_empty(device="cpu")
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(8.0)
    return model


def save_model(model: Transformer, folder: Path, dtype: torch.dtype) -> None:
    """Writes a model as LLaMA2-Accessory does, at model-parallel size 1."""
    tensors = {f"llma.{name}": parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    torch.save({"model": tensors}, folder / "consolidated.00-of-01.model.pth")
    (folder / "config.json").write_text(json.dumps(model.config.to_params()), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps({"llama_type": "llama"}), encoding="utf-8")


def loaded_model(*folders: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of checkpoints over each other, with float32 parameters of its own."""
    layouts = [inspect(folder) for folder in folders]
    config, weights = read_config(layouts), read_weights(layouts)
    assert config is not None
    model = build_on_meta(with_rows(config, weights), dtype)
    fill(model, weights, CPU, torch.float32, copy=True)
    return model


def document_logits(model: Transformer, documents: Sequence[Tensor]) -> list[Tensor]:
    """The logits [T, V] of each document, computed as one stream without a cache."""
    lengths = [len(document) for document in documents]
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        hidden = model(torch.cat(list(documents)), positions, lengths)
        return list(model.logits(hidden).split(lengths))


def cached_logits(model: Transformer, tokens: Tensor, chunks: Sequence[int]) -> Tensor:
    """The logits [T, V] of one document, fed in chunks of these sizes to a cache."""
    assert sum(chunks) == len(tokens)
    cache = KVCache(model.config.n_layers)
    logits = []
    with torch.no_grad():
        everywhere = torch.arange(len(tokens)).split(list(chunks))
        for chunk, positions in zip(tokens.split(list(chunks)), everywhere, strict=True):
            logits.append(model.logits(model(chunk, positions, [len(chunk)], caches=[cache])))
    assert cache.length == len(tokens)
    return torch.cat(logits)


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
