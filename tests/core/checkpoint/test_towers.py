"""Vision towers in folders, as several versions of transformers and open_clip name and save them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_acc.core.checkpoint.adapter import fingerprint
from llama_acc.core.checkpoint.huggingface import tower_of
from llama_acc.core.checkpoint.layout import inspect, read_config, without_towers
from llama_acc.core.checkpoint.load import check_tensors, open_shard, read_weights
from llama_acc.core.errors import UserError
from llama_acc.core.model.vision import tower_shapes
from llama_acc.core.model.vision_config import ClipVision, QFormerVision, Vision
from tests.core.accessory import ACCESSORY, weights_by_rule
from tests.core.seeing import QFORMER, random_tower
from tests.core.tiny import GOLDEN

# What the tiny towers of tests/golden/vision have: names and shapes as transformers itself gave them.
BLIP2 = replace(QFORMER, query_layers=3)
CLIP = ClipVision(28, 14, 32, 48, 2, 4, projection=16)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"image_size": 28, "patch_size": 14}
ASKING = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "blip": {
        "model_type": "blip-2",
        "vision_config": {**SIZES, **IMAGES},
        "qformer_config": {**ASKING, "encoder_hidden_size": 32},
        "num_query_tokens": 32,
    },
    "clip": {"model_type": "clip_vision_model", **SIZES, **IMAGES, "projection_dim": 16},
}
VERSIONS = ("4.31.0", "5.24.0")


def keys_of(version: str, kind: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((GOLDEN / "vision" / f"keys-{version}.json").read_text())[kind]
    return {name: tuple(shape) for name, shape in keys.items()}


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], of_open_clip: bool = False) -> Path:
    prefix = "open_clip_" if of_open_clip else ""
    folder.mkdir()
    save_file(tensors, folder / f"{prefix}model.safetensors")
    (folder / f"{prefix}config.json").write_text(json.dumps(config))
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


# open_clip: its real names, as tests/golden/vision/make_accessory.py found them


SEEING = {"image_size": 28, "layers": 2, "width": 32, "head_width": 8, "mlp_ratio": 1.5, "patch_size": 14}
READING = {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1}
OPEN_CLIP: dict[str, Any] = {
    "model_cfg": {"embed_dim": 20, "quick_gelu": True, "vision_cfg": SEEING, "text_cfg": READING}
}


def names_of_open_clip() -> dict[str, Tensor]:
    golden = json.loads((GOLDEN / "vision" / "accessory-llama_adapter.json").read_text(encoding="utf-8"))
    shapes = {name.removeprefix("clip."): shape for name, shape in golden["names"].items() if name.startswith("clip.")}
    return weights_by_rule(shapes)


def vision() -> Vision:
    found = ACCESSORY["llama_adapter"].vision
    assert isinstance(found, ClipVision)
    return found


def test_a_folder_of_open_clip_is_a_tower(tmp_path: Path) -> None:
    theirs = names_of_open_clip()
    layout = inspect(write_folder(tmp_path / "clip", theirs, OPEN_CLIP, True))
    # What reads the features is not in such a folder.
    expected = ClipVision(28, 14, 32, 48, 2, 4, projection=20)
    assert layout.tower == expected
    weights = read_weights([layout], 1, 2)  # every rank has all of it
    check_tensors(weights, tower_shapes(expected), layout.folder)
    found = {name: part.to(torch.float32) for name, part in weights.tensors.items()}
    assert torch.equal(found["clip.visual_projection.weight"], theirs["visual.proj"].T)
    q, k, v = (found[f"clip.vision_model.encoder.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(torch.cat((q, k, v)), theirs["visual.transformer.resblocks.1.attn.in_proj_weight"])
    fc2 = found["clip.vision_model.encoder.layers.0.mlp.fc2.bias"]
    assert torch.equal(fc2, theirs["visual.transformer.resblocks.0.mlp.c_proj.bias"])


def test_in_a_checkpoint_of_llama2_accessory_open_clip_s_names_are_read_in_every_shard(tmp_path: Path) -> None:
    theirs = {f"llma.clip.{name}": tensor for name, tensor in names_of_open_clip().items()}
    for part in range(2):
        torch.save({"model": theirs}, tmp_path / f"consolidated.{part:02d}-of-02.model.pth")
    weights = read_weights([inspect(tmp_path)])
    check_tensors(weights, tower_shapes(vision()), tmp_path)
    shard = open_shard(tmp_path / "consolidated.00-of-02.model.pth")
    assert {name for name, tensor in shard.items() if not tensor.mapped} == {"clip.visual_projection.weight"}


def test_an_unknown_name_of_the_vision_side_is_told(tmp_path: Path) -> None:
    tensors = names_of_open_clip() | {"visual.attn_pool.query": torch.zeros(3)}
    named = {f"clip.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"model": named}, tmp_path / "consolidated.00-of-01.model.pth")
    with pytest.raises(UserError, match=r"unknown: clip\.visual\.attn_pool\.query \[3\]"):
        check_tensors(read_weights([inspect(tmp_path)]), tower_shapes(vision()), tmp_path)


def test_a_clip_with_another_activation_or_no_transformer_is_refused(tmp_path: Path) -> None:
    usual = {key: value for key, value in OPEN_CLIP["model_cfg"].items() if key != "quick_gelu"}
    folder = write_folder(tmp_path / "laion", names_of_open_clip(), {"model_cfg": usual}, True)
    with pytest.raises(UserError, match=r"quick_gelu: False \(only True\)"):
        inspect(folder)
    resnet = usual | {"vision_cfg": {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64}}
    folder = write_folder(tmp_path / "resnet", names_of_open_clip(), {"model_cfg": resnet}, True)
    with pytest.raises(UserError, match=r"open_clip_config.json"):
        inspect(folder)
