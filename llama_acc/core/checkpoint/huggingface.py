"""Hugging Face's LLaMA: its config.json and its names, there and back. Imports no torch.

Its q_proj and k_proj have their rows in another order (see `lazy.reorder_heads`): it rotates halves, Meta pairs.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import read_object
from llama_acc.core.model.config import WIDEST, ModelConfig, config_from_params
from llama_acc.core.model.tuning import FULL
from llama_acc.core.model.tuning.bias_norm import BiasNorm

INDEX_FILE = "model.safetensors.index.json"
_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_BLOCK_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
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
_ONLY = {"model_type": ("llama",), "hidden_act": ("silu", "swish"), "quantization_config": (None,)}


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
    match = re.search(r"attention\.w([qk])\.(weight|bias|lora_b\.weight)$", name)
    return None if match is None else config.n_heads if match[1] == "q" else config.kv_heads


def read_huggingface(path: Path) -> tuple[ModelConfig, Mapping[str, Any], list[str]]:
    """The shape in a Hugging Face config.json, everything it holds, and notes on keys that disagree.

    With biases it is the shape of bias-norm tuning.

    Raises:
        UserError: unreadable, or a model that this toolkit does not compute; every reason listed.
    """
    values = read_object(path)
    problems = [
        f"{key}: {_shown(values.get(key))} (only {_shown(known[0])})"
        for key, known in _ONLY.items()
        if values.get(key, known[0]) not in known
    ]
    if "model_type" not in values:
        problems.append("missing key 'model_type'")
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
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_seq_len": values.get("max_position_embeddings", 2048),
    }
    config = _with_width(config_from_params(params, path), values["intermediate_size"], path)
    if values.get("head_dim") not in (None, config.head_dim):
        only = f"hidden_size / num_attention_heads = {config.head_dim}"
        raise _not_computed(path, [f"head_dim: {_shown(values['head_dim'])} (only {only})"])
    return replace(config, tuning=BiasNorm() if has_bias["attention_bias"] else FULL), values, notes


def _not_computed(path: Path, problems: Sequence[str]) -> UserError:
    return UserError(f"{path} describes a model that cannot be computed here:\n{listed(problems)}")


def _shown(value: Any) -> str:
    return f"{json.dumps(value):.60}"


def _rope(values: Mapping[str, Any], path: Path, problems: list[str], notes: list[str]) -> tuple[float, float | None]:
    """The base of the frequencies and the factor on positions.

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


def _rotation(values: Mapping[str, Any], key: str, problems: list[str]) -> tuple[Any, float | None]:
    rope = values.get(key) or {}
    if not isinstance(rope, Mapping):
        problems.append(f"{key}: {_shown(rope)} (a mapping is expected)")
        rope = {}
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) not in (None, 1, 1.0):
        problems.append("partial_rotary_factor: only 1")
    if kind == "default":
        return theta, None
    is_linear = kind == "linear" and not isinstance(factor, bool)
    if is_linear and isinstance(factor, (int, float)) and 0 < factor < 1e9:
        return theta, 1.0 / factor
    problems.append(f"{key}: {_shown(kind)} (only linear with a factor, or default)")
    return theta, None


def _with_width(config: ModelConfig, width: Any, path: Path) -> ModelConfig:
    """The shape with a SwiGLU width of exactly `width`, in params.json's terms; as Meta writes it where that fits."""
    if not isinstance(width, int) or isinstance(width, bool) or not 0 < width <= WIDEST:
        problem = f"intermediate_size must be a whole number from 1 to {WIDEST:,}, not {_shown(width)}"
        raise UserError(f"the model's shape in {path} is not usable:\n  {problem}")
    for multiplier in (None, 1.3):
        for multiple_of in (256, 1024, 4096, 128, 64, 32, 16):
            usual = replace(config, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
            if usual.hidden_dim == width:
                return usual
    # Rounded up to a multiple of itself, what is above 0 and not above the width becomes the width.
    exact = replace(config, multiple_of=width, ffn_dim_multiplier=None)
    return exact if exact.hidden_dim == width else replace(exact, ffn_dim_multiplier=width / int(8 * config.dim / 3))


def huggingface_config(config: ModelConfig, dtype: str, tied: bool, special_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a shape.

    Args:
        config: the shape.
        dtype: type of the weights, by torch's name: bfloat16.
        tied: the output matrix is the embedding, and not in the file.
        special_ids: `bos_token_id` and `eos_token_id`; those that are not given are transformers' own, 1 and 2.
    """
    # rope_theta and rope_scaling are where transformers 4 looks; 5 reads them too.
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if config.rope_scaling is None
        else {"type": "linear", "rope_type": "linear", "factor": 1.0 / config.rope_scaling},
        "hidden_act": "silu",
        "attention_bias": isinstance(config.tuning, BiasNorm),
        "mlp_bias": isinstance(config.tuning, BiasNorm),
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        **special_ids,
    }
