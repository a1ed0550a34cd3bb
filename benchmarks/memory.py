"""Memory of tuning and of generation with a quantised base: predicted anywhere, measured on a GPU.

The shapes are the real ones, the weights are zeros: memory does not depend on them, so there is nothing to download.

    python benchmarks/memory.py                     # the prediction, on any machine
    python benchmarks/memory.py --measure           # on a GPU: peak reserved, beside the prediction
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch

from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import ModelConfig, named_size
from llama_acc.core.model.cross_entropy import CHUNK_ROWS
from llama_acc.core.model.transformer import Transformer, build_on_meta, freeze_untrained, quantise_on_meta
from llama_acc.core.model.tuning import Tuning
from llama_acc.core.parallel import Parallel
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.optimizer import ClippedAdamW
from llama_acc.core.train.step import apply_activation_checkpointing, train_step

TOKENS = 512
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A model and a method, and what is to be reached.

    Attributes:
        model: a size known by name.
        tuning: the method.
        training: most GiB in training; None = nothing is said.
        inference: most GiB in generation; None = nothing is said.
    """

    model: str
    tuning: Tuning
    training: float | None
    inference: float | None


LORA = Tuning("lora_bias_norm", 16)
CASES = [
    Case("llama2-70b", Tuning("bias_norm"), 36.5, 34.5),
    Case("llama2-70b", LORA, None, None),
    Case("llama2-13b", LORA, 8.5, None),
    Case("llama2-7b", LORA, 5.2, None),
]


def empty_model(config: ModelConfig) -> Transformer:
    """As finetune and chat make it, in bf16 with NF4, without storage."""
    model = build_on_meta(config, torch.bfloat16)
    freeze_untrained(model)
    quantise_on_meta(model)
    return model


def weight_bytes(model: Transformer) -> int:
    """Bytes of all parameters and scales."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def predicted(config: ModelConfig) -> tuple[float, float]:
    """GiB in training and in generation of `TOKENS` tokens: weights exactly, the rest by count."""
    model = empty_model(config)
    weights = weight_bytes(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kept = config.n_layers * TOKENS * config.dim * 2
    block = TOKENS * (12 * config.dim + 4 * config.hidden_dim) * 2
    written_out = max(config.dim * config.hidden_dim, config.dim * config.vocab_size) * 2
    logits = min(TOKENS, CHUNK_ROWS) * config.vocab_size * (2 + 4)
    # The gradient and two moments of what trains; its own four bytes are among the weights.
    training = weights + 12 * trained + kept + max(block + written_out, logits + written_out)
    cache = 2 * config.n_layers * config.kv_dim * TOKENS * 2
    inference = weights + cache + written_out
    return training / GIB, inference / GIB


def filled(config: ModelConfig, device: torch.device) -> Transformer:
    model = empty_model(config)
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return model


def peak(device: torch.device) -> float:
    """The most GiB this process has reserved on the GPU."""
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else float("nan")


def fresh(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measured_training(config: ModelConfig, device: torch.device) -> float:
    """Three optimizer steps of one document."""
    import numpy as np

    from llama_acc.core.data.batches import MicroBatch

    fresh(device)
    model = filled(config, device)
    apply_activation_checkpointing(model)
    optimizer = ClippedAdamW(model, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.02, clip_grad_norm=2.0)
    alone = DataParallel(model, Parallel(), "ddp", False, device.type)
    tokens = np.arange(TOKENS, dtype=np.int64)
    batch = MicroBatch(tokens=tokens, targets=tokens, positions=tokens, lengths=[TOKENS])
    for _ in range(3):
        train_step(model, optimizer, alone, [batch], TOKENS, 1e-5, device).loss.item()
    return peak(device)


@torch.inference_mode()
def measured_inference(config: ModelConfig, device: torch.device) -> float:
    """A prompt of half the tokens, the other half one by one."""
    fresh(device)
    model, cache = filled(config, device).requires_grad_(False), KVCache(config.n_layers)
    half = TOKENS // 2
    for start, stop in [(0, half), *((place, place + 1) for place in range(half, TOKENS))]:
        positions = torch.arange(start, stop, device=device)
        model.logits(model(positions, positions, [stop - start], caches=[cache])[-1:])
    return peak(device)


def shown(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of training and generation with bases in NF4.")
    parser.add_argument("--measure", action="store_true", help="run it, on --device")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="so many blocks instead of the model's: to try the script")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.measure and device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n")
    print("| model | method | training: at most | predicted | measured | generation: at most | predicted | measured |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        config = replace(named_size(case.model), tuning=case.tuning)
        config = replace(config, n_layers=args.layers or config.n_layers)
        found = (
            (measured_training(config, device), measured_inference(config, device)) if args.measure else (None, None)
        )
        training, inference = predicted(config)
        cells = [case.training, training, found[0], case.inference, inference, found[1]]
        print(f"| {case.model} | {case.tuning.method} | {' | '.join(map(shown, cells))} |", flush=True)


if __name__ == "__main__":
    main()
