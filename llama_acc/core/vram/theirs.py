"""What another program takes besides, for the same run: counted from shapes, or simulated, never measured.

Only what is known to be done there, or follows from a program in which nothing is fused, is counted.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod

from llama_acc.core.model.config import ModelConfig
from llama_acc.core.vram.predict import Usage
from llama_acc.core.vram.simulation import Setup

_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a number: itself, its block's scale in a byte, and the scale of 256 of those in float32."""

RANKS = "the other GPUs of its layout"
"""Each of them holds again what is not split, activations among it, and has a context and NCCL's buffers of its own."""

TOWER = "the vision tower's matrices in NF4, not bf16"
LOGITS = "logits whole, with log-softmax and gradient, in float32"
OPERATIONS = "every operation of a block keeps its input"
PARTS = {"tower": TOWER, "logits": LOGITS, "operations": OPERATIONS}
"""What `published.yaml` calls these."""


def more_of_training(setup: Setup, usage: Usage) -> dict[str, int]:
    """Bytes that each of `PARTS` adds to the prediction of a training step; less than 0 where it saves."""
    return {TOWER: _tower(setup.config), LOGITS: _logits(setup, usage), OPERATIONS: _operations(setup, usage)}


def more_of_inference(setup: Setup) -> dict[str, int]:
    """The same for inference, which keeps no activations and makes one row of logits."""
    return {TOWER: _tower(setup.config)}


def other_ranks(setup: Setup, usage: Usage, ranks: int, predicted: Callable[[Setup], Usage]) -> int:
    """Bytes that a run on so many model-parallel ranks takes on all of them, more than on one.

    Args:
        setup: the run on one.
        usage: its prediction.
        ranks: how many.
        predicted: makes the prediction of a rank.
    """
    parallel = setup.recipe.parallel.model_copy(update={"model_parallel_size": ranks})
    split = replace(setup, recipe=setup.recipe.model_copy(update={"parallel": parallel}), world_size=ranks)
    # All but rank 0 are alike: it alone has the vision tower.
    total = predicted(split).total + (ranks - 1) * predicted(replace(split, rank=1)).total
    return total - usage.total


def _tower(config: ModelConfig) -> int:
    if config.vision is None:
        return 0
    matrices = (shape for shape in config.vision.tower_shapes().values() if len(shape) == 2)
    return round(sum(prod(shape) for shape in matrices) * (_NF4_BYTES - 2))


def _logits(setup: Setup, usage: Usage) -> int:
    whole = 3 * 4 * setup.tokens * setup.config.vocab_size
    return max(0, whole - usage.parts["logits and loss"])


def _operations(setup: Setup, usage: Usage) -> int:
    one = setup.tokens * kept_of_token(setup.config)
    if setup.recipe.train.activation_checkpointing:  # it is one block at a time
        return max(0, one - usage.parts["activations recomputed"])
    return max(0, setup.config.n_layers * one - usage.parts["activations kept"])


def kept_of_token(config: ModelConfig) -> int:
    """Bytes that the operations of one block keep of a token where nothing but attention is fused.

    Two norms keep their input in float32, what they made of it and what the weight made of that (8 bytes for each
    number); attention its queries, keys, values and result; SwiGLU both products, the activation and the result.
    """
    norms = 2 * 8 * config.dim
    attention = 2 * (2 * config.dim + 2 * config.kv_dim)
    return norms + attention + 2 * 4 * config.hidden_dim
