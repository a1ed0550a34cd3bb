"""The same numbers as LLaMA2-Accessory's own models that see, which tests/golden/vision/make_accessory.py ran."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.shards import check_tensors, fill, fill_tower, read_weights
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer, build_on_meta
from llama_acc.core.model.vision import Images, Tower, tower_on_meta
from llama_acc.core.model.vision_config import VISION_FILE, ClipVision, QFormerVision, Vision, VisionTraining
from tests.core.accessory import ACCESSORY, pixels, sampled, tokens, weights_by_rule
from tests.core.seeing import logits_of
from tests.core.tiny import CPU, GOLDEN, difference

pytest.importorskip("transformers")
TOLERANCE = 1e-5


class Loaded(NamedTuple):
    """A model read from a folder as LLaMA2-Accessory saves it, and what its own code made of the same weights."""

    model: Transformer
    tower: Tower
    golden: dict[str, Any]

    @property
    def vision(self) -> Vision:
        return self.tower.vision

    def expected(self, key: str, *shape: int) -> Tensor:
        return torch.tensor(self.golden[key]).view(*shape) if shape else torch.tensor(self.golden[key])

    def features(self) -> Tensor:
        with torch.no_grad():
            return self.tower(pixels())

    def documents(self, images: list[int | None]) -> list[tuple[Tensor, Tensor]]:
        """The prompts, each with one of the images or none."""
        features = self.features()
        none = features[:0]
        seen = [none if image is None else features[image : image + 1] for image in images]
        return list(zip(tokens(), seen, strict=True))

    def logits(self, images: list[int | None], alone: bool = False) -> Tensor:
        """Of the words, [2, T, V]: those of an image's positions, of which the first is that of BOS, are left out."""
        documents, model = self.documents(images), self.model
        found = [logits_of(model, [one])[0] for one in documents] if alone else logits_of(model, documents)
        rows = [logits[-len(words) :] for logits, (words, _) in zip(found, documents, strict=True)]
        return torch.stack(rows)


def saved_by_accessory(name: str, folder: Path) -> dict[str, Any]:
    """Writes a checkpoint with its names and the weights of the rule; what its code made of them."""
    golden = json.loads((GOLDEN / "vision" / f"accessory-{name}.json").read_text(encoding="utf-8"))
    config = ACCESSORY[name]
    assert config.vision is not None
    named = {f"llma.{key}": value for key, value in weights_by_rule(golden["names"]).items()}
    torch.save({"model": named}, folder / "consolidated.00-of-01.model.pth")
    (folder / "config.json").write_text(json.dumps(config.to_params()))
    (folder / "meta.json").write_text(json.dumps({"llama_type": name}))
    # Its own are of one shape only and say nothing.
    (folder / VISION_FILE).write_bytes(config.vision.to_json())
    return golden


@pytest.fixture(scope="module", params=ACCESSORY)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp(request.param)
    golden = saved_by_accessory(request.param, folder)
    layout = inspect(folder)
    config = read_config([layout])
    assert config == ACCESSORY[request.param]
    assert config.vision is not None
    weights = read_weights([layout])
    check_tensors(weights, config.parameter_shapes(), folder)
    model, tower = build_on_meta(config, torch.float32), tower_on_meta(config.vision, torch.float32)
    fill_tower(tower, weights, CPU, torch.float32)
    fill(model, weights, CPU, torch.float32, copy=True)
    assert not weights.tensors
    return Loaded(model, tower, golden)


def test_features_and_what_is_made_of_them_are_llama2_accessorys(loaded: Loaded) -> None:
    features = loaded.features()
    assert difference(sampled(features), loaded.expected("features")) < TOLERANCE
    sight = loaded.model.sight
    assert sight is not None
    positions = loaded.vision.positions
    with torch.no_grad():
        stream = torch.zeros(2 * positions, loaded.model.config.dim)
        seen = sight(stream, Images(features, torch.arange(2 * positions), [0, 1]), 2)
    # In the stream an image is its start vector, what is made of its features, its end vector.
    made = seen.prefixes if seen.prefixes is not None else seen.x.unflatten(0, (2, positions))[:, 1:-1]
    assert difference(sampled(made), loaded.expected("projected")) < TOLERANCE


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("key", "images"), [("logits", [0, 1]), ("logits_of_one_image", [0, 0]), ("logits_of_text", [None, None])]
)
def test_logits_are_llama2_accessorys(loaded: Loaded, key: str, images: list[int | None], alone: bool) -> None:
    found = loaded.logits(images, alone)
    expected = loaded.expected(key, *found.shape)
    # It leaves out as many positions as an image has, from the front: BOS and the image but for its end vector.
    kept = slice(1, None) if images[0] is not None and loaded.vision.positions else slice(None)
    assert difference(found[:, kept], expected[:, kept]) < TOLERANCE


