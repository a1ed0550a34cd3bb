"""The adapter files of the PEFT library (adapter_config.json, adapter_model.safetensors). Imports no torch."""

from typing import Any

from llama_acc.core.checkpoint.huggingface import huggingface_name
from llama_acc.core.errors import UserError
from llama_acc.core.model.tuning import Tuning

PEFT_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_NORMS = ["input_layernorm", "post_attention_layernorm", "model.norm"]


def check_peft(tuning: Tuning) -> None:
    """Refuses what PEFT's LoRA has no place for.

    Raises:
        UserError: naming it.
    """
    if tuning.what.prefix:
        raise UserError("PEFT has no place for zero-init attention (prefix, prefix_gate)", "keep it: --to consolidated")
    if not tuning.lora_rank:
        raise UserError(
            f"method {tuning.method} has no LoRA pairs, which is what a PEFT adapter is",
            "use --to hf, which has a place for biases" if tuning.what.bias else "use --to hf",
        )


def peft_name(name: str) -> str:
    """PEFT's name of a parameter that was trained."""
    for ours, theirs in ((".lora_a.weight", ".lora_A.weight"), (".lora_b.weight", ".lora_B.weight")):
        if name.endswith(ours):
            matrix = huggingface_name(name.removesuffix(ours) + ".weight").removesuffix(".weight")
            return f"{_PREFIX}{matrix}{theirs}"
    if name.endswith(".bias"):
        return _PREFIX + huggingface_name(name).replace(".bias", ".lora_B.bias")
    return _PREFIX + huggingface_name(name)


def peft_config(tuning: Tuning, base: str | None) -> dict[str, Any]:
    """adapter_config.json. The factor lora_alpha / r is 1: what a pair adds here has none.

    Args:
        tuning: a method with LoRA pairs.
        base: the Hugging Face model it goes on; None = not known.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": tuning.lora_rank,
        "lora_alpha": tuning.lora_rank,
        "lora_dropout": 0.0,
        # A bias of lora_B is added to the output as one of the matrix would be, and needs none there.
        "bias": "none",
        "lora_bias": bool(tuning.what.bias),
        "target_modules": _MATRICES,
        "modules_to_save": _NORMS if tuning.what.norm else None,
        "inference_mode": True,
    }
