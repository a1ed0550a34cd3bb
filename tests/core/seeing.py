"""Small models that see, and what transformers makes of the same weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.model.tuning.adapter import Adapter
from llama_acc.core.model.tuning.lora import LoRABiasNorm
from llama_acc.core.model.vision import Images, Tower, make_tower
from llama_acc.core.model.vision_config import ClipVision, QFormerVision, TinyVision, Vision
from tests.core.tiny import SMALL, random_model

SIZES: dict[str, Any] = {"image_size": 28, "patch_size": 14, "width": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
QFORMER = QFormerVision(**SIZES, query_width=24, query_hidden=40, query_layers=3, query_heads=4)
CLIP = ClipVision(**SIZES, projection=20, block_width=24, block_heads=2, blocks=2)
TINY = TinyVision(image_size=16, patch_size=8, width=24, hidden_dim=32, n_layers=2, n_heads=2)
ADAPTER = Adapter(lora_rank=3, prefix_layers=1, prefix_len=5, prefix_new_gate=True)
SEEING: dict[str, ModelConfig] = {
    "qformer": replace(SMALL, vision=QFORMER),
    "qformer_peft": replace(SMALL, vision=QFORMER, tuning=LoRABiasNorm(4)),
    "clip": replace(SMALL, vision=CLIP, tuning=ADAPTER),
    "tiny": replace(SMALL, vision=TINY),
}


def seeing_model(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model of random weights, none of them at its starting value."""
    model = random_model(SEEING[name], dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() or bool((parameter == 1).all()):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def random_tower(vision: Vision) -> Tower:
    """A tower whose features differ from image to image."""
    tower = make_tower(vision, torch.float32, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(6).add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tower


def random_pixels(count: int, vision: Vision, seed: int = 0) -> Tensor:
    """Normalised pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, vision.image_size, vision.image_size, generator=generator)


def stream_of(documents: Sequence[tuple[Tensor, Tensor]], vision: Vision) -> tuple[Tensor, Tensor, list[int], Images]:
    """Documents of (tokens [T], inputs [I, ...]) as a stream: their images stand right behind the first token."""
    tokens, positions, places, owners, lengths = [], [], [], [], []
    for number, (words, inputs) in enumerate(documents):
        room = len(inputs) * vision.positions
        start = sum(lengths) + 1
        places.append(torch.arange(start, start + room))
        tokens.append(torch.cat((words[:1], torch.zeros(room, dtype=torch.int64), words[1:])))
        lengths.append(len(tokens[-1]))
        positions.append(torch.arange(lengths[-1]))
        owners += [number] * len(inputs)
    images = Images(torch.cat([inputs for _, inputs in documents]), torch.cat(places), owners)
    return torch.cat(tokens), torch.cat(positions), lengths, images


def logits_of(model: Transformer, documents: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The logits [T, V] of each document, computed as one stream."""
    assert model.config.vision is not None
    tokens, positions, lengths, images = stream_of(documents, model.config.vision)
    with torch.no_grad():
        return list(model.logits(model(tokens, positions, lengths, images=images)).split(lengths))


def random_words(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL.vocab_size, (length,), generator=generator)


def documents_of(tower: Tower | None, vision: Vision, counts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Documents with so many images each."""
    made = []
    for seed, count in enumerate(counts):
        inputs = random_pixels(count, vision, seed)
        if tower is not None:
            with torch.no_grad():
                inputs = tower(inputs) if count else torch.empty(0, *vision.input_shape)
        made.append((random_words(5 + 3 * seed, seed), inputs))
    return made


def blip2(vision: QFormerVision, dim: int) -> Any:
    """transformers' own Blip2Model over a tiny language model that is not used."""
    transformers = pytest.importorskip("transformers")
    seeing = transformers.Blip2VisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.hidden_dim,
        num_hidden_layers=vision.n_layers,
        num_attention_heads=vision.n_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    asking = transformers.Blip2QFormerConfig(
        hidden_size=vision.query_width,
        intermediate_size=vision.query_hidden,
        num_hidden_layers=vision.query_layers,
        num_attention_heads=vision.query_heads,
        encoder_hidden_size=vision.width,
        vocab_size=50,
    )
    speaking = transformers.OPTConfig(
        hidden_size=dim,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=2,
        vocab_size=60,
        word_embed_proj_dim=dim,
        max_position_embeddings=32,
    )
    config = transformers.Blip2Config(
        vision_config=seeing.to_dict(), qformer_config=asking.to_dict(), text_config=speaking.to_dict()
    )
    return transformers.Blip2Model(config).eval()
