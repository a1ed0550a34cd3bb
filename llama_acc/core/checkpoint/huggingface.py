"""Hugging Face's LLaMA and its relatives: config.json and names, there and back; vision towers. Imports no torch.

Its q_proj and k_proj have their rows in another order (see `lazy.reorder_heads`): it rotates halves, Meta pairs.

A folder with a tower, BLIP-2's or CLIP's, is given beside the LLaMA, as one checkpoint more. Of BLIP-2 the vision
transformer and the Q-Former are read, not its language model; of CLIP the vision transformer, not its text side. CLIP
may also be as open_clip saves it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import read_json, read_object
from llama_acc.core.model.config import ModelConfig, RopeScaling, RopeType, config_from_params, with_hidden_dim
from llama_acc.core.model.tuning import FULL
from llama_acc.core.model.tuning.bias_norm import BiasNorm
from llama_acc.core.model.vision_config import ClipVision, QFormerVision, Vision, vision_of

if TYPE_CHECKING:
    from llama_acc.core.checkpoint.lazy import LazyTensor

INDEX_FILE = "model.safetensors.index.json"
_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_BLOCK_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
_BUFFER = re.compile(r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # older files; follows from the shape
_NEEDED = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
# Read only by what this toolkit does not compute; any other value is refused.
_ONLY = {"hidden_act": ("silu", "swish"), "quantization_config": (None,)}
# What transformers 5 takes where a key is absent, by model_type; first what they have in common.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {"rms_norm_eps": 1e-6, "default_theta": 10000.0, "tie_word_embeddings": False},
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
    "granite": {"max_position_embeddings": 2048},
}
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_DEFAULTS["granite"] |= dict.fromkeys(_MULTIPLIERS, 1.0)
FAMILIES = tuple(_DEFAULTS)[1:]
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
}


def meta_name(name: str) -> str | None:
    """Meta's name of a tensor; one that is not known stays as it is; None: a buffer, to be ignored."""
    if _BUFFER.fullmatch(name):
        return None
    module, _, kind = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if block and block[2] in _BLOCK_NAMES:
        return f"layers.{block[1]}.{_BLOCK_NAMES[block[2]]}.{kind}"
    return name


def huggingface_name(name: str) -> str:
    """Hugging Face's name of a tensor of a LLaMA."""
    module, _, kind = name.rpartition(".")
    if block := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
        theirs = {ours: theirs for theirs, ours in _BLOCK_NAMES.items()}[block[2]]
        return f"model.layers.{block[1]}.{theirs}.{kind}"
    return f"{ {ours: theirs for theirs, ours in _NAMES.items()}[module] }.{kind}"


def rotated_heads(name: str, config: ModelConfig) -> int | None:
    """How many heads have their rows reordered in a tensor (Meta's name); None = its rows are no queries or keys."""
    match = re.search(r"attention\.(wq|wk|[qk]_norm)\.(weight|bias|lora_b\.weight)$", name)
    return None if match is None else {"wq": config.n_heads, "wk": config.kv_heads}.get(match[1], 1)


