"""One block of a checkpoint at a time, in float32, for computing with models that are larger than memory."""

from collections.abc import Mapping

import torch

from llama_acc.core.checkpoint.parts import Part
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import TransformerBlock
from llama_acc.core.parallel import Parallel


@torch.no_grad()
def load_block(config: ModelConfig, sources: Mapping[str, Part], layer: int) -> TransformerBlock:
    """A block with its weights.

    Args:
        config: the model's shape.
        sources: the model's parameters.
        layer: which block.
    """
    block = TransformerBlock(config, Parallel())
    for name, parameter in block.named_parameters():
        sources[f"layers.{layer}.{name}"].copy_into(parameter)
    return block
