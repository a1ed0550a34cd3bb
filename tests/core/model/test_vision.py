"""Images in a LLaMA: every number equals transformers' own, or that of plain torch, however the images are mixed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_acc.core.errors import UserError
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.sharding import split_dimension
from llama_acc.core.model.transformer import build_on_meta, initialise
from llama_acc.core.model.tuning import FULL, METHODS, Tuning, tuning_of
from llama_acc.core.model.vision import Images, tower_on_meta
from llama_acc.core.model.vision_config import (
    ClipVision,
    QFormerVision,
    TinyVision,
    VisionTraining,
    read_vision,
    vision_of,
)
from tests.core.seeing import (
    CLIP,
    QFORMER,
    SEEING,
    TINY,
    blip2,
    documents_of,
    logits_of,
    random_pixels,
    random_tower,
    random_words,
    seeing_model,
    stream_of,
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
    from llama_acc.core.checkpoint.parts import Part

    base = model.config.base()
    config = huggingface_config(base, "float32", False, {})
    llama = LlamaForCausalLM(LlamaConfig(**config)).eval()
    state = {}
    for name in base.parameter_shapes():
        heads, value = rotated_heads(name, base), model.get_parameter(name).detach()
        state[huggingface_name(name)] = Part.of(value).deinterleave(heads).to(torch.float32) if heads else value
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


@pytest.mark.parametrize("name", SEEING)
def test_in_a_stream_a_document_is_what_it_is_alone(name: str) -> None:
    model, vision = seeing_model(name), SEEING[name].vision
    assert vision is not None
    tower = None if vision.trains_encoder else random_tower(vision)
    counts = [1, 0, 1, 0] if isinstance(vision, ClipVision) else [1, 0, 2, 0]
    documents = documents_of(tower, vision, counts)
    for together, document in zip(logits_of(model, documents), documents, strict=True):
        assert difference(together, logits_of(model, [document])[0]) < TOLERANCE
    # Images matter, and only to their own document.
    others = [(words, inputs.flip(-1)) for words, inputs in documents]
    for count, old, new in zip(counts, logits_of(model, documents), logits_of(model, others), strict=True):
        assert torch.equal(old, new) if not count else difference(old, new) > 1e-3


@pytest.mark.parametrize("name", SEEING)
def test_cached_and_chunked_the_logits_are_the_same(name: str) -> None:
    model, vision = seeing_model(name), SEEING[name].vision
    assert vision is not None
    tower = None if vision.trains_encoder else random_tower(vision)
    documents = documents_of(tower, vision, [1, 0, 1])
    expected = logits_of(model, documents)
    tokens, positions, lengths, images = stream_of(documents, vision)
    caches = [KVCache(SMALL.n_layers) for _ in documents]
    # All but the last three tokens of each at first, then one at a time.
    with torch.no_grad():
        starts = [sum(lengths[:i]) for i in range(3)]
        first = torch.cat([torch.arange(s, s + n - 3) for s, n in zip(starts, lengths, strict=True)])
        places = torch.cat([(first == place).nonzero()[0] for place in images.places] or [images.places])
        moved = images._replace(places=places)
        fed = [n - 3 for n in lengths]
        parts = model.logits(model(tokens[first], positions[first], fed, caches=caches, images=moved)).split(fed)
        found = [[part] for part in parts]
        for k in range(3, 0, -1):
            at = torch.tensor([s + n - k for s, n in zip(starts, lengths, strict=True)])
            for document, row in enumerate(model.logits(model(tokens[at], positions[at], [1, 1, 1], caches=caches))):
                found[document].append(row[None])
    for ours, whole in zip(found, expected, strict=True):
        assert difference(torch.cat(ours), whole) < TOLERANCE


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


def test_the_shapes_are_those_of_blip2_opt_and_clip_vit_large() -> None:
    qformer = QFormerVision()
    tower = {f"qformer.{n}": tuple(p.shape) for n, p in tower_on_meta(qformer, torch.float32).named_parameters()}
    assert tower == qformer.tower_shapes()
    clip = ClipVision()
    found = {f"clip.{n}": tuple(p.shape) for n, p in tower_on_meta(clip, torch.float32).named_parameters()}
    assert found == clip.tower_shapes()


@pytest.mark.parametrize("name", SEEING)
def test_the_shape_knows_every_parameter(name: str) -> None:
    config = SEEING[name]
    assert config.vision is not None
    with_tower = config.parameter_shapes()
    tower = config.vision.tower_shapes()
    model = {n: tuple(p.shape) for n, p in build_on_meta(config, torch.float32).named_parameters()}
    assert model == {n: shape for n, shape in with_tower.items() if n not in tower}
    assert all(split_dimension(n) is None for n in (*tower, *config.vision_parts))


def test_vision_does_not_change_what_a_seed_gives_the_llama() -> None:
    models = []
    for config in (SMALL, SEEING["qformer"], SEEING["tiny"]):
        model = build_on_meta(config, torch.float32)
        model.to_empty(device="cpu")
        initialise(model, 3)
        models.append(dict(model.named_parameters()))
    for name, parameter in models[0].items():
        assert torch.equal(models[1][name], parameter)
        assert torch.equal(models[2][name], parameter)
    parts = {name: models[1][name] for name in SEEING["qformer"].vision_parts}
    assert 0 <= parts["start_img"].min() < parts["start_img"].max() <= 1
    assert bool((parts["qformer_proj.1.weight"] == 1).all())
    assert parts["qformer_proj.0.weight"].abs().max() <= QFORMER.query_width**-0.5


def trained(config: ModelConfig) -> set[str]:
    return {name for name in config.parameter_shapes() if config.trains(name)}


PROJECTION = {
    "qformer_proj.0.weight",
    "qformer_proj.0.bias",
    "qformer_proj.1.weight",
    "qformer_proj.1.bias",
    "start_img",
    "end_img",
}


def test_the_tower_never_trains_and_the_projection_always_does() -> None:
    assert trained(replace(SEEING["qformer"], tuning=Tuning("frozen"))) == PROJECTION
    everything = set(SEEING["qformer"].parameter_shapes())
    tower = set(QFORMER.tower_shapes())
    assert trained(SEEING["qformer"]) == everything - tower
    for method in ("lora", "bias_norm", "lora_bias_norm"):
        tuning = Tuning(method, METHODS[method].lora or 0)
        plain = replace(SMALL, tuning=tuning)
        assert trained(replace(plain, vision=QFORMER)) == trained(plain) | PROJECTION


def test_as_in_the_reference_only_biases_of_the_projection_train() -> None:
    tuning = Tuning("lora_bias_norm", 4)
    plain = replace(SMALL, tuning=tuning)
    seeing = replace(plain, vision=QFORMER, vision_training=VisionTraining(2, as_reference=True))
    assert trained(seeing) == trained(plain) | {"qformer_proj.0.bias", "qformer_proj.1.bias"}
    full = replace(seeing, tuning=FULL)
    assert trained(full) >= PROJECTION


def test_the_adapter_s_stages_train_what_the_reference_s_do() -> None:
    first = trained(replace(SEEING["clip"], vision_training=VisionTraining(1)))
    second = trained(replace(SEEING["clip"], vision_training=VisionTraining(2)))
    everything = set(SEEING["clip"].parameter_shapes())
    kinds = ("clip_proj", "visual_", "prefix", "norm", "bias", "lora")
    mine = {name for name in everything if not name.startswith("clip.")}
    assert first == {name for name in mine if any(kind in name for kind in kinds)}
    assert second == {name for name in mine if any(word in name for word in ("bias", "lora", "norm"))}


@pytest.mark.parametrize("name", SEEING)
def test_gradients_reach_every_part_and_without_images_they_are_zero(name: str) -> None:
    model, vision = seeing_model(name), SEEING[name].vision
    assert vision is not None
    tower = None if vision.trains_encoder else random_tower(vision)
    tokens, positions, lengths, images = stream_of(documents_of(tower, vision, [1, 0]), vision)
    model(tokens, positions, lengths, targets=tokens.roll(-1), images=images).backward()
    for part in SEEING[name].vision_parts:
        gradient = model.get_parameter(part).grad
        assert gradient is not None, part
        assert gradient.abs().max() > 0, part
    model.zero_grad()
    words = random_words(9, 1)
    model(words, torch.arange(9), [9], targets=words.roll(-1)).backward()
    for part in SEEING[name].vision_parts:
        gradient = model.get_parameter(part).grad
        assert gradient is not None, part
        assert not gradient.any(), part


@pytest.mark.parametrize("config", SEEING.values(), ids=SEEING)
def test_a_checkpoint_s_files_say_what_it_sees_with(config: ModelConfig, tmp_path: Any) -> None:
    assert config.vision is not None
    (tmp_path / "vision.json").write_bytes(config.vision.to_json())
    assert read_vision(tmp_path / "vision.json") == config.vision
    tuning, _ = tuning_of(config.llama_type, config.to_params())
    assert tuning == config.tuning


def test_kinds_have_the_reference_s_names() -> None:
    assert SEEING["qformer"].llama_type == "llama_qformerv2"
    assert SEEING["qformer_peft"].llama_type == "llama_qformerv2_peft"
    assert SEEING["clip"].llama_type == "llama_adapter"
    assert (QFormerVision().positions, ClipVision().positions, TinyVision().positions) == (34, 0, 18)


def test_an_impossible_encoder_is_refused_with_every_reason() -> None:
    with pytest.raises(UserError, match=r"(?s)unknown key 'widht'.*n_layers must be a whole number") as caught:
        vision_of("tiny", {"widht": 4, "n_layers": 1.5})
    assert "did you mean 'width'" in str(caught.value)
    with pytest.raises(UserError, match=r"image_size \(30\) must be divisible by patch_size \(16\)"):
        vision_of("tiny", {"image_size": 30})
    with pytest.raises(UserError, match=r"patch_size \(12\) must be a power of 2"):
        vision_of("tiny", {"image_size": 36, "patch_size": 12})
    with pytest.raises(UserError, match="did you mean 'qformer'"):
        vision_of("qfomer")


def test_no_images_are_a_stream_of_words_only() -> None:
    model = seeing_model("qformer")
    none = Images(torch.empty(0, 32, 24), torch.empty(0, dtype=torch.int64), [])
    words = random_words(7, 0)
    with torch.no_grad():
        plain = model(words, torch.arange(7), [7])
        assert torch.equal(model(words, torch.arange(7), [7], images=none), plain)
    assert TINY.positions == 6
