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
from llama_acc.core.model.config import ClipVision, QFormerVision, Vision, vision_of

if TYPE_CHECKING:
    from llama_acc.core.checkpoint.lazy import LazyTensor

_TRANSFORMER = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
}
_QFORMER = {
    "query_width": "hidden_size",
    "query_hidden": "intermediate_size",
    "query_layers": "num_hidden_layers",
    "query_heads": "num_attention_heads",
}
# transformers leaves out of config.json what has these values.
_BLIP2_USUAL = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16}
_QFORMER_USUAL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_USUAL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_TEXT = (
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "text.",
    "logit_scale",
    "logit_bias",
    "attn_mask",
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
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_KINDS = ("blip-2", "clip", "clip_vision_model")
_NAMED = {"qformer": "blip2-opt-2.7b", "clip": "clip-vit-large-patch14"}
_ROOTS = {"qformer": ("query_tokens", "vision_model.", "qformer."), "clip": ("vision_model.", "visual_projection.")}


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
    if kind not in _KINDS:
        return None
    if kind == "blip-2":
        return _blip2(values, path)
    seeing = _part(values, "vision_config", path) if kind == "clip" else values
    projection = values.get("projection_dim", seeing.get("projection_dim", 512))
    sizes = _sizes(_TRANSFORMER, {"image_size": 224, "patch_size": 32, **_CLIP_USUAL} | seeing)
    _only(path, seeing, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5})
    return vision_of(ClipVision.encoder, sizes | {"projection": projection}, path)


def open_clip_tower(path: Path) -> Vision:
    """The shape of the vision tower that an open_clip_config.json describes.

    Raises:
        UserError: unreadable, or a tower that is not computed here; every reason listed.
    """
    try:
        values = read_object(path)
        model = values["model_cfg"]
        seeing = {"head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224} | model["vision_cfg"]
        width = int(seeing["width"])
        sizes = {
            "image_size": seeing["image_size"],
            "patch_size": seeing["patch_size"],
            "width": width,
            "hidden_dim": int(width * seeing["mlp_ratio"]),
            "n_layers": seeing["layers"],
            "n_heads": width // int(seeing["head_width"]),
            "projection": model["embed_dim"],
        }
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{path} describes no vision transformer of open_clip: {error!r}") from None
    _only(path, {"quick_gelu": False} | model, {"quick_gelu": True})
    return vision_of(ClipVision.encoder, sizes, path)


def _blip2(values: Mapping[str, Any], path: Path) -> Vision:
    seeing, asking = (_part(values, key, path) for key in ("vision_config", "qformer_config"))
    sizes = _sizes(_TRANSFORMER, {"image_size": 224, "patch_size": 14, **_BLIP2_USUAL} | seeing)
    sizes |= _sizes(_QFORMER, _QFORMER_USUAL | asking) | {"queries": values.get("num_query_tokens", 32)}
    sizes["layer_norm_eps"] = seeing.get("layer_norm_eps", 1e-6)
    _only(path, seeing, {"hidden_act": "gelu", "qkv_bias": True})
    _only(path, asking, {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "cross_attention_frequency": 2})
    return vision_of(QFormerVision.encoder, sizes, path)


def _part(values: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    part = values.get(key) or {}
    if not isinstance(part, dict):
        raise UserError(f"{key} in {path} must be a mapping", "copy config.json again")
    return part


def _sizes(names: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: values[theirs] for ours, theirs in names.items()}


def _only(path: Path, values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    problems = [
        f"{key}: {values[key]} (only {value})" for key, value in known.items() if values.get(key, value) != value
    ]
    if problems:
        raise UserError(f"{path} describes a vision tower that cannot be computed here:\n{listed(problems)}")


def tower_name(vision: Vision, theirs: str) -> str | None:
    """Our name of a tensor in a tower's folder; None = it is of another part of that model, or no parameter."""
    name = re.sub(r"^(model|blip2)\.", "", theirs)
    if vision.encoder == ClipVision.encoder and re.match(r"(embeddings|encoder|pre_layrnorm|post_layernorm)\.", name):
        name = f"vision_model.{name}"  # transformers 5 leaves this out where there is nothing else
    if not name.startswith(_ROOTS[vision.encoder]) or name.endswith(".position_ids"):
        return None
    return vision.tower_prefix + name


def check_tower(vision: Vision | None, names: Iterable[str], where: object) -> None:
    """Refuses a checkpoint that sees, and has no vision tower.

    Args:
        vision: what it sees with.
        names: of its tensors.
        where: it is.

    Raises:
        UserError: saying what to give.
    """
    if vision is None or vision.trains_encoder:
        return
    if not any(name.startswith(vision.tower_prefix) for name in names):
        raise UserError(
            f"no vision tower ({vision.tower_prefix}*) is in {where}",
            f"give one besides, by the same option once more: {_NAMED[vision.encoder]}, or the folder of such files",
        )


def names_of_open_clip(tensors: Mapping[str, object], prefix: str = "") -> bool:
    """Whether tensors are named by open_clip: some are of its vision transformer."""
    return any(name.startswith(f"{prefix}visual.") for name in tensors)


def from_open_clip(tensors: "Mapping[str, LazyTensor]", prefix: str = "") -> "dict[str, LazyTensor]":
    """Tensors of open_clip by transformers' names; of the text side none, of anything else all, unchanged.

    open_clip keeps q, k and v of a block in one matrix and the projection transposed.

    Args:
        tensors: views of them are given, but for the projection, which is small and has to be turned.
        prefix: of both kinds of names.
    """
    found = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            found[name] = tensor
        elif inner.startswith("visual."):
            seen = _vision_part(inner.removeprefix("visual."), tensor)
            found |= {prefix + ours: value for ours, value in seen.items()}
        elif not inner.startswith(_CLIP_TEXT):
            found[name] = tensor
    return found


def _vision_part(theirs: str, tensor: "LazyTensor") -> "dict[str, LazyTensor]":
    if theirs == "proj":
        return {"visual_projection.weight": tensor.of(tensor.source.t().contiguous())}
    if match := re.fullmatch(_CLIP_QKV, theirs):
        block, kind = match.groups()
        rows = tensor.shape[0] // 3
        return {
            f"vision_model.encoder.layers.{block}.self_attn.{name}_proj.{kind}": tensor.rows(k * rows, (k + 1) * rows)
            for k, name in enumerate("qkv")
        }
    for pattern, ours in _CLIP_NAMES.items():
        name, count = re.subn(rf"^{pattern}", ours, theirs)
        if count:
            return {f"vision_model.{name}": tensor}
    return {f"visual.{theirs}": tensor}  # reported as unknown where names are compared
