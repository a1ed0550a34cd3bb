"""Frozen vision towers as Hugging Face's folders hold them: BLIP-2's and CLIP's. Imports no torch.

Such a folder is given beside the LLaMA, as one checkpoint more. Of BLIP-2 the vision transformer and the Q-Former are
read, not its language model; of CLIP the vision transformer, not its text side. CLIP may also be as open_clip saves it.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import read_json, read_object
from llama_acc.core.model.vision_config import ClipVision, QFormerVision, Vision, vision_of

if TYPE_CHECKING:
    from llama_acc.core.checkpoint.lazy import LazyTensor

OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# Our names of sizes by those of Hugging Face, with what transformers means where config.json leaves one out.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TOWER = dict(zip(("width", "hidden_dim", "n_layers", "n_heads"), _SIZES, strict=True))
_TOWER |= {"image_size": "image_size", "patch_size": "patch_size"}
_QFORMER = dict(zip(("query_width", "query_hidden", "query_layers", "query_heads"), _SIZES, strict=True))
_SMALL_USUAL = dict(zip(_SIZES, (768, 3072, 12, 12), strict=True))
_CLIP_USUAL = _SMALL_USUAL | {"image_size": 224, "patch_size": 32}
_BLIP2_USUAL = dict(zip(_SIZES, (1408, 6144, 39, 16), strict=True)) | {"image_size": 224, "patch_size": 14}
_NAMED = {"qformer": "blip2-opt-2.7b", "clip": "clip-vit-large-patch14"}
_ROOTS = {"qformer": ("query_tokens", "vision_model.", "qformer."), "clip": ("vision_model.", "visual_projection.")}
# open_clip's names: of the text side, which is not read, and transformers' for the others.
_CLIP_TEXT = (
    *("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "text."),
    *("logit_scale", "logit_bias", "attn_mask"),
)
_CLIP_NAMES = {
    r"class_embedding": "embeddings.class_embedding",
    r"positional_embedding": "embeddings.position_embedding.weight",
    r"conv1\.": "embeddings.patch_embedding.",
    r"ln_pre\.": "pre_layrnorm.",
    r"ln_post\.": "post_layernorm.",
    r"transformer\.resblocks\.(\d+)\.ln_([12])\.": r"encoder.layers.\1.layer_norm\2.",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.": r"encoder.layers.\1.self_attn.out_proj.",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.": r"encoder.layers.\1.mlp.fc1.",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.": r"encoder.layers.\1.mlp.fc2.",
}
_CLIP_QKV = r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)"


def tower_of(path: Path) -> Vision | None:
    """The kind and shape of the vision tower that a Hugging Face config.json describes; None = it is no tower's.

    Raises:
        UserError: a tower that is not computed here; every reason listed.
    """
    try:
        values = read_json(path)
    except UserError:
        return None  # reported where a LLaMA's shape is wanted of it
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind in ("clip", "clip_vision_model"):
        found = _part(values, "vision_config", path) if kind == "clip" else values
        _only(path, found, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5})
        projection = values.get("projection_dim", found.get("projection_dim", 512))
        sizes = {ours: (_CLIP_USUAL | found)[theirs] for ours, theirs in _TOWER.items()}
        return vision_of(ClipVision.encoder, sizes | {"projection": projection}, path)
    if kind == "blip-2":
        found, asking = (_part(values, key, path) for key in ("vision_config", "qformer_config"))
        _only(path, found, {"hidden_act": "gelu", "qkv_bias": True})
        _only(path, asking, {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "cross_attention_frequency": 2})
        sizes = {ours: (_BLIP2_USUAL | found)[theirs] for ours, theirs in _TOWER.items()}
        sizes |= {ours: (_SMALL_USUAL | asking)[theirs] for ours, theirs in _QFORMER.items()}
        sizes |= {"queries": values.get("num_query_tokens", 32), "layer_norm_eps": found.get("layer_norm_eps", 1e-6)}
        return vision_of(QFormerVision.encoder, sizes, path)
    return None


def open_clip_tower(path: Path) -> Vision:
    """The shape of the vision tower that an open_clip_config.json describes.

    Raises:
        UserError: unreadable, or a tower that is not computed here; every reason listed.
    """
    try:
        model = read_object(path)["model_cfg"]
        found = {"head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224} | model["vision_cfg"]
        width = int(found["width"])
        sizes = {
            "image_size": found["image_size"],
            "patch_size": found["patch_size"],
            "width": width,
            "hidden_dim": int(width * found["mlp_ratio"]),
            "n_layers": found["layers"],
            "n_heads": width // int(found["head_width"]),
            "projection": model["embed_dim"],
        }
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{path} describes no vision transformer of open_clip: {error!r}") from None
    _only(path, {"quick_gelu": False} | model, {"quick_gelu": True})
    return vision_of(ClipVision.encoder, sizes, path)


def _part(values: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    part = values.get(key) or {}
    if not isinstance(part, dict):
        raise UserError(f"{key} in {path} must be a mapping", "copy config.json again")
    return part


def _only(path: Path, values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    different = {key: value for key, value in known.items() if values.get(key, value) != value}
    if different:
        problems = listed([f"{key}: {values[key]} (only {value})" for key, value in different.items()])
        raise UserError(f"{path} describes a vision tower that cannot be computed here:\n{problems}")


def tower_name(vision: Vision, theirs: str) -> str | None:
    """Our name of a tensor in a tower's folder; None = it is of another part of that model, or no parameter."""
    name = re.sub(r"^(model|blip2)\.", "", theirs)
    if vision.encoder == ClipVision.encoder and re.match(r"(embeddings|encoder|pre_layrnorm|post_layernorm)\.", name):
        name = f"vision_model.{name}"  # transformers 5 leaves this out where there is nothing else
    if not name.startswith(_ROOTS[vision.encoder]) or name.endswith(".position_ids"):
        return None
    return vision.tower_prefix + name


