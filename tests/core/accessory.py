"""The models that LLaMA2-Accessory's own code was run on, and their weights by a rule that anyone can repeat.

tests/golden/vision/make_accessory.py writes what it computed of them into tests/golden/vision/accessory-*.json.
"""

from collections.abc import Mapping
from dataclasses import replace
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.tuning.adapter import Adapter
from llama_acc.core.model.tuning.lora import LoRABiasNorm
from llama_acc.core.model.vision_config import ClipVision, QFormerVision

_LLAMA = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=24, multiple_of=16, max_seq_len=64)
# The width of the Q-Former, 768, is fixed in its code; transformers of its time has this epsilon.
_QFORMER = QFormerVision(28, 14, 32, 48, 2, 4, query_hidden=40, query_layers=2, layer_norm_eps=1e-5)
_CLIP = ClipVision(28, 14, 32, 48, 2, 4, projection=20, block_width=24, block_heads=2, blocks=2)
_ADAPTER = Adapter(lora_rank=3, prefix_layers=1, prefix_len=5, prefix_new_gate=True)

# By the names of its files in accessory/model/LLM.
ACCESSORY: dict[str, ModelConfig] = {
    "llama_qformerv2": replace(_LLAMA, vision=_QFORMER),
    "llama_qformerv2_peft": replace(_LLAMA, vision=_QFORMER, tuning=LoRABiasNorm(4)),
    "llama_adapter": replace(_LLAMA, n_kv_heads=4, vision=_CLIP, tuning=_ADAPTER),
}
PIXELS = (2, 3, 28, 28)
TOKENS = (2, 7)
# So many values of features, and of what is made of them, are kept; all others are in the logits.
KEPT = 128


def by_rule(name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter's values: normal numbers of the seed CRC-32(name), which numpy keeps for ever (RandomState).

    Matrices have them over the square root of their last dimension; vectors a tenth of them, about 0 (biases) or 1.
    """
    drawn = np.random.RandomState(crc32(name.encode())).standard_normal(shape)
    center = 0 if name.endswith("bias") else 1
    drawn = drawn / shape[-1] ** 0.5 if len(shape) > 1 else center + 0.1 * drawn
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32))


def weights_by_rule(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """`by_rule` for a whole model."""
    return {name: by_rule(name, tuple(shape)) for name, shape in shapes.items()}


def pixels() -> Tensor:
    """Two normalised images."""
    return by_rule("pixels", PIXELS) * PIXELS[-1] ** 0.5


def tokens() -> Tensor:
    """Two prompts."""
    return torch.from_numpy(np.random.RandomState(0).randint(1, _LLAMA.vocab_size, TOKENS))


def sampled(values: Tensor) -> Tensor:
    """Those values of features that are kept: evenly spread."""
    return values.flatten()[:: values.numel() // KEPT]
