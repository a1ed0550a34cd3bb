"""What becomes of what was tuned: an adapter of the PEFT library, read and written, or LoRA pairs merged into their
matrices.

The adapter is adapter_config.json and adapter_model.safetensors. Of a merge there is proof that the model computes the
same after it: the logits of a few fixed tokens are compared.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama_acc.core.catalogue import hub_name
from llama_acc.core.checkpoint.huggingface import huggingface_name, meta_name
from llama_acc.core.checkpoint.layout import PEFT_CONFIG, PEFT_FILES, Layout
from llama_acc.core.checkpoint.lazy import LazyTensor, blocks_of
from llama_acc.core.checkpoint.load import open_shard
from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import read_object
from llama_acc.core.model.attention import DocumentAttention
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.layers import RMSNorm, scaled
from llama_acc.core.model.rotary import rotary_table
from llama_acc.core.model.transformer import build_on_meta, is_matrix
from llama_acc.core.model.tuning import MATRICES, Tuning, whole_number
from llama_acc.core.model.tuning.lora import LoRA, LoRABiasNorm

PEFT_FILE = PEFT_FILES[0]
# Keys of adapter_config.json that are read, or do not change what the adapter computes.
_KNOWN = frozenset(
    "peft_type r lora_alpha lora_dropout use_rslora lora_bias bias init_lora_weights target_modules modules_to_save "  # noqa: SIM905
    "base_model_name_or_path revision task_type inference_mode auto_mapping peft_version loftq_config eva_config "
    "megatron_core qalora_group_size layers_pattern exclude_modules ensure_weight_tying runtime_config".split()
)
_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")  # of the pairs, that leave the base as it was
_PREFIX = "base_model.model."
MERGE_TOLERANCE = 1e-5
"""How far logits may be off, as a fraction of the largest: rounding, which grows with depth, stays far below."""
_TOKENS = 32
Model = tuple[ModelConfig, Mapping[str, LazyTensor]]


def peft_name(name: str, tuning: Tuning) -> str:
    """PEFT's name of a parameter that was trained by a method."""
    for ours, theirs in tuning.peft_names.items():
        if name.endswith(f".{ours}"):
            matrix = huggingface_name(name.removesuffix(ours) + "weight").removesuffix("weight")
            return f"{_PREFIX}{matrix}{theirs}"
    return _PREFIX + huggingface_name(name)


def peft_tensor(name: str, tensor: LazyTensor, tuning: Tuning) -> LazyTensor:
    """The values that PEFT's file has of a parameter that was trained by a method."""
    return _scaled(name, tensor, 1 / tuning.peft_bias_factor)


def _scaled(name: str, tensor: LazyTensor, factor: float) -> LazyTensor:
    """A bias times a factor; anything else unchanged."""
    if factor == 1.0 or not name.endswith(".bias"):
        return tensor

    def read(rows: slice, columns: slice) -> Tensor:
        return tensor.block(rows).to(torch.float32) * factor

    return LazyTensor.computed((tensor,), read, tensor.shape)


def read_peft(layout: Layout) -> tuple[Tuning, dict[str, LazyTensor]]:
    """The method of an adapter of PEFT, and its tensors by Meta's names; rows of queries and keys are in its order.

    Which matrices have a pair is told from the tensors, so `target_modules` may be said in any way.
    """
    config = read_object(layout.folder / PEFT_CONFIG)
    problems = [f"{key}: {json.dumps(value)}" for key, value in config.items() if value and key not in _KNOWN]
    kind, bias, start = config.get("peft_type"), config.get("bias", "none"), str(config.get("init_lora_weights", True))
    problems += [f"peft_type: {kind}"] * (kind != "LORA") + [f"bias: {bias}"] * (bias != "none")
    if start.lower() not in _STARTS:
        problems.append(f"init_lora_weights: {start}, which changes the base, or may")
    tensors = {_meta_name(name): tensor for name, tensor in open_shard(layout.shards[0]).items()}
    paired = [name.removesuffix(".lora_a.weight") for name in tensors if name.endswith(".lora_a.weight")]
    targets = {name.rpartition(".")[2] for name in paired}
    problems += [f"a LoRA pair of {name}" for name in paired if name.rpartition(".")[2] not in MATRICES]
    if config.get("lora_bias") and targets != set(MATRICES):
        problems.append("lora_bias on some of the matrices only")
    if problems or not targets:
        raise refusal(layout, problems or ["no LoRA pairs"])
    said = {"lora_alpha": 8, **config}  # PEFT's own, where the file does not say
    settings = {key: said[key] for key in ("lora_alpha", "use_rslora", "lora_dropout") if said.get(key) is not None}
    method = LoRABiasNorm if config.get("lora_bias") else LoRA
    tuning = method(whole_number(config, "r", 8)).with_said({**settings, "lora_targets": sorted(targets)})
    return tuning, {name: _scaled(name, tensor, tuning.peft_bias_factor) for name, tensor in tensors.items()}