def read_huggingface(path: Path) -> tuple[ModelConfig, Mapping[str, Any], list[str]]:
    """The shape in a Hugging Face config.json, everything it holds, and notes on keys that disagree.

    With biases on all matrices it is the shape of bias-norm tuning.
    """
    said = read_object(path)
    family = said.get("model_type", "")
    if family not in FAMILIES:
        raise _not_computed(path, [_unknown_family(family)])
    values = {**_DEFAULTS[""], **_DEFAULTS[family], **said}
    problems = [
        f"{key}: {_shown(values.get(key))} (only {_shown(known[0])})"
        for key, known in _ONLY.items()
        if values.get(key, known[0]) not in known
    ]
    problems += [f"missing key '{key}'" for key in (*_NEEDED.values(), "intermediate_size") if values.get(key) is None]
    notes: list[str] = []
    theta, scaling = _rope(values, path, problems, notes)
    has_bias = {key: bool(values.get(key)) for key in ("attention_bias", "mlp_bias")}
    if len(set(has_bias.values())) > 1:
        problems.append(", ".join(f"{key}: {_shown(has)}" for key, has in has_bias.items()) + " (only both or none)")
    if problems:
        raise _not_computed(path, problems)
    params = {ours: values[theirs] for ours, theirs in _NEEDED.items()} | {
        "n_kv_heads": values.get("num_key_value_heads"),
        "norm_eps": values["rms_norm_eps"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_seq_len": values["max_position_embeddings"],
        "head_dim": values.get("head_dim"),
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "tie_word_embeddings": values["tie_word_embeddings"],
        "family": family,
    }
    if family == "granite":
        params |= {key: values[key] for key in _MULTIPLIERS}
    layers = range(config_from_params(params, path).n_layers)
    config = config_from_params({**params, **_layer_kinds(values, layers, path)}, path)
    config = with_hidden_dim(config, values["intermediate_size"], path)
    if config.head_dim == config.dim / config.n_heads:
        config = replace(config, head_dim=None)
    return replace(config, tuning=BiasNorm() if has_bias["attention_bias"] else FULL), values, notes


def _unknown_family(family: Any) -> str:
    known = f"known are {', '.join(FAMILIES)}"
    if not family:
        return f"missing key 'model_type' ({known})"
    near = get_close_matches(str(family), FAMILIES, n=1)  # relatives are named after each other
    hint = f"; nearest is {near[0]}, whose layers it does not share" if near else ""
    return f"model_type: {_shown(family)} ({known}{hint})"


def _layer_kinds(values: Mapping[str, Any], layers: range, path: Path) -> dict[str, Any]:
    """Which layers see a window of positions only, and which do not rotate, by the names of params.json."""
    family, found = values["model_type"], dict[str, Any]()
    if family == "smollm3":
        every = values["no_rope_layer_interval"]
        rotates = values.get("no_rope_layers") or [(layer + 1) % every for layer in layers]
        found["nope_layers"] = [layer for layer, does in zip(layers, rotates, strict=False) if not does]
    is_off = family not in ("llama", "mistral", "granite") and not values.get("use_sliding_window")
    if is_off and "sliding_attention" in (values.get("layer_types") or ()):
        text = "layer_types: sliding_attention, but use_sliding_window is not true (transformers fails or has windows)"
        raise _not_computed(path, [text])
    window = values.get("sliding_window") if family == "mistral" or values.get("use_sliding_window") else None
    if window is None or family == "llama":
        return found
    windowed = {
        "mistral": list(layers),
        "smollm3": found.get("nope_layers", []),
    }.get(family, [layer for layer in layers if layer >= values.get("max_window_layers", 0)])
    if family != "mistral" and (kinds := values.get("layer_types")):
        if unknown := sorted(set(map(str, kinds)) - {"full_attention", "sliding_attention"}):
            raise _not_computed(path, [f"layer_types: {', '.join(unknown)} (only full_attention, sliding_attention)"])
        windowed = [layer for layer, kind in zip(layers, kinds, strict=False) if kind == "sliding_attention"]
    return {**found, "sliding_window": window, "window_layers": None if len(windowed) == len(layers) else windowed}


def _not_computed(path: Path, problems: Sequence[str]) -> UserError:
    return UserError(f"{path} describes a model that cannot be computed here:\n{listed(problems)}")


def _shown(value: Any) -> str:
    return f"{json.dumps(value):.60}"


def _rope(values: Mapping[str, Any], path: Path, problems: list[str], notes: list[str]) -> tuple[float, Any]:
    """The base of the frequencies and how they are scaled, as params.json has it.

    transformers 5 keeps both in `rope_parameters`; it takes `rope_scaling`, the older key, in its place where both are
    there, and `rope_theta` besides only where that has none (PreTrainedConfig.convert_rope_params_to_dict, 5.24).
    """
    used, *unused = [key for key in ("rope_scaling", "rope_parameters") if values.get(key)] or ["rope_parameters"]
    theta, scaling = found = _rotation(values, used, problems)
    for key in unused:
        if _rotation(values, key, []) != found:
            notes.append(f"{path}: {used} and {key} disagree; {used} counts, as in transformers")
    if values.get("rope_theta", theta) != theta:
        outer = _shown(values["rope_theta"])
        notes.append(f"{path}: rope_theta is {outer}, and {_shown(theta)} in {used}, which counts, as in transformers")
    return theta, scaling


def _rotation(values: Mapping[str, Any], key: str, problems: list[str]) -> tuple[Any, Any]:
    rope = values.get(key) or {}
    if not isinstance(rope, Mapping):
        problems.append(f"{key}: {_shown(rope)} (a mapping is expected)")
        rope = {}
    theta = rope.get("rope_theta", values.get("rope_theta", values["default_theta"]))
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) not in (None, 1, 1.0):
        problems.append("partial_rotary_factor: only 1")
    if kind == "default":
        return theta, None
    if kind not in get_args(RopeType):
        problems.append(f"{key}: {_shown(kind)} (only default, {', '.join(get_args(RopeType))})")
        return theta, None
    names = {field.name for field in fields(RopeScaling)}
    given = {name: value for name, value in rope.items() if name in names and value is not None}
    if kind == "linear" and isinstance(factor, (int, float)) and 1e-9 < factor < 1e9 and factor is not True:
        return theta, 1.0 / factor
    if kind == "yarn" and factor is None and given.get("original_max_position_embeddings"):
        given["factor"] = values["max_position_embeddings"] / given["original_max_position_embeddings"]
    return theta, {**given, "rope_type": kind}


