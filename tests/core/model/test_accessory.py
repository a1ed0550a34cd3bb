"""The same numbers as LLaMA2-Accessory's own models that see, which tests/golden/vision/make_accessory.py ran."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import describe, shapes_of
from llama_acc.core.model.vision_config import VISION_FILE, ClipVision, QFormerVision, VisionTraining
from tests.core.accessory import ACCESSORY, sampled
from tests.core.accessory_work import CACHED, WHOLE, Loaded, golden_of, load, save_as_accessory
from tests.core.ranks import run_ranks
from tests.core.tiny import difference

pytest.importorskip("transformers")
TOLERANCE = 1e-5


class Golden(NamedTuple):
    """What LLaMA2-Accessory's own code made of a model, whose images take so many positions of the stream."""

    values: dict[str, Any]
    positions: int

    @classmethod
    def of(cls, name: str) -> "Golden":
        vision = ACCESSORY[name].vision
        assert vision is not None
        return cls(golden_of(name), vision.positions)

    def off(self, key: str, found: Tensor, document: int | None = None) -> float:
        """How far some values, or those of one of the two documents, are from it."""
        expected = torch.tensor(self.values[key]).view(found.shape)
        # It leaves out as many positions as an image has, from the front: BOS and the image but for its end vector.
        kept = slice(1 if self.positions and key in WHOLE and WHOLE[key][0] is not None else 0, None)
        if document is not None:
            found, expected = found[document : document + 1], expected[document : document + 1]
        return difference(found[:, kept], expected[:, kept]) if key in WHOLE else difference(found, expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of its models, by their names."""
    made = {name: tmp_path_factory.mktemp(name) for name in ACCESSORY}
    for name, folder in made.items():
        save_as_accessory(name, folder)
    return made


@pytest.fixture(scope="module", params=ACCESSORY)
def both(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Loaded, Golden]:
    """A model read from a folder as LLaMA2-Accessory saves it, and what its own code made of the same weights."""
    loaded = load(folders[request.param])
    assert loaded.model.config == ACCESSORY[request.param]
    return loaded, Golden.of(request.param)


def test_features_and_what_is_made_of_them_are_llama2_accessorys(both: tuple[Loaded, Golden]) -> None:
    loaded, golden = both
    assert golden.off("features", sampled(loaded.features())) < TOLERANCE
    assert golden.off("projected", sampled(loaded.projected())) < TOLERANCE


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("key", WHOLE)
def test_logits_are_llama2_accessorys(both: tuple[Loaded, Golden], key: str, alone: bool) -> None:
    loaded, golden = both
    assert golden.off(key, loaded.logits(WHOLE[key], alone)) < TOLERANCE


def test_a_mixed_stream_gives_each_document_what_llama2_accessory_gives_it_alone(both: tuple[Loaded, Golden]) -> None:
    loaded, golden = both
    assert golden.off("logits_of_text", loaded.logits([1, None]), 1) < TOLERANCE
    assert golden.off("logits", loaded.logits([None, 1]), 1) < TOLERANCE


@pytest.mark.parametrize("key", CACHED)
def test_cached_logits_are_those_of_its_generation(both: tuple[Loaded, Golden], key: str) -> None:
    loaded, golden = both
    assert golden.off(key, loaded.cached_logits(CACHED[key])) < TOLERANCE


def test_shared_by_two_processes_every_number_is_llama2_accessorys(folders: dict[str, Path], tmp_path: Path) -> None:
    split = {name: str(tmp_path / name) for name in folders}
    for name, folder in folders.items():
        convert(Request(folder, Path(split[name]), "consolidated", model_parallel_size=2))
    for made in run_ranks(2, "tests.core.accessory_work:shared", folders=split):
        assert made.keys() == ACCESSORY.keys()
        for name, values in made.items():
            golden = Golden.of(name)
            assert values.keys() == {"features", "projected", *WHOLE, *(f"{key}, alone" for key in WHOLE), *CACHED}
            for key, value in values.items():
                assert golden.off(key.removesuffix(", alone"), torch.tensor(value)) < TOLERANCE, (name, key)


def stage_one_as_reference(config: ModelConfig) -> ModelConfig:
    is_clip = isinstance(config.vision, ClipVision)
    return replace(config, vision_training=VisionTraining(1 if is_clip else 2, as_reference=not is_clip))


@pytest.mark.parametrize("name", ACCESSORY)
def test_what_trains_is_what_trains_there(name: str) -> None:
    golden = golden_of(name)
    config = stage_one_as_reference(ACCESSORY[name])
    assert sorted(key for key in shapes_of(config) if describe(config)[key].trains) == golden["trainable"]


@pytest.mark.parametrize("name", ["llama_qformerv2", "llama_qformerv2_peft"])
def test_names_and_shapes_are_those_of_its_state_dict(name: str) -> None:
    golden = golden_of(name)
    names = {key: tuple(shape) for key, shape in golden["names"].items()}
    assert names == shapes_of(ACCESSORY[name])
    assert isinstance(ACCESSORY[name].vision, QFormerVision)


def test_a_checkpoint_of_its_says_by_its_kind_or_stage_what_it_sees_with(tmp_path: Path) -> None:
    save_as_accessory("llama_adapter", tmp_path)
    (tmp_path / VISION_FILE).unlink()
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 24, "prefix_layers": 1, "prefix_len": 5}
    for stage, vision in (("mm_stage2", ClipVision()), ("sg", None)):
        (tmp_path / "config.json").write_text(json.dumps({**shape, "trainable_mode": stage}))
        config = read_config([inspect(tmp_path)])
        assert config is not None
        assert config.vision == vision
    other = tmp_path / "qformer"
    other.mkdir()
    save_as_accessory("llama_qformerv2", other)
    (other / VISION_FILE).unlink()
    config = read_config([inspect(other)])
    assert config is not None
    assert config.vision == QFormerVision()
