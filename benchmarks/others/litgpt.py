"""Counts what lit-gpt's `finetune/lora.py` and `generate/base.py` take, as in its tutorials/resource-tables.md.

    git clone https://github.com/Lightning-AI/litgpt && git -C litgpt checkout 6178c7cc
    python benchmarks/others/litgpt.py litgpt

Its model, loss and generation are imported from the checkout and run unchanged on tensors without values. Put in their
place from outside are lightning, which casts what a model returns to float32 and in whose context the model is made in
bfloat16, and bitsandbytes' quantized layers, which lightning makes of every linear one. The published figures are
torch.cuda.max_memory_allocated() / 1e9 after training on Alpaca, whose longest example comes first: at 1,304 tokens,
before there is any optimizer state.

The tables name commit 8641822. Up to there norms are computed in bfloat16; what is published is what is counted with
norms that keep their input in float32, as they are since 6178c7cc, of the same month: at 8641822, 3 to 5% less.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from counting import Linear4bit, LineTracker, Row, backward, counted, label_lasting, main_of, phases
from torch import Tensor, nn

from llama_acc.core.memory.tracker import Phase

LONGEST = 1304
"""Tokens of Alpaca's longest example with LLaMA's tokenizer, as published."""
PROMPT, NEW = 6, 50
"""Tokens of generate/base.py's prompt, "Hello, my name is" after a BOS, and how many follow."""
CHUNK = 128
"""Rows of logits at a time (`lm_head_chunk_size`)."""
ROWS = (
    Row("7B LoRA, batch 1, training", 21.30, {"name": "Llama-2-7b-hf"}),
    Row("7B LoRA, batch 2, training", 29.07, {"name": "Llama-2-7b-hf", "batch": 2}),
    Row("7B LoRA NF4, batch 1, training", 14.14, {"name": "Llama-2-7b-hf", "quantize": "nf4"}),
    Row("7B LoRA NF4-dq, batch 1, training", 13.84, {"name": "Llama-2-7b-hf", "quantize": "nf4-dq"}),
    Row("13B LoRA, batch 1, training", 38.12, {"name": "Llama-2-13b-hf"}),
    Row("13B LoRA NF4, batch 1, training", 23.14, {"name": "Llama-2-13b-hf", "quantize": "nf4"}),
    Row("13B LoRA NF4-dq, batch 1, training", 22.55, {"name": "Llama-2-13b-hf", "quantize": "nf4-dq"}),
    Row("7B, inference", 13.52, {"name": "Llama-2-7b-hf", "generating": True}),
    Row("7B NF4, inference", 4.57, {"name": "Llama-2-7b-hf", "quantize": "nf4", "generating": True}),
    Row("7B NF4-dq, inference", 4.26, {"name": "Llama-2-7b-hf", "quantize": "nf4-dq", "generating": True}),
    Row("13B, inference", 26.21, {"name": "Llama-2-13b-hf", "generating": True}),
    Row("13B NF4, inference", 8.32, {"name": "Llama-2-13b-hf", "quantize": "nf4", "generating": True}),
    Row("13B NF4-dq, inference", 7.72, {"name": "Llama-2-13b-hf", "quantize": "nf4-dq", "generating": True}),
)


def import_from(source: Path) -> None:
    """Makes `lit_gpt` and `generate` of a checkout importable, where there need not be any lightning."""
    sys.path.insert(0, str(source.resolve()))
    wanted = {
        "lightning": "",
        "lightning.fabric": "",
        "lightning.fabric.plugins": "BitsandbytesPrecision",
        "lightning.fabric.strategies": "FSDPStrategy",
        "lightning.fabric.utilities": "",
        "lightning.fabric.utilities.load": "_lazy_load",
        "lightning_utilities": "",
        "lightning_utilities.core": "",
        "lightning_utilities.core.imports": "RequirementCache",
    }
    for name, has in wanted.items():
        sys.modules[name] = module = ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        if has:  # as a package it answers whether it is installed: lightning is, FlashAttention is not
            setattr(module, has, lambda requirement, *_: "flash" not in requirement)
    sys.modules["lightning"].Fabric = object  # type: ignore[attr-defined]


@contextmanager
def initialising(quantize: str | None) -> Iterator[None]:
    """lightning's `Fabric.init_module`: bfloat16, and bitsandbytes' layers for linear ones."""
    linear = nn.Linear
    torch.set_default_dtype(torch.bfloat16)
    if quantize:
        nn.Linear = partial(_quantized, quantize == "nf4-dq")  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        nn.Linear = linear  # type: ignore[misc]


def _quantized(twice: bool, columns: int, rows: int, bias: bool) -> Linear4bit:
    assert not bias
    layer = Linear4bit(rows, columns, torch.float16, torch.bfloat16, twice)
    layer.in_features, layer.out_features = columns, rows
    return layer


def called(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """lightning's wrapper of a model: it computes in bfloat16 and returns float32."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = model(*args, **kwargs)
    finally:
        torch.set_default_dtype(torch.float32)
    return [x.float() for x in made] if isinstance(made, list) else made.float()


def count_training(
    source: Path, name: str, quantize: str | None = None, batch: int = 1, length: int = LONGEST
) -> LineTracker:
    """The first iteration of `finetune/lora.py`."""
    code = importlib.import_module("lit_gpt.lora")
    loss_of = importlib.import_module("lit_gpt.utils").chunked_cross_entropy
    config = code.Config.from_name(name=name, r=8, alpha=16, dropout=0.05, to_query=True, to_value=True)
    with counted(source) as tracker:
        with initialising(quantize):
            model = code.GPT(config)
        code.mark_only_lora_as_trainable(model)
        label_lasting(tracker, model)
        model.max_seq_length = length
        tokens, targets = (torch.zeros(batch, length, dtype=torch.int64) for _ in range(2))
        with phases(tracker, model.transformer.h, model.lm_head):
            logits = called(model, tokens, lm_head_chunk_size=CHUNK)
            logits[-1] = logits[-1][..., :-1, :]
            loss = loss_of(logits, targets[..., 1:])
            backward(tracker, loss / 128)
    return tracker


def count_generation(source: Path, name: str, quantize: str | None = None) -> LineTracker:
    """`generate/base.py`."""
    code = importlib.import_module("lit_gpt.model")
    generate = importlib.import_module("generate.base").generate
    with counted(source) as tracker:
        with initialising(quantize):
            model = code.GPT.from_name(name).eval().requires_grad_(False)
            label_lasting(tracker, model)
            tracker.reset_peak()
            model.max_seq_length = PROMPT + NEW
            model.set_kv_cache(batch_size=1)
        caches = [block.attn.kv_cache for block in model.transformer.h]
        tracker.label((tensor for cache in caches for tensor in (cache.k, cache.v)), "KV cache")
        tracker.at(Phase("generation"))
        wrapped = _Called(model)
        generate(wrapped, torch.zeros(PROMPT, dtype=torch.int64), PROMPT + NEW, temperature=0.8, top_k=200)
    return tracker


class _Called:
    def __init__(self, model: Any) -> None:
        self.model, self.max_seq_length = model, model.max_seq_length

    def __call__(self, *args: Tensor) -> Any:
        return called(self.model, *args)


def count(
    source: Path, name: str, quantize: str | None = None, batch: int = 1, generating: bool = False
) -> LineTracker:
    """The fullest moment of a row's run."""
    if generating:
        return count_generation(source, name, quantize)
    return count_training(source, name, quantize, batch)


if __name__ == "__main__":
    main_of(__doc__, import_from, ROWS, count)