def huggingface_config(config: ModelConfig, dtype: str, special_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a shape. `dtype` is torch's name: bfloat16; what `special_ids` lacks of `bos_token_id` and
    `eos_token_id` is transformers' own, 1 and 2."""
    family, layers = _exported_family(config), range(config.n_layers)
    scaling: dict[str, Any] | None = None
    if isinstance(config.rope_scaling, RopeScaling):
        scaling = {"type": config.rope_scaling.rope_type, **config.rope_scaling.to_json()}
    elif config.rope_scaling is not None:
        scaling = {"type": "linear", "rope_type": "linear", "factor": 1.0 / config.rope_scaling}
    values: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        # rope_theta and rope_scaling are where transformers 4 looks; 5 reads them too.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "pad_token_id": None,
        **special_ids,
    }
    if family == "granite":
        values |= {key: getattr(config, key) or config.head_size**-0.5 for key in _MULTIPLIERS}
    if family in ("llama", "smollm3", "granite"):
        values |= dict.fromkeys(("attention_bias", "mlp_bias"), isinstance(config.tuning, BiasNorm))
    if family == "smollm3":
        values["no_rope_layers"] = [int(layer not in config.nope_layers) for layer in layers]
    if family not in ("llama", "granite"):
        values["sliding_window"] = config.sliding_window
    if family not in ("llama", "mistral", "granite"):
        windowed = (
            () if config.sliding_window is None else layers if config.window_layers is None else config.window_layers
        )
        values["use_sliding_window"] = config.sliding_window is not None
        values["layer_types"] = ["sliding_attention" if i in windowed else "full_attention" for i in layers]
        values["max_window_layers"] = min(windowed, default=config.n_layers)  # what transformers before 4.53 reads
    return values


def _exported_family(config: ModelConfig) -> str:
    """The model_type to export as: the family, or where that has no place for a bias of every matrix, llama."""
    if not isinstance(config.tuning, BiasNorm) or config.family in ("llama", "smollm3", "granite"):
        return config.family
    if config.qk_norm or config.sliding_window is not None:
        raise UserError(
            f"Hugging Face's {config.family} has no place for the biases of {config.tuning.method}",
            "keep the checkpoint as it is: --to consolidated",
        )
    return "llama"


# Vision towers

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
    """The kind and shape of the vision tower that a Hugging Face config.json describes; None = it is no tower's."""
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
    """The shape of the vision tower that an open_clip_config.json describes."""
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
