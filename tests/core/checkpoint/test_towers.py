"""Vision towers in Hugging Face's folders, as several versions of transformers name and save them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llama_acc.core.checkpoint.adapter import fingerprint
from llama_acc.core.checkpoint.layout import inspect, read_config, without_towers
from llama_acc.core.checkpoint.load import check_tensors, read_weights
from llama_acc.core.checkpoint.towers import tower_of
from llama_acc.core.errors import UserError
from llama_acc.core.model.vision import tower_shapes
from llama_acc.core.model.vision_config import ClipVision, QFormerVision
from tests.core.seeing import QFORMER, random_tower
from tests.core.tiny import GOLDEN

# What the tiny towers of tests/golden/vision have: names and shapes as transformers itself gave them.
BLIP2 = replace(QFORMER, query_layers=3)
CLIP = ClipVision(28, 14, 32, 48, 2, 4, projection=16)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "blip": {
        "model_type": "blip-2",
        "vision_config": {**SIZES, "image_size": 28, "patch_size": 14},
        "qformer_config": {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "encoder_hidden_size": 32,
        },
        "num_query_tokens": 32,
    },
    "clip": {
        "model_type": "clip_vision_model",
        **SIZES,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 16,
    },
}
VERSIONS = ("4.31.0", "5.24.0")


def keys_of(version: str, kind: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((GOLDEN / "vision" / f"keys-{version}.json").read_text())[kind]
    return {name: tuple(shape) for name, shape in keys.items()}


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("version", VERSIONS)
def test_our_names_and_shapes_are_those_of_transformers(version: str) -> None:
    blip = {f"qformer.{name}": shape for name, shape in keys_of(version, "blip").items()}
    assert blip == tower_shapes(BLIP2)
    clip = {f"clip.{name}": shape for name, shape in keys_of(version, "clip").items() if "position_ids" not in name}
    assert clip == tower_shapes(CLIP)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("kind", "vision"), [("blip", BLIP2), ("clip", CLIP)])
def test_a_folder_of_any_version_is_read_and_the_rest_of_it_is_not(
    version: str, kind: str, vision: QFormerVision | ClipVision, tmp_path: Path
) -> None:
    tensors = {name: torch.rand(shape) for name, shape in keys_of(version, kind).items()}
    besides = {"language_model.lm_head.weight": torch.rand(3, 3), "text_model.final_layer_norm.weight": torch.rand(3)}
    layout = inspect(write_folder(tmp_path / "tower", tensors | besides, CONFIGS[kind]))
    assert layout.tower == vision
    weights = read_weights([layout], 1, 2)  # every rank has all of it
    check_tensors(weights, tower_shapes(vision), layout.folder)
    for name, tensor in tensors.items():
        assert torch.equal(weights.tensors[vision.tower_prefix + name].to(torch.float32), tensor)


def test_a_config_without_usual_values_is_blip2_opt_and_a_clip_says_its_own(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "blip-2", "vision_config": {}, "qformer_config": {}}))
    assert tower_of(path) == QFormerVision()
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    path.write_text(
        json.dumps({"model_type": "clip", "projection_dim": 768, "vision_config": {**large, "patch_size": 14}})
    )
    assert tower_of(path) == ClipVision()
    path.write_text(json.dumps({"model_type": "blip-2", "vision_config": {"layer_norm_eps": 1e-5}}))
    assert tower_of(path) == replace(QFormerVision(), layer_norm_eps=1e-5)  # as old versions saved it
    path.write_text(json.dumps({"model_type": "llama"}))
    assert tower_of(path) is None


def test_a_tower_that_is_not_computed_here_is_refused_by_its_reason(tmp_path: Path) -> None:
    config = {**CONFIGS["blip"], "qformer_config": {"cross_attention_frequency": 4}}
    folder = write_folder(tmp_path / "tower", {"query_tokens": torch.zeros(1, 32, 24)}, config)
    with pytest.raises(UserError, match=r"cross_attention_frequency: 4 \(only 2\)"):
        inspect(folder)


def test_a_tower_is_no_llama_and_what_lies_beside_it_is_not_its(tmp_path: Path) -> None:
    tensors = {name: torch.rand(shape) for name, shape in keys_of("5.24.0", "blip").items()}
    layout = inspect(write_folder(tmp_path / "tower", tensors, CONFIGS["blip"]))
    assert read_config([layout]) is None
    assert without_towers([layout]) == []


def test_a_fingerprint_tells_towers_apart(tmp_path: Path) -> None:
    names = list(tower_shapes(BLIP2))
    found = []
    for change in (0.0, 0.0, 1.0):
        state = {name: parameter.detach().clone() for name, parameter in random_tower(BLIP2).named_parameters()}
        state["vision_model.embeddings.patch_embedding.weight"] += change
        folder = tmp_path / str(len(found))
        found.append(fingerprint(read_weights([inspect(write_folder(folder, state, CONFIGS["blip"]))]), names))
    assert found[0] == found[1] != found[2]
    assert "not whole" not in found
