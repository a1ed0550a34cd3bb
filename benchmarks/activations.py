"""What LoRA keeps for its backward pass, and what less of it costs: whole, projected to a low rank, or computed again.

Three parts, for a checkpoint of any size: bytes that blocks keep, also if no pair trains its A; the fullest moment and
the speed of a step, ways in turns; and the loss over some steps. A projection is x P with orthonormal P [n, rank], made
for each kept tensor from what it was before (a step of subspace iteration in every tenth step); the backward pass gets
x P P^T. `inputs` are the matrices' inputs of width dim, `all` is whatever a block keeps.

    python benchmarks/activations.py --pretrained DIR --data alpaca.json --parts kept speed
    python benchmarks/activations.py --pretrained DIR --data alpaca.json --parts loss --ways all-64 --steps 150
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from llama_acc.core.data.batches import MicroBatch, build
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.memory.workspaces import garbage_kept, peak_cpu_bytes
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.base import read_base_weights
from llama_acc.core.train.plan import make_plan
from llama_acc.core.train.runs import Callback
from llama_acc.core.train.step import apply_activation_checkpointing, forward
from llama_acc.core.train.trainer import Trainer

KEYS = [
    *("tuning.method=lora", "optimizer.lr=1e-3", "optimizer.weight_decay=0", "data.max_tokens=256", "train.epochs=1"),
    *("train.global_batch_size=4", "train.batch_size=4", "train.activation_checkpointing=false"),
    "train.warmup_epochs=0",
]
CPU = torch.device("cpu")


class Projected:
    """Keeps what the blocks keep for the backward pass as products with a basis of their own."""

    def __init__(self, dim: int, only_inputs: bool, rank: int) -> None:
        self.dim, self.only_inputs, self.rank = dim, only_inputs, rank
        self.bases: list[Tensor] = []
        self.tokens = self.place = self.heads = self.calls = 0

    def begin(self, tokens: int) -> None:
        self.tokens, self.place, self.heads, self.calls = tokens, 0, 0, self.calls + 1

    def pack(self, x: Tensor) -> Any:
        is_activation = x.is_floating_point() and not isinstance(x, nn.Parameter) and x.shape[:1] == (self.tokens,)
        if not is_activation or x.dim() < 2 or x[0].numel() < 64:
            return x
        self.heads += x.dim() == 3  # queries, keys, values, outputs
        is_input = x.shape[1:] == (self.dim,) or (x.dim() == 3 and self.heads % 4 == 0)
        if self.only_inputs and not is_input:
            return x
        flat = x.detach().flatten(1)
        rank = min(self.rank, flat.shape[1])
        if self.place == len(self.bases):
            start = torch.randn(flat.shape[1], rank, generator=torch.Generator().manual_seed(self.place))
            self.bases.append(torch.linalg.qr(flat.float().T @ (flat.float() @ start))[0].to(x.dtype))
        elif self.calls % 10 == 0:
            turned = flat.T @ (flat @ self.bases[self.place])
            self.bases[self.place] = torch.linalg.qr(turned.float())[0].to(x.dtype)
        basis, self.place = self.bases[self.place], self.place + 1
        return flat @ basis, basis, x.shape

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        low, basis, shape = kept
        return (low @ basis.T).view(shape)


def apply_way(trainer: Trainer, way: str) -> Callable[[int], None]:
    """Lets the blocks keep what `way` says. Returns what is to be told the number of tokens before a step."""
    model = trainer.model
    model.run_block = nn.Module.__call__
    if way == "recomputed":
        apply_activation_checkpointing(model)
    elif way != "whole":
        kind, rank = way.split("-")
        projected = Projected(model.config.dim, kind == "inputs", int(rank))

        def run(*args: Any) -> Tensor:
            with saved_tensors_hooks(projected.pack, projected.unpack):
                return nn.Module.__call__(*args)

        model.run_block = run
        return projected.begin
    return lambda tokens: None


def make_trainer(args: argparse.Namespace) -> Trainer:
    recipe = Recipe.load("alpaca", [*KEYS, f"tuning.lora_rank={args.lora_rank}", f"train.precision={args.precision}"])
    values = recipe.model_dump()
    values["model"]["pretrained"] = str(args.pretrained)
    values["data"]["sources"] = [{"path": str(args.data)}]
    plan = make_plan(Recipe.from_mapping(values), Callback())
    return Trainer(plan, CPU, read_base_weights(plan.layouts, plan.config, Parallel()), Parallel())


def kept_bytes(trainer: Trainer, batch: MicroBatch, a_trains: bool = True) -> Counter[str]:
    """Bytes that the blocks keep, each storage once, by the function that keeps it first."""
    sizes, held, found = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}, [], Counter[str]()
    for name, parameter in trainer.model.named_parameters():
        if "lora_a" in name:
            parameter.requires_grad_(a_trains)

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in sizes:
            sizes.add(storage.data_ptr())
            held.append(x)
            found[f"{'x'.join(map(str, x.shape[1:]))} {x.dtype}"] += storage.nbytes()
        return x

    trainer.model.run_block = nn.Module.__call__
    with saved_tensors_hooks(pack, lambda x: x):
        forward(trainer.model, batch, 1.0, CPU)
    for name, parameter in trainer.model.named_parameters():
        if "lora_a" in name:
            parameter.requires_grad_(True)
    return found


def peak(trainer: Trainer, batch: MicroBatch) -> int:
    """The fullest moment of forward and backward, beside weights and moments."""

    def work() -> None:
        forward(trainer.model, batch, 1.0, CPU).backward()

    for parameter in trainer.model.parameters():
        parameter.grad = None
    with garbage_kept():
        return peak_cpu_bytes(work)


def main() -> None:
    parser = argparse.ArgumentParser(description="What LoRA keeps, whole, at a low rank and computed again.")
    parser.add_argument("--pretrained", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="an Alpaca file")
    parser.add_argument("--parts", nargs="+", default=["kept", "speed", "loss"], choices=["kept", "speed", "loss"])
    parser.add_argument("--ways", nargs="+", default=["whole", "recomputed", "inputs-64", "all-64"])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = make_trainer(args)
    batch = build(trainer.plan.train, trainer.plan.largest_micro_batch(1))
    tokens = len(batch.tokens)
    for part in args.parts:
        if part == "kept":
            for a_trains in (True, False):
                found = kept_bytes(trainer, batch, a_trains)
                print(json.dumps({"a_trains": a_trains, "tokens": tokens, "bytes": found.total(), **found}), flush=True)
        elif part == "speed":
            seconds: dict[str, list[float]] = {way: [] for way in args.ways}
            peaks = {}
            for turn in range(args.rounds + 1):
                for way in args.ways:
                    begin = apply_way(trainer, way)
                    for i in range(2):  # the first makes the bases
                        begin(tokens)
                        start = time.perf_counter()
                        forward(trainer.model, batch, 1.0, CPU).backward()
                        if turn and i:
                            seconds[way].append(time.perf_counter() - start)
                    if not turn:
                        begin(tokens)
                        peaks[way] = peak(trainer, batch)
            for way, taken in seconds.items():
                speed = round(tokens / statistics.median(taken))
                print(json.dumps({"way": way, "peak_mib": round(peaks[way] / 2**20, 1), "tokens_per_second": speed}))
        else:
            for way in args.ways:
                trainer = make_trainer(args)
                begin, losses = apply_way(trainer, way), []
                for step in range(args.steps):
                    begin(int(trainer.plan.train.lengths[trainer.plan.items(step)].sum()))
                    losses.append(trainer.advance()[0].loss.item())
                    if len(losses) % 25 == 0:
                        print(
                            json.dumps({"way": way, "steps": step + 1, "loss": statistics.fmean(losses[-25:])}),
                            flush=True,
                        )


if __name__ == "__main__":
    main()
