#!/usr/bin/env bash
# peft 0.21: a weighted sum of rank-stabilized LoRA adapters is sqrt(rank) times as strong as it should be.
#
# Expected: `add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="cat")` changes a matrix by half of what
#   "a" adds and half of what "b" adds; "svd" with enough ranks, too. With use_rslora=False that is so, to 1e-6.
# Seen: with use_rslora=True the sum is right in direction and too long: four times with "svd" at rank 16, 5.7 times with
#   "cat", whose rank is 32. The new adapter gets lora_alpha = rank, which is a factor of 1 without use_rslora; but it
#   keeps use_rslora, whose factor is alpha / sqrt(rank). No warning; it is saved so, too.
# What follows: the mean of two good adapters answers with nonsense, and looks as if they did not go together. Divide the
#   weights by the square root of the new rank, or add up merged matrices by hand.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2 2>&1 |
    grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" -W ignore - 2> "$folder/log" <<'PYTHON' || { tail -3 "$folder/log"; exit 1; }
import math
import sys

import peft
import torch
from peft import LoraConfig, get_peft_model

print("peft", peft.__version__)
rank, alpha = 16, 32
ratios = {}
for stabilized in (False, True):
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=stabilized, init_lora_weights=False, target_modules=["0"]
    )
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config, "a")
    model.add_adapter("b", config)
    layer = model.base_model.model[0]
    # By hand: what an adapter adds is B A alpha / rank, or B A alpha / sqrt(rank).
    factor = alpha / (math.sqrt(rank) if stabilized else rank)
    wanted = sum(0.5 * factor * layer.lora_B[name].weight @ layer.lora_A[name].weight for name in ("a", "b"))
    for kind, new_rank in (("cat", 2 * rank), ("svd", rank), ("svd", 2 * rank)):
        name = f"{kind} {new_rank}"
        more = {"svd_rank": new_rank} if kind == "svd" else {}
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], name, combination_type=kind, **more)
        with torch.no_grad():
            inputs = torch.eye(64)
            model.set_adapter(name)
            got = (model(inputs) - layer.base_layer(inputs)).T
        best = wanted
        if new_rank == rank:  # the best that so few ranks can do
            u, s, v = torch.linalg.svd(wanted)
            best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        ratio = (got * best).sum().item() / (best * best).sum().item()
        rest = ((got - ratio * best).norm() / best.norm()).item()
        ratios[stabilized, name] = (round(ratio, 3), rest < 1e-4)
        print(f"use_rslora={stabilized}, {name}: {ratio:.3f} times the sum; apart from that, {rest:.0e} off")
as_seen = all(
    right and ratio == round(math.sqrt(int(name.split()[1])) if stabilized else 1.0, 3)
    for (stabilized, name), (ratio, right) in ratios.items()
)
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