def check_tower(vision: Vision | None, names: Iterable[str], where: object) -> None:
    """Refuses, with a UserError, a multimodal checkpoint without a vision tower."""
    if vision is None or vision.trains_encoder or any(name.startswith(vision.tower_prefix) for name in names):
        return
    raise UserError(
        f"no vision tower ({vision.tower_prefix}*) is in {where}",
        f"give one besides, by the same option once more: {_NAMED[vision.encoder]}, or the folder of such files",
    )


def from_open_clip(tensors: "Mapping[str, LazyTensor]", prefix: str = "") -> "dict[str, LazyTensor]":
    """Tensors of open_clip by transformers' names, without its text side; anything else unchanged.

    open_clip keeps q, k and v of a block in one matrix and the projection transposed. Views are given, but of the
    projection, which is small and has to be turned. `prefix` is that of both kinds of names.
    """
    if not any(name.startswith(f"{prefix}visual.") for name in tensors):
        return dict(tensors)
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        theirs, tower = inner.removeprefix("visual."), f"{prefix}vision_model."
        if not name.startswith(prefix):
            found[name] = tensor
        elif theirs == inner:
            found |= {} if inner.startswith(_CLIP_TEXT) else {name: tensor}
        elif theirs == "proj":
            found[f"{prefix}visual_projection.weight"] = tensor.of(tensor.source.t().contiguous())
        elif match := re.fullmatch(_CLIP_QKV, theirs):
            rows = tensor.shape[0] // 3
            for k, part in enumerate("qkv"):
                own = f"{tower}encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"
                found[own] = tensor.rows(k * rows, (k + 1) * rows)
        else:
            for pattern, ours in _CLIP_NAMES.items():
                if re.match(pattern, theirs):
                    found[tower + re.sub(rf"^{pattern}", ours, theirs)] = tensor
                    break
            else:
                found[name] = tensor  # reported as unknown where names are compared
    return found
