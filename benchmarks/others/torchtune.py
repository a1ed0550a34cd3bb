"""Counts what torchtune's `lora_finetune_single_device` recipe took in April 2024, when its figures were published.

    git clone https://github.com/pytorch/torchtune && git -C torchtune checkout eef59f7a9
    pip install --no-deps --target OLD torchao==0.1
    PYTHONPATH=OLD python benchmarks/others/torchtune.py torchtune

Its model, and torchao's tensors in NF4, are imported and run unchanged on tensors without values, in the order of the
recipe: made, loaded, trained. What torchtune imports and does not need for that (datasets, omegaconf, pkg_resources and
the rest of torchao) is put in its place from outside, empty. Its published figures (in qlora_finetune.rst and
lora_finetune.rst of its documentation) are of memory *reserved*, which never falls: what making and loading the model
left in reserve is part of what training is said to take.

Alpaca's examples are cut at 512 tokens, and the longer of a batch's two is taken to have as many.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import packaging.version
import torch
from counting import LineTracker, Row, backward, counted, label_lasting, made_of, main_of, phases
from torch import nn

from llama_acc.core.memory.tracker import Phase

LENGTH = 512
"""Tokens of an example at most (`alpaca_cleaned_dataset`)."""
BATCH = 2
EVERY = ("q_proj", "v_proj", "k_proj", "output_proj")
ROWS = (
    Row("7B LoRA, after loading", 13.98, {"until": "loaded"}, "reserved"),
    Row("7B LoRA, training", 15.57, {}, "reserved"),
    Row("7B LoRA of all layers, training", 15.87, {"everywhere": True}, "reserved"),
    Row("7B QLoRA, after loading", 9.13, {"quantize": True, "until": "loaded"}, "reserved"),
    Row("7B QLoRA, training", 9.29, {"quantize": True}, "reserved"),
)


class _Empty(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_from(source: Path) -> None:
    """Makes the checkout's `torchtune` importable."""
    sys.path.insert(0, str(source.resolve()))
    for name in ("datasets", "omegaconf", "pkg_resources", "torchao.quantization", "torchao.quantization.quant_api"):
        sys.modules[name] = module = _Empty(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
    sys.modules["pkg_resources"].packaging = packaging  # type: ignore[attr-defined]


def build(quantize: bool, everywhere: bool) -> nn.Module:
    """The model as `_setup_model` makes it for 7B_lora_single_device.yaml, or 7B_qlora_single_device.yaml.

    Args:
        quantize: which of the two.
        everywhere: with pairs for all matrices, which the second has in any case, but for the output's.
    """
    code, peft = importlib.import_module("torchtune.models.llama2"), importlib.import_module("torchtune.modules.peft")
    torch.set_default_dtype(torch.bfloat16)
    try:
        if quantize:
            model = code.qlora_llama2_7b(EVERY, apply_lora_to_mlp=True, lora_rank=8, lora_alpha=16)
        else:
            where = EVERY if everywhere else ("q_proj", "v_proj")
            model = code.lora_llama2_7b(where, everywhere, everywhere, lora_rank=8, lora_alpha=16)
    finally:
        torch.set_default_dtype(torch.float32)
    peft.peft_utils.set_trainable_params(model, peft.peft_utils.get_adapter_params(model))
    layer = importlib.import_module("torchtune.modules").TransformerDecoderLayer
    importlib.import_module("torchtune.utils").set_activation_checkpointing(model, auto_wrap_policy={layer})
    return model


@torch.no_grad()
def load(model: nn.Module) -> None:
    """What loading the base's weights from the host does: a matrix to be quantized is on the GPU in bfloat16, first."""
    for parameter in model.parameters():
        if len(made_of(parameter)) > 1:
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.bfloat16))


def train(tracker: LineTracker, model: Any, lengths: Iterable[int]) -> None:
    """The recipe's loop over batches of some lengths, with its variables: what they hold stays until they are set anew.

    It updates after every batch, so that there is optimizer state from the second on; torchtune does after 16 or 64.
    """
    optimizer, loss_fn = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01), nn.CrossEntropyLoss()
    for length in lengths:
        input_ids, labels = (torch.zeros(BATCH, length, dtype=torch.int64) for _ in range(2))
        tracker.at(Phase("forward"))
        logits = model(input_ids)
        logits = logits[..., :-1, :].contiguous()
        labels = labels[..., 1:].contiguous()
        logits = logits.transpose(1, 2)
        tracker.label([logits], "logits and loss")  # it stays after the backward pass
        loss = loss_fn(logits, labels)
        loss = loss / 64
        backward(tracker, loss)
        tracker.at(Phase("update"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tracker.ended("update")


def count(
    source: Path,
    quantize: bool = False,
    everywhere: bool = False,
    until: str = "trained",
    lengths: Iterable[int] = (LENGTH, LENGTH),
) -> LineTracker:
    """Tracks a run: making and loading the model, or steps after that."""
    with counted(source) as tracker:
        model = build(quantize, everywhere)
        load(model)
        if until == "loaded":
            return tracker
        label_lasting(tracker, model)
        blocks = [layer._checkpoint_wrapped_module for layer in model.layers]
        with phases(tracker, blocks, model.output):
            train(tracker, model, lengths)
    return tracker


if __name__ == "__main__":
    main_of(__doc__, import_from, ROWS, count)
