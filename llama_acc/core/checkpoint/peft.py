"""What becomes of what was tuned: an adapter of the PEFT library, or LoRA pairs merged into their matrices.

The adapter is adapter_config.json and adapter_model.safetensors. Of a merge there is proof that the model computes the
same after it: the logits of a few fixed tokens are compared.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_acc.core.checkpoint.huggingface import huggingface_name
from llama_acc.core.checkpoint.lazy import LazyTensor, blocks_of
from llama_acc.core.model.attention import DocumentAttention
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.layers import RMSNorm, scaled
from llama_acc.core.model.rotary import rotary_table
from llama_acc.core.model.transformer import build_on_meta, is_matrix
from llama_acc.core.model.tuning import Tuning

PEFT_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
MERGE_TOLERANCE = 1e-5
"""How far logits may be off, as a fraction of the largest: rounding, which grows with depth, stays far below."""
_TOKENS = 32
Model = tuple[ModelConfig, Mapping[str, LazyTensor]]


def peft_name(name: str, tuning: Tuning) -> str:
    """PEFT's name of a parameter that was trained by a method."""
    for ours, theirs in tuning.peft_names.items():
        if name.endswith(f".{ours}"):
            matrix = huggingface_name(name.removesuffix(ours) + "weight").removesuffix("weight")
            return f"{_PREFIX}{matrix}{theirs}"
    return _PREFIX + huggingface_name(name)


def peft_tensor(name: str, tensor: LazyTensor, tuning: Tuning) -> LazyTensor:
    """The values that PEFT's file has of a parameter that was trained by a method."""
    factor = tuning.peft_bias_factor
    if factor == 1.0 or not name.endswith(".bias"):
        return tensor

    def read(rows: slice, columns: slice) -> Tensor:
        return tensor.block(rows).to(torch.float32) / factor

    return LazyTensor.computed((tensor,), read, tensor.shape)


def peft_config(tuning: Tuning, base: str | None) -> dict[str, Any]:
    """adapter_config.json.

    Args:
        tuning: a method that PEFT has.
        base: the Hugging Face model it goes on; None = not known.
    """
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        **tuning.peft_config(),
    }


class MergeError(NamedTuple):
    """The largest differences of logits from those before merging, over the largest magnitude, computed in float64:
    with the matrices merged in float32, and as they are saved."""

    exact: float
    saved: float


def merged(name: str, sources: Mapping[str, LazyTensor], tuning: Tuning) -> LazyTensor:
    """A parameter with what the tuning method has beside it merged into it, in float32, if it is a matrix."""
    beside = name.removesuffix("weight")
    added = {other.removeprefix(beside): tensor for other, tensor in sources.items() if other.startswith(beside)}
    if not is_matrix(name) or len(added) == 1:
        return sources[name]
    matrix = added.pop("weight")

    def read(rows: slice, columns: slice) -> Tensor:
        # All columns, so that a shard's values are those of the whole to the bit.
        whole = {name: tensor.to(torch.float32) for name, tensor in added.items()}
        return tuning.merge(matrix.block(rows).to(torch.float32, copy=True), rows.start, whole)[:, columns]

    return LazyTensor.computed((matrix, *added.values()), read, matrix.shape)


@torch.no_grad()
def merge_error(before: Model, merged_model: Model, saved: Model) -> MergeError:
    """Compares models: before merging, after it, and as saved. Only one block is held at a time."""
    config, models = before[0], (before, merged_model, saved)
    tokens = torch.randint(config.vocab_size, (_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    states = [
        torch.cat([sources["tok_embeddings.weight"].rows(token, token + 1).to(torch.float64) for token in tokens])
        for _, sources in models
    ]
    states = [scaled(state, config.embedding_multiplier) for state in states]
    attend = DocumentAttention([_TOKENS], rotary_table(config, _TOKENS, torch.device("cpu")))
    for layer in range(config.n_layers):
        for place, (own, sources) in enumerate(models):
            block = build_on_meta(own.of_blocks([layer]), torch.float32).to_empty(device="cpu").layers[0].double()
            for name, parameter in block.named_parameters():
                sources[f"layers.{layer}.{name}"].copy_into(parameter)
            states[place] = block(states[place], attend)
    expected, exact, as_saved = (_logits(*model, state) for model, state in zip(models, states, strict=True))
    largest = expected.abs().max().clamp(min=1e-30)
    return MergeError(*(((found - expected).abs().max() / largest).item() for found in (exact, as_saved)))


def _logits(config: ModelConfig, sources: Mapping[str, LazyTensor], x: Tensor) -> Tensor:
    """The logits [T, vocabulary] of the last block's output [T, dim]."""
    norm = RMSNorm(config.dim, config.norm_eps).double()
    output = sources["tok_embeddings.weight" if config.tie_word_embeddings else "output.weight"]
    sources["norm.weight"].copy_into(norm.weight)
    x = norm(x)
    return torch.cat([x @ output.rows(*rows).to(torch.float64).T for rows in blocks_of(output.shape)], 1)
