"""Runs LLaMA2-Accessory's own models that see, and writes what they compute to accessory-*.json beside this file.

    git clone https://github.com/Alpha-VLLM/LLaMA2-Accessory && git -C LLaMA2-Accessory checkout 3777c43
    pip install --no-deps --target OLD transformers==4.31.0 tokenizers==0.13.3 huggingface_hub==0.24.7 \
        open_clip_torch==2.24.0 timm==1.0.9 ftfy wcwidth regex requests urllib3 certifi idna charset_normalizer
    PYTHONPATH=.:OLD python -m tests.golden.vision.make_accessory LLaMA2-Accessory

Its code is imported from the checkout and runs unchanged, on a CPU in float32. Three things are put in its place from
outside: the released BLIP-2 and CLIP are small ones of the same classes; a torchvision that is not installed, which
open_clip and timm want when they are imported and which only prepares pictures, is an empty one; and every parameter
has its values by `tests.core.accessory.by_rule`.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.vision_config import ClipVision, QFormerVision
from tests.core import accessory

COMMIT = "3777c43940ddfb45d3bc1046b118ca4401747ee2"
PACKAGES = ("torch", "transformers", "open_clip_torch", "timm", "fairscale")


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _empty(name)


def _empty(name: str) -> Any:
    return _Anything(name, (), {})


class _Empty(ModuleType):
    """A module that has any class, none of which does anything."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _empty(name)


def empty_torchvision() -> None:
    """Lets open_clip and timm be imported where there is no torchvision."""
    parts = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".datasets.folder")
    for part in parts:
        name = f"torchvision{part}"
        sys.modules[name] = module = _Empty(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)


def small_blip2(vision: QFormerVision, **_: Any) -> nn.Module:
    """transformers' Blip2Model of a small shape, over a language model that is not used."""
    import transformers

    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.hidden_dim,
            "num_hidden_layers": vision.n_layers,
            "num_attention_heads": vision.n_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        qformer_config={
            "hidden_size": vision.query_width,
            "intermediate_size": vision.query_hidden,
            "num_hidden_layers": vision.query_layers,
            "num_attention_heads": vision.query_heads,
            "encoder_hidden_size": vision.width,
            "vocab_size": 50,
        },
        text_config={
            "model_type": "opt",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "ffn_dim": 16,
            "num_attention_heads": 2,
            "vocab_size": 60,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 32,
        },
    )
    return transformers.Blip2Model(config)


def small_clip(vision: ClipVision) -> nn.Module:
    """open_clip's CLIP of a small shape, with the activation of OpenAI's weights."""
    import open_clip

    return open_clip.CLIP(
        embed_dim=vision.projection,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=vision.n_layers,
            width=vision.width,
            head_width=vision.width // vision.n_heads,
            mlp_ratio=vision.hidden_dim / vision.width,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        text_cfg=open_clip.CLIPTextCfg(context_length=8, vocab_size=10, width=16, heads=2, layers=1),
        quick_gelu=True,
    )


def build(name: str, config: ModelConfig) -> Any:
    """Its model of that name, with the values of the rule."""
    code = importlib.import_module(f"accessory.model.LLM.{name}")
    known = code.ModelArgs.__dataclass_fields__
    arguments = code.ModelArgs(**{key: value for key, value in config.to_params().items() if key in known})
    vision = config.vision
    if isinstance(vision, QFormerVision):
        code.Blip2Model = SimpleNamespace(from_pretrained=lambda *_, **__: small_blip2(vision))
    else:
        assert isinstance(vision, ClipVision)
        created = (small_clip(vision), None, None)
        code.open_clip = SimpleNamespace(create_model_and_transforms=lambda *_, **__: created)
        arguments.trainable_mode = "mm_stage1"
        arguments.v_embed_dim, arguments.v_num_heads = vision.block_width, vision.block_heads
        arguments.v_depth = vision.blocks
    model = code.Transformer(arguments, with_visual=True).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(accessory.by_rule(key, tuple(parameter.shape)))
    return model


def cached(model: Any, words: Tensor, images: Tensor | None) -> Tensor:
    """Logits of the last three tokens as its generation computes them: the prompt at once, then one by one."""
    start = words.shape[1] - 3
    found = [model.forward_inference(words[:, : start + 1], 0, images)]
    found += [model.forward_inference(words[:, at : at + 1], at) for at in (start + 1, start + 2)]
    return torch.stack(found, 1)


@torch.no_grad()
def computed(name: str) -> dict[str, Any]:
    """What it makes of the images and prompts of `tests.core.accessory`."""
    model, words, images = build(name, accessory.ACCESSORY[name]), accessory.tokens(), accessory.pixels()
    if name == "llama_adapter":
        features = model.clip_encode_image(images)
    else:
        features = model.qformer.get_qformer_features(pixel_values=images).last_hidden_state
    twice = images[[0, 0]]
    values = {
        "features": accessory.sampled(features),
        "projected": accessory.sampled(model.encode_image(images)),
        "logits": model(words, images),
        "logits_of_one_image": model(words, twice),
        "logits_of_text": model(words),
        "cached_logits": cached(model, words, images),
        "cached_logits_of_text": cached(model, words, None),
    }
    return {
        "names": {key: list(value.shape) for key, value in model.state_dict().items()},
        "trainable": sorted(model.get_trainable_params()),
        **{key: [float(f"{number:.8g}") for number in value.flatten().tolist()] for key, value in values.items()},
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Golden values of LLaMA2-Accessory's models that see.")
    parser.add_argument("checkout", type=Path, help=f"LLaMA2-Accessory at commit {COMMIT[:7]}")
    sys.path.insert(0, str(parser.parse_args().checkout.resolve()))
    torch.set_num_threads(1)
    if importlib.util.find_spec("torchvision") is None:
        empty_torchvision()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    importlib.import_module("fairscale.nn.model_parallel.initialize").initialize_model_parallel(1)
    made = {
        "repository": "https://github.com/Alpha-VLLM/LLaMA2-Accessory",
        "commit": COMMIT,
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    for name in accessory.ACCESSORY:
        path = Path(__file__).with_name(f"accessory-{name}.json")
        path.write_text(json.dumps(made | computed(name), separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