def refusal(layout: Layout, problems: Sequence[str]) -> UserError:
    """That an adapter of PEFT has what is not computed here."""
    return UserError(
        f"{layout.folder} is an adapter of PEFT that cannot be read; it has\n{listed(problems)}",
        "merge it with PEFT: AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)",
    )


def peft_notes(layout: Layout, bases: Sequence[Layout]) -> list[str]:
    """A note if an adapter of PEFT says another base than the one it was given on, going by their names."""
    said = read_object(layout.folder / PEFT_CONFIG).get("base_model_name_or_path")
    folders = [base.folder.resolve() for base in bases]
    names = {name.lower() for folder in folders for name in (folder.name, hub_name(str(folder)) or "")}
    if not said or not names.isdisjoint((str(said).lower(), Path(str(said)).name.lower())):
        return []
    return [f"{layout.folder} says that its base is {said}; it goes on {' and '.join(map(str, folders))}"]


def _meta_name(theirs: str) -> str:
    name = theirs.removeprefix(_PREFIX)
    for ours, suffix in LoRABiasNorm.peft_names.items():
        if name.endswith(f".{suffix}"):
            matrix = name.removesuffix(suffix)
            return (meta_name(f"{matrix}weight") or matrix).removesuffix("weight") + ours
    return meta_name(name) or name


def peft_config(config: ModelConfig, base: str | None) -> dict[str, Any]:
    """adapter_config.json of a method that PEFT has, on a base of Hugging Face; None = not known."""
    values = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        **config.tuning.peft_config(),
    }
    if config.qk_norm and values["modules_to_save"]:
        values["modules_to_save"] += ["q_norm", "k_norm"]
    return values


class MergeError(NamedTuple):
    """The largest differences of logits from those before merging, over the largest magnitude, computed in float64:
    with the matrices merged in float32, and as they are saved."""

    exact: float
    saved: float


def merged(name: str, sources: Mapping[str, LazyTensor], tuning: Tuning) -> LazyTensor:
    """A parameter with what the tuning method has beside it merged into it, in float32, if it is a matrix."""
    beside = name.removesuffix("weight")
    added = {other.removeprefix(beside): tensor for other, tensor in sources.items() if other.startswith(beside)}
    if not is_matrix(name) or len(added) == 1:
        return sources[name]
    matrix = added.pop("weight")

    def read(rows: slice, columns: slice) -> Tensor:
        # All columns, so that a shard's values are those of the whole to the bit.
        whole = {name: tensor.to(torch.float32) for name, tensor in added.items()}
        return tuning.merge(matrix.block(rows).to(torch.float32, copy=True), rows.start, whole)[:, columns]

    return LazyTensor.computed((matrix, *added.values()), read, matrix.shape)


@torch.no_grad()
def merge_error(before: Model, merged_model: Model, saved: Model) -> MergeError:
    """Compares models: before merging, after it, and as saved. Only one block is held at a time."""
    config, models = before[0], (before, merged_model, saved)
    tokens = torch.randint(config.vocab_size, (_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    states = [
        torch.cat([sources["tok_embeddings.weight"].rows(token, token + 1).to(torch.float64) for token in tokens])
        for _, sources in models
    ]
    states = [scaled(state, config.embedding_multiplier) for state in states]
    attend = DocumentAttention([_TOKENS], rotary_table(config, _TOKENS, torch.device("cpu")))
    for layer in range(config.n_layers):
        for place, (own, sources) in enumerate(models):
            block = build_on_meta(own.of_blocks([layer]), torch.float32).to_empty(device="cpu").layers[0].double()
            for name, parameter in block.named_parameters():
                sources[f"layers.{layer}.{name}"].copy_into(parameter)
            states[place] = block(states[place], attend)
    expected, exact, as_saved = (_logits(*model, state) for model, state in zip(models, states, strict=True))
    largest = expected.abs().max().clamp(min=1e-30)
    return MergeError(*(((found - expected).abs().max() / largest).item() for found in (exact, as_saved)))


def _logits(config: ModelConfig, sources: Mapping[str, LazyTensor], x: Tensor) -> Tensor:
    """The logits [T, vocabulary] of the last block's output [T, dim]."""
    norm = RMSNorm(config.dim, config.norm_eps).double()
    output = sources["tok_embeddings.weight" if config.tie_word_embeddings else "output.weight"]
    sources["norm.weight"].copy_into(norm.weight)
    x = norm(x)
    return torch.cat([x @ output.rows(*rows).to(torch.float64).T for rows in blocks_of(output.shape)], 1)
