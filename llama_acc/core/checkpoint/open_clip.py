"""CLIP's vision transformer as open_clip names it, which LLaMA2-Accessory's checkpoints hold, by transformers' names.

open_clip keeps q, k and v of a block in one matrix and the projection transposed. Of the text side nothing is used.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_TEXT = (
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
_NAMES = {
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
_TOGETHER = r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)"


def names_of_open_clip(tensors: Mapping[str, object], prefix: str = "") -> bool:
    """Whether tensors are named by open_clip: some are of its vision transformer."""
    return any(name.startswith(f"{prefix}visual.") for name in tensors)


def from_open_clip(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of open_clip by transformers' names; of the text side none, of anything else all, as they are.

    Args:
        tensors: views of them are given, but for the projection, which is small and has to be turned.
        prefix: of both kinds of names.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            found[name] = tensor
        elif inner.startswith("visual."):
            seen = _vision_part(inner.removeprefix("visual."), tensor)
            found |= {prefix + ours: value for ours, value in seen.items()}
        elif not inner.startswith(_TEXT):
            found[name] = tensor
    return found


def _vision_part(theirs: str, tensor: Tensor) -> dict[str, Tensor]:
    if theirs == "proj":
        return {"visual_projection.weight": tensor.t().contiguous()}
    if match := re.fullmatch(_TOGETHER, theirs):
        block, kind = match.groups()
        names = (f"vision_model.encoder.layers.{block}.self_attn.{name}_proj.{kind}" for name in "qkv")
        return dict(zip(names, tensor.chunk(3), strict=False))
    for pattern, ours in _NAMES.items():
        name, count = re.subn(rf"^{pattern}", ours, theirs)
        if count:
            return {f"vision_model.{name}": tensor}
    return {f"visual.{theirs}": tensor}  # told as unknown where names are compared
