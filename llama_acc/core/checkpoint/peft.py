"""The adapter files of the PEFT library (adapter_config.json, adapter_model.safetensors). Imports no torch."""

from typing import Any

from llama_acc.core.checkpoint.huggingface import huggingface_name
from llama_acc.core.model.tuning import Tuning

PEFT_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def peft_name(name: str, tuning: Tuning) -> str:
    """PEFT's name of a parameter that was trained by a method."""
    for ours, theirs in tuning.peft_names.items():
        if name.endswith(f".{ours}"):
            matrix = huggingface_name(name.removesuffix(ours) + "weight").removesuffix("weight")
            return f"{_PREFIX}{matrix}{theirs}"
    return _PREFIX + huggingface_name(name)


def peft_config(tuning: Tuning, base: str | None) -> dict[str, Any]:
    """adapter_config.json.

    Args:
        tuning: a method that PEFT has.
        base: the Hugging Face model it goes on; None = not known.
    """
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        **tuning.peft_config(),
    }
