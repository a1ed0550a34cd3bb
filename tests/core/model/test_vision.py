"""Models that see: streams with any mixture of images, shapes, and what of them trains."""

from dataclasses import replace

import pytest
import torch

from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import build_on_meta, describe, initialize, shapes_of
from llama_acc.core.model.tuning import METHODS, Frozen
from llama_acc.core.model.vision import tower_shapes
from llama_acc.core.model.vision_config import ClipVision, VisionTraining, vision_of
from tests.core.seeing import (
    QFORMER,
    SEEING,
    documents_of,
    logits_of,
    random_tower,
    random_words,
    seeing_model,
    stream_of,
)
from tests.core.tiny import SMALL, difference

pytest.importorskip("transformers")
TOLERANCE = 1e-5


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


def test_vision_does_not_change_what_a_seed_gives_the_llama() -> None:
    models = []
    for config in (SMALL, SEEING["qformer"], SEEING["tiny"]):
        model = build_on_meta(config, torch.float32)
        model.to_empty(device="cpu")
        initialize(model, 3)
        models.append(dict(model.named_parameters()))
    for name, parameter in models[0].items():
        assert torch.equal(models[1][name], parameter)
        assert torch.equal(models[2][name], parameter)
    parts = {name: models[1][name] for name in shapes_of(SEEING["qformer"], "vision")}
    assert 0 <= parts["start_img"].min() < parts["start_img"].max() <= 1
    assert bool((parts["qformer_proj.1.weight"] == 1).all())
    assert parts["qformer_proj.0.weight"].abs().max() <= QFORMER.query_width**-0.5


def trained(config: ModelConfig) -> set[str]:
    return {name for name in shapes_of(config) if describe(config)[name].trains}


PROJECTION = {
    "qformer_proj.0.weight",
    "qformer_proj.0.bias",
    "qformer_proj.1.weight",
    "qformer_proj.1.bias",
    "start_img",
    "end_img",
}


def test_the_tower_never_trains_and_the_projection_always_does() -> None:
    assert trained(replace(SEEING["qformer"], tuning=Frozen())) == PROJECTION
    everything = set(shapes_of(SEEING["qformer"]))
    tower = set(tower_shapes(QFORMER))
    assert trained(SEEING["qformer"]) == everything - tower
    for method in ("lora", "bias_norm", "lora_bias_norm"):
        tuning = METHODS[method]()
        plain = replace(SMALL, tuning=tuning)
        assert trained(replace(plain, vision=QFORMER)) == trained(plain) | PROJECTION


def test_the_adapter_s_stages_train_what_the_reference_s_do() -> None:
    mine = {name for name in shapes_of(SEEING["clip"]) if not name.startswith("clip.")}
    second, words = ("bias", "lora", "norm"), ("clip_proj", "visual_", "prefix")
    for stage, kinds in ((1, (*second, *words)), (2, second)):
        expected = {name for name in mine if any(kind in name for kind in kinds)}
        assert trained(replace(SEEING["clip"], vision_training=VisionTraining(stage))) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SEEING)
def test_gradients_reach_every_part_and_without_images_they_are_zero(name: str) -> None:
    model, vision = seeing_model(name).requires_grad_(), SEEING[name].vision
    assert vision is not None
    tower = None if vision.trains_encoder else random_tower(vision)
    tokens, positions, lengths, images = stream_of(documents_of(tower, vision, [1, 0]), vision)
    model(tokens, positions, lengths, targets=tokens.roll(-1), images=images).backward()
    for part in shapes_of(SEEING[name], "vision"):
        gradient = model.get_parameter(part).grad
        assert gradient is not None, part
        assert gradient.abs().max() > 0, part
    model.zero_grad()
    words = random_words(9, 1)
    model(words, torch.arange(9), [9], targets=words.roll(-1)).backward()
    for part in shapes_of(SEEING[name], "vision"):
        gradient = model.get_parameter(part).grad
        assert gradient is not None, part
        assert not gradient.any(), part


def test_an_impossible_encoder_is_refused_with_every_reason() -> None:
    with pytest.raises(UserError, match=r"(?s)n_layers: should be a valid integer.*unknown key 'widht'") as caught:
        vision_of("tiny", {"widht": 4, "n_layers": 1.5})
    assert "did you mean 'width'" in str(caught.value)
    with pytest.raises(UserError, match=r"image_size \(30\) must be divisible by patch_size \(16\)"):
        vision_of("tiny", {"image_size": 30})
    with pytest.raises(UserError, match=r"patch_size \(12\) must be a power of 2"):
        vision_of("tiny", {"image_size": 36, "patch_size": 12})
    with pytest.raises(UserError, match="did you mean 'qformer'"):
        vision_of("qfomer")
