"""CLIP as open_clip names and saves it: its real names, as tests/golden/vision/make_accessory.py found them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.load import check_tensors, open_shard, read_weights
from llama_acc.core.errors import UserError
from llama_acc.core.model.vision import tower_shapes
from llama_acc.core.model.vision_config import ClipVision, Vision
from tests.core.accessory import ACCESSORY, weights_by_rule
from tests.core.tiny import GOLDEN

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 20,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 28,
            "layers": 2,
            "width": 32,
            "head_width": 8,
            "mlp_ratio": 1.5,
            "patch_size": 14,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1},
    },
}


def names_of_open_clip() -> dict[str, Tensor]:
    golden = json.loads((GOLDEN / "vision" / "accessory-llama_adapter.json").read_text(encoding="utf-8"))
    shapes = {name.removeprefix("clip."): shape for name, shape in golden["names"].items() if name.startswith("clip.")}
    return weights_by_rule(shapes)


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def vision() -> Vision:
    found = ACCESSORY["llama_adapter"].vision
    assert isinstance(found, ClipVision)
    return found


def test_a_folder_of_open_clip_is_a_tower(tmp_path: Path) -> None:
    theirs = names_of_open_clip()
    layout = inspect(write_folder(tmp_path / "clip", theirs, CONFIG))
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
    usual = {key: value for key, value in CONFIG["model_cfg"].items() if key != "quick_gelu"}
    folder = write_folder(tmp_path / "laion", names_of_open_clip(), {"model_cfg": usual})
    with pytest.raises(UserError, match=r"quick_gelu: False \(only True\)"):
        inspect(folder)
    resnet = usual | {"vision_cfg": {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64}}
    folder = write_folder(tmp_path / "resnet", names_of_open_clip(), {"model_cfg": resnet})
    with pytest.raises(UserError, match=r"open_clip_config.json"):
        inspect(folder)