def test_a_mixed_stream_gives_each_document_what_llama2_accessory_gives_it_alone(loaded: Loaded) -> None:
    found = loaded.logits([1, None])
    assert difference(found[1], loaded.expected("logits_of_text", *found.shape)[1]) < TOLERANCE
    swapped = loaded.logits([None, 1])
    assert difference(swapped[1, 1:], loaded.expected("logits", *found.shape)[1, 1:]) < TOLERANCE


@pytest.mark.parametrize(("key", "images"), [("cached_logits", [0, 1]), ("cached_logits_of_text", [None, None])])
def test_cached_logits_are_those_of_its_generation(loaded: Loaded, key: str, images: list[int | None]) -> None:
    for row, (words, features) in enumerate(loaded.documents(images)):
        room = len(features) * loaded.vision.positions
        whole = torch.cat((words[:1], torch.zeros(room, dtype=torch.int64), words[1:]))
        cache, found = KVCache(loaded.model.config.n_layers), []
        start = len(whole) - 3
        with torch.no_grad():
            for at in (torch.arange(start + 1), torch.tensor([start + 1]), torch.tensor([start + 2])):
                seen = Images(features, torch.arange(1, room + 1), [0] * len(features)) if len(at) > 1 else None
                hidden = loaded.model(whole[at], at, [len(at)], caches=[cache], images=seen)
                found.append(loaded.model.logits(hidden)[-1])
        expected = loaded.expected(key, len(tokens()), 3, -1)[row]
        assert difference(torch.stack(found), expected) < TOLERANCE


def stage_one_as_reference(config: ModelConfig) -> ModelConfig:
    is_clip = isinstance(config.vision, ClipVision)
    return replace(config, vision_training=VisionTraining(1 if is_clip else 2, as_reference=not is_clip))


@pytest.mark.parametrize("name", ACCESSORY)
def test_what_trains_is_what_trains_there(name: str) -> None:
    golden = json.loads((GOLDEN / "vision" / f"accessory-{name}.json").read_text(encoding="utf-8"))
    config = stage_one_as_reference(ACCESSORY[name])
    assert sorted(key for key in config.parameter_shapes() if config.trains(key)) == golden["trainable"]


@pytest.mark.parametrize("name", ["llama_qformerv2", "llama_qformerv2_peft"])
def test_names_and_shapes_are_those_of_its_state_dict(name: str) -> None:
    golden = json.loads((GOLDEN / "vision" / f"accessory-{name}.json").read_text(encoding="utf-8"))
    names = {key: tuple(shape) for key, shape in golden["names"].items()}
    assert names == ACCESSORY[name].parameter_shapes()
    assert isinstance(ACCESSORY[name].vision, QFormerVision)


def test_a_checkpoint_of_its_says_by_its_kind_or_stage_what_it_sees_with(tmp_path: Path) -> None:
    saved_by_accessory("llama_adapter", tmp_path)
    (tmp_path / VISION_FILE).unlink()
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 24, "prefix_layers": 1, "prefix_len": 5}
    for stage, vision in (("mm_stage2", ClipVision()), ("sg", None)):
        (tmp_path / "config.json").write_text(json.dumps({**shape, "trainable_mode": stage}))
        config = read_config([inspect(tmp_path)])
        assert config is not None
        assert config.vision == vision
    (tmp_path / "meta.json").write_text(json.dumps({"llama_type": "llama_qformerv2"}))
    (tmp_path / "config.json").write_text(json.dumps({"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 24}))
    config = read_config([inspect(tmp_path)])
    assert config is not None
    assert config.vision == QFormerVision()
