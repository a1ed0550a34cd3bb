"""llama-acc on the baselines' tasks: the same items, order, weights and options; one JSON line.

python benchmarks/ours.py train --shape 15M --data alpaca.json --tokenizer tokenizer.model [--precision bf16]
python benchmarks/ours.py lora --shape 60M --data ... --tokenizer ... [--precision bf16 --nf4]
python benchmarks/ours.py generate --shape 15M --data ... --tokenizer ... --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from tasks import (
    BETAS,
    CLIP_NORM,
    LEARNING_RATE,
    LORA_RANK,
    NEW_TOKENS,
    PROMPT_TOKENS,
    Item,
    add_task_arguments,
    checkpoint_folder,
    generation_result,
    load_items,
    micro_batches,
    training_result,
)

from llama_acc import load_model
from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.load import load_parameters, read_weights
from llama_acc.core.data.batches import MicroBatch
from llama_acc.core.device import prepare_cpu
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.generate.engine import Engine, Prompt
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.model.transformer import build_on_meta, freeze_untrained, initialize, quantize_on_meta
from llama_acc.core.model.tuning.lora import LoRA
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.optimizer import ClippedAdamW
from llama_acc.core.train.step import train_step

CPU = torch.device("cpu")


def stream(items: list[Item]) -> MicroBatch:
    """The items end to end."""
    return MicroBatch(
        tokens=np.concatenate([np.array(item.tokens, dtype=np.int64) for item in items]),
        targets=np.concatenate([np.array([*item.labels[1:], -100], dtype=np.int64) for item in items]),
        positions=np.concatenate([np.arange(len(item.tokens), dtype=np.int64) for item in items]),
        lengths=[len(item.tokens) for item in items],
    )


def run_train(args: argparse.Namespace) -> dict:
    """Train one pass with llama-acc's model, loss and optimizer: everything, or LoRA pairs."""
    prepare_cpu()
    batches = micro_batches(load_items(args), args.batch_size)
    layout = inspect(checkpoint_folder(args))
    config = read_config([layout])
    assert config is not None
    if args.name == "lora":
        config = replace(config, tuning=LoRA(LORA_RANK))
    model = build_on_meta(config, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    freeze_untrained(model)
    if args.nf4:
        quantize_on_meta(model)
    model.to_empty(device=CPU)
    weights = read_weights([layout])
    initialize(model, 0, set(model.specs) - set(weights.tensors))
    load_parameters(model, weights)
    optimizer = ClippedAdamW(model, model.specs, betas=BETAS, eps=1e-8, weight_decay=0.0, clip_grad_norm=CLIP_NORM)
    alone = DataParallel(model, Parallel(), "ddp", False, "cpu")
    losses = []
    profile = torch.profiler.profile(with_flops=True, record_shapes=True) if args.profile else nullcontext()
    start = time.perf_counter()
    with profile as profiler:
        for items in batches:
            batch = stream(items)
            label_tokens = int((batch.targets != -100).sum())
            result = train_step(model, optimizer, alone, [batch], label_tokens, LEARNING_RATE, CPU)
            losses.append(result.loss.item())
    if profiler is not None:
        averages = profiler.key_averages(group_by_input_shape=True)
        print(averages.table("self_cpu_time_total", row_limit=60), file=sys.stderr)
    return training_result(args, batches, time.perf_counter() - start, losses) | {"precision": args.precision}


def run_generate(args: argparse.Namespace) -> dict:
    """Generate greedily with llama-acc; the median of three runs after a short one to warm up."""
    prompt = load_items(args)[0].tokens[:PROMPT_TOKENS]
    loaded = load_model(checkpoint_folder(args), device="cpu", dtype=getattr(torch, args.dtype))
    loaded.tokenizer.end_ids = frozenset()  # every run makes exactly as many tokens as asked

    def answer(new_tokens: int) -> int:
        sampler = Sampler(Sampling(temperature=0, max_new_tokens=new_tokens))
        return sum(1 for _ in Engine(loaded).generate([Prompt(prompt)], sampler))

    answer(8)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        made = answer(NEW_TOKENS)
        seconds.append(time.perf_counter() - start)
        if made != NEW_TOKENS:
            raise RuntimeError(f"generated {made} tokens instead of {NEW_TOKENS}")
    return generation_result(args, statistics.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description="llama-acc on a task, one JSON line.")
    parser.add_argument("name", choices=["train", "lora", "generate"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="for training only")
    parser.add_argument("--nf4", action="store_true", help="for lora only: the base is quantized")
    parser.add_argument("--profile", action="store_true", help="for training only: also the time of each operation")
    add_task_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps({"train": run_train, "lora": run_train, "generate": run_generate}[args.name](args)))


if __name__ == "__main__":
    main()
