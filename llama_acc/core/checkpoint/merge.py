"""Merging LoRA pairs into their matrices, and proof that the model computes the same after it.

Each block is given the same input before and after merging; the logits of a few fixed tokens are compared besides.
Only one block is held at a time.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from llama_acc.core.checkpoint.lazy import LazyTensor, merge_added
from llama_acc.core.model.attention import DocumentAttention, rotary_table
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.layers import RMSNorm
from llama_acc.core.model.transformer import TransformerBlock, build_on_meta, is_matrix
from llama_acc.core.model.tuning import Tuning

MERGE_TOLERANCE = 1e-5
"""How far what a block computes may be off, as a fraction of the largest."""
_TOKENS = 32
_ROWS = 4096  # of the output matrix at a time
Model = tuple[ModelConfig, Mapping[str, LazyTensor]]


class MergeError(NamedTuple):
    """The largest differences from before merging, over the largest magnitude.

    Attributes:
        block: of what a block adds, each given the same input; computed in float64 from matrices merged in float32.
        exact: of the logits, computed in float32; rounding grows with depth.
        saved: of the logits with the matrices as they are saved.
    """

    block: float
    exact: float
    saved: float


def merged(name: str, sources: Mapping[str, LazyTensor], tuning: Tuning) -> LazyTensor:
    """A parameter with what the tuning method has beside it merged into it, if it is a matrix."""
    beside = name.removesuffix("weight")
    added = {other.removeprefix(beside): tensor for other, tensor in sources.items() if other.startswith(beside)}
    return merge_added(added.pop("weight"), added, tuning) if is_matrix(name) and len(added) > 1 else sources[name]


@torch.no_grad()
def merge_error(before: Model, merged_model: Model, saved: Model) -> MergeError:
    """Compares models: before merging, after it, and as saved."""
    models = (before, merged_model, saved)
    states = [_embedded(*model) for model in models]
    attend = _attend(before[0])
    worst = 0.0
    for layer in range(before[0].n_layers):
        given, added = states[0].double(), []
        for place, model in enumerate(models):
            block = _load_block(*model, layer)
            states[place] = block(states[place], attend)
            if place < 2:
                added.append(block.double()(given, attend) - given)
        worst = max(worst, _relative(added[1], added[0]))
    expected, *others = (_logits(*model, state) for model, state in zip(models, states, strict=True))
    return MergeError(worst, *(_relative(other, expected) for other in others))


def _load_block(config: ModelConfig, sources: Mapping[str, LazyTensor], layer: int) -> TransformerBlock:
    """A block with its weights, in float32: models that are larger than memory are computed block by block."""
    block = build_on_meta(replace(config, n_layers=1), torch.float32).to_empty(device="cpu").layers[0]
    assert isinstance(block, TransformerBlock)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            sources[f"layers.{layer}.{name}"].copy_into(parameter)
    return block


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def _embedded(config: ModelConfig, sources: Mapping[str, LazyTensor]) -> Tensor:
    """The vectors [T, dim] of fixed tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (_TOKENS,), generator=generator).tolist()
    embedding = sources["tok_embeddings.weight"]
    return torch.cat([embedding.rows(token, token + 1).to(torch.float32) for token in tokens])


def _attend(config: ModelConfig) -> DocumentAttention:
    device = torch.device("cpu")
    table = rotary_table(config.head_dim, _TOKENS, config.rope_theta, config.rope_scaling, device)
    return DocumentAttention([_TOKENS], table)


def _logits(config: ModelConfig, sources: Mapping[str, LazyTensor], x: Tensor) -> Tensor:
    """The logits [T, vocabulary] of the last block's output."""
    norm = RMSNorm(config.dim, config.norm_eps)
    sources["norm.weight"].copy_into(norm.weight)
    x, output = norm(x), sources["output.weight"]
    pieces = [(start, min(start + _ROWS, config.vocab_size)) for start in range(0, config.vocab_size, _ROWS)]
    return torch.cat([x @ output.rows(*piece).to(torch.float32).T for piece in pieces], 1)
