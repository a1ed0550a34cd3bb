"""Merging LoRA pairs into their matrices, and proof that the model computes the same after it.

The logits of a few fixed tokens are compared block by block, so that of each model only one block is held at a time.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llama_acc.core.checkpoint.computed import Source, merged, read_all, read_block
from llama_acc.core.model.attention import DocumentAttention
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.layers import RMSNorm, rotary_table
from llama_acc.core.model.transformer import TransformerBlock
from llama_acc.core.parallel import Parallel

MERGE_TOLERANCE = 2e-3
"""How far logits in float32 may be apart, as a fraction of the largest. Rounding grows with depth: random models of 2
layers came to less than 1e-5, of 80 layers to 7e-4."""
_TOKENS = 32
_ROWS = 4096  # of the output matrix at a time
Model = tuple[ModelConfig, Mapping[str, Source]]


class MergeError(NamedTuple):
    """The largest difference of logits from those before merging, over the largest magnitude of these.

    Attributes:
        exact: of the merged matrices in float32.
        saved: of them as they are saved.
    """

    exact: float
    saved: float


def merged_source(name: str, sources: Mapping[str, Source]) -> Source:
    """A parameter with its LoRA pair merged into it, if it has one."""
    matrix = name.removesuffix(".weight")
    lora_a = sources.get(f"{matrix}.lora_a.weight")
    if lora_a is None:
        return sources[name]
    return merged(sources[name], lora_a, sources[f"{matrix}.lora_b.weight"])


@torch.no_grad()
def merge_error(before: Model, merged_model: Model, saved: Model) -> MergeError:
    """Compares models in float32: before merging, after it, and as saved."""
    expected, *others = (_logits(*model) for model in (before, merged_model, saved))
    largest = expected.abs().max().clamp(min=1e-30)
    exact, rounded = (((other - expected).abs().max() / largest).item() for other in others)
    return MergeError(exact, rounded)


def _logits(config: ModelConfig, sources: Mapping[str, Source]) -> Tensor:
    """The logits [T, vocabulary] of fixed tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (_TOKENS,), generator=generator).tolist()
    embedding = sources["tok_embeddings.weight"]
    x = torch.cat([read_block(embedding, token, token + 1, torch.float32) for token in tokens])
    table = rotary_table(config.head_dim, len(x), config.rope_theta, config.rope_scaling, x.device)
    attend = DocumentAttention([len(x)], table)
    for layer in range(config.n_layers):
        x = _block(config, sources, layer)(x, attend)
    norm = RMSNorm(config.dim, config.norm_eps)
    norm.weight.copy_(read_all(sources["norm.weight"]))
    x, output = norm(x), sources["output.weight"]
    pieces = [(start, min(start + _ROWS, config.vocab_size)) for start in range(0, config.vocab_size, _ROWS)]
    return torch.cat([x @ read_block(output, *piece, torch.float32).T for piece in pieces], 1)


def _block(config: ModelConfig, sources: Mapping[str, Source], layer: int) -> TransformerBlock:
    block = TransformerBlock(config, Parallel())
    for name, parameter in block.named_parameters():
        sources[f"layers.{layer}.{name}"].copy_into(parameter)
    return block
