"""Images in a LLaMA: every number equals transformers' own, or that of plain torch, however the images are mixed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import shapes_of
from llama_acc.core.model.vision_config import (
    ClipVision,
)
from tests.core.seeing import (
    CLIP,
    QFORMER,
    blip2,
    documents_of,
    logits_of,
    random_pixels,
    random_tower,
    seeing_model,
)
from tests.core.tiny import SMALL, difference

pytest.importorskip("transformers")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' Blip2Model with the weights of `random_tower`."""
    model = blip2(QFORMER, 16)
    left = model.load_state_dict(random_tower(QFORMER).state_dict(), strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith("language_") for name in left.missing_keys)
    return model


def their_features(theirs: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        found = theirs.get_qformer_features(pixel_values=pixels)
    return found if isinstance(found, Tensor) else found.last_hidden_state


@pytest.mark.parametrize("count", [1, 3])
def test_features_are_transformers_own(theirs: Any, count: int) -> None:
    pixels = random_pixels(count, QFORMER)
    with torch.no_grad():
        ours = random_tower(QFORMER)(pixels)
    assert ours.shape == (count, 32, QFORMER.query_width)
    assert difference(ours, their_features(theirs, pixels)) < TOLERANCE
    assert count == 1 or difference(ours[1], ours[0]) > 0.05


@pytest.fixture(scope="module")
def their_llama() -> Any:
    """transformers' LLaMA with the weights of the model "qformer"."""
    return huggingface_llama(seeing_model("qformer"))


def huggingface_llama(model: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_acc.core.checkpoint.huggingface import huggingface_config, huggingface_name, rotated_heads
    from llama_acc.core.checkpoint.lazy import LazyTensor, reorder_heads

    base = model.config.base()
    config = huggingface_config(base, "float32", False, {})
    llama = LlamaForCausalLM(LlamaConfig(**config)).eval()
    state = {}
    for name in shapes_of(base):
        heads, value = rotated_heads(name, base), model.get_parameter(name).detach()
        state[huggingface_name(name)] = (
            reorder_heads(LazyTensor.of(value), heads, to_meta=False).to(torch.float32) if heads else value
        )
    llama.load_state_dict(state)
    return llama


def their_logits(their_llama: Any, model: Any, words: Tensor, features: Tensor) -> Tensor:
    """LLaMA2-Accessory's order: BOS; start vector, projected features, end vector of each image; the text."""
    with torch.no_grad():
        state = dict(model.named_parameters())
        vectors = []
        for one in features:
            projected = F.linear(one, state["qformer_proj.0.weight"], state["qformer_proj.0.bias"])
            dim = (projected.shape[-1],)
            normed = F.layer_norm(projected, dim, state["qformer_proj.1.weight"], state["qformer_proj.1.bias"])
            vectors += [state["start_img"][0], normed, state["end_img"][0]]
        embedded = their_llama.get_input_embeddings()(words)
        stream = torch.cat((embedded[:1], *vectors, embedded[1:]))
        return their_llama(inputs_embeds=stream[None]).logits[0]


@pytest.mark.parametrize("counts", [[1], [2], [1, 0, 3], [0, 0], [2, 1, 1, 0]])
def test_logits_are_transformers_own_with_any_number_of_images(
    theirs: Any, their_llama: Any, counts: list[int]
) -> None:
    model = seeing_model("qformer")
    documents = documents_of(random_tower(QFORMER), QFORMER, counts)
    for seed, (ours, (words, _), count) in enumerate(zip(logits_of(model, documents), documents, counts, strict=True)):
        features = their_features(theirs, random_pixels(count, QFORMER, seed)) if count else torch.empty(0, 32, 24)
        expected = their_logits(their_llama, model, words, features)
        assert ours.shape == expected.shape == (len(words) + 34 * count, SMALL.vocab_size)
        assert difference(ours, expected) < TOLERANCE


class PlainBlock(nn.Module):
    """timm's ViT block, written out: separate heads, explicit softmax."""

    def __init__(self, state: dict[str, Tensor], name: str, heads: int) -> None:
        super().__init__()
        self.of, self.heads = (lambda leaf: state[f"{name}.{leaf}"]), heads

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        size = width // self.heads
        normed = F.layer_norm(x, (width,), self.of("norm1.weight"), self.of("norm1.bias"))
        q, k, v = (normed @ self.of("attn.qkv.weight").T + self.of("attn.qkv.bias")).split(width, -1)
        heads = []
        for head in range(self.heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[:, part] @ k[:, part].T / size**0.5
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads, -1) @ self.of("attn.proj.weight").T + self.of("attn.proj.bias")
        normed = F.layer_norm(x, (width,), self.of("norm2.weight"), self.of("norm2.bias"))
        hidden = F.gelu(normed @ self.of("mlp.fc1.weight").T + self.of("mlp.fc1.bias"))
        return x + hidden @ self.of("mlp.fc2.weight").T + self.of("mlp.fc2.bias")


def plain_visual_tokens(state: dict[str, Tensor], features: Tensor, vision: ClipVision) -> Tensor:
    """What LLaMA2-Accessory's `encode_image` makes of the features [N, width] of one image."""

    def normed(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    read = normed("clip_proj_norm", features @ state["clip_proj.weight"].T + state["clip_proj.bias"])
    hidden = torch.cat((state["visual_query"], read))
    for block in range(vision.blocks):
        hidden = PlainBlock(state, f"visual_blocks.{block}", vision.block_heads)(hidden)
    query = hidden[: len(state["visual_query"])]
    return normed("visual_proj_norm", query @ state["visual_proj.weight"].T + state["visual_proj.bias"])


def plain_adapter_logits(config: ModelConfig, state: dict[str, Tensor], words: Tensor, visual: Tensor | None) -> Tensor:
    """LLaMA with zero-init attention in its multimodal form, written out without any of our layers."""

    def norm(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * state[f"{name}.weight"]

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ state[f"{name}.weight"].T
        if f"{name}.lora_a.weight" in state:
            y = y + x @ state[f"{name}.lora_a.weight"].T @ state[f"{name}.lora_b.weight"].T
        return y + state[f"{name}.bias"] if f"{name}.bias" in state else y

    def turned(x: Tensor, heads: int) -> Tensor:
        size = x.shape[-1] // heads
        powers = config.rope_theta ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(len(x))[:, None] * powers
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        even, odd = x.view(len(x), heads, size)[..., ::2], x.view(len(x), heads, size)[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    x, heads, kv = state["tok_embeddings.weight"][words], config.n_heads, config.kv_heads
    mask = torch.full((len(x), len(x)), -torch.inf).triu(1)
    for layer in range(config.n_layers):
        name = f"layers.{layer}"
        h = norm(f"{name}.attention_norm", x)
        q = turned(linear(f"{name}.attention.wq", h), heads)
        k, v = turned(linear(f"{name}.attention.wk", h), kv), linear(f"{name}.attention.wv", h).view(len(h), kv, -1)
        place = layer - config.n_layers + config.tuning.prefix_layers
        outputs = []
        for head in range(heads):
            group = head * kv // heads
            scores = q[:, head] @ k[:, group].T / config.head_dim**0.5 + mask
            output = scores.softmax(-1) @ v[:, group]
            if place >= 0:
                prefix = state["prefix"][place, 0] + (0 if visual is None else visual)
                pk = linear(f"{name}.attention.wk", prefix).view(len(prefix), kv, -1)[:, group]
                pv = linear(f"{name}.attention.wv", prefix).view(len(prefix), kv, -1)[:, group]
                gate = state["prefix_gate"][place, head].tanh() * state["prefix_new_gate"][place]
                output = output + gate * ((q[:, head] @ pk.T / config.head_dim**0.5).softmax(-1) @ pv)
            outputs.append(output)
        x = x + linear(f"{name}.attention.wo", torch.cat(outputs, -1))
        h = norm(f"{name}.ffn_norm", x)
        gated = F.silu(linear(f"{name}.feed_forward.w1", h)) * linear(f"{name}.feed_forward.w3", h)
        x = x + linear(f"{name}.feed_forward.w2", gated)
    return norm("norm", x) @ state["output.weight"].T


def test_the_multimodal_adapter_is_that_of_plain_torch() -> None:
    model, tower = seeing_model("clip"), random_tower(CLIP)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    documents = documents_of(tower, CLIP, [1, 0, 1])
    for ours, (words, features) in zip(logits_of(model, documents), documents, strict=True):
        visual = plain_visual_tokens(state, features[0], CLIP) if len(features) else None
        expected = plain_adapter_logits(model.config, state, words, visual)
        assert len(ours) == len(words)  # an image costs no position
        assert difference(ours, expected) < TOLERANCE


def test_clip_s_features_are_all_its_vectors_normed_and_projected() -> None:
    tower, pixels = random_tower(CLIP), random_pixels(2, CLIP)
    with torch.no_grad():
        features = tower(pixels)
        whole = tower.vision_model(pixel_values=pixels)  # type: ignore[operator]
    assert features.shape == (2, 5, CLIP.projection)
    # transformers itself projects the first vector only.
    expected = whole.pooler_output @ tower.visual_projection.weight.T  # type: ignore[operator, union-attr]
    assert difference(features[:, 0], expected) < TOLERANCE
