"""Small runs to predict and to measure."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_acc.core.distributed.groups import init_distributed
from llama_acc.core.memory import workspaces
from llama_acc.core.memory.measure import measure
from llama_acc.core.memory.simulate import Setup
from llama_acc.core.model.config import config_from_params
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.plan import StepSettings
from tests.core.ranks import next_port
from tests.core.tiny import CPU

SMALL = {"n_heads": 4, "n_kv_heads": 2, "vocab_size": 1000, "max_seq_len": 512}
NF4 = ("tuning.quantize=nf4", "checkpoint.trainable_only=true")


def setup(
    *overrides: str,
    lengths: tuple[int, ...] = (200, 56),
    device_type: str = "cpu",
    dim: int = 128,
    n_layers: int = 3,
    params: Mapping[str, Any] | None = None,
    **options: int,
) -> Setup:
    """One rank of the `alpaca` recipe, changed, of a small model, with `params` changed."""
    recipe = Recipe.load("alpaca", overrides)
    config = config_from_params({**SMALL, "dim": dim, "n_layers": n_layers, **(params or {})})
    config = replace(config, tuning=recipe.tuning.resolved().with_num_layers(n_layers))
    return Setup(config, StepSettings.of(recipe), lengths, device_type=device_type, **options)


# What the processes of test_measured.py do


def peaks(runs: Sequence[dict[str, Any]], world_size: int) -> list[int]:
    """Of each run, the most bytes that torch's allocator had given out on this rank."""
    # What a thread of gloo is the last to let go of counts as freed, too (c10's CPUAllocator.cpp).
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(c10, "FLAGS_caffe2_report_cpu_memory_usage").value = True
    measured = []
    for run in runs:
        one = setup(*run["overrides"], world_size=world_size, micro_batches=run["micro_batches"])
        with init_distributed(CPU, one.settings.model_parallel_size) as parallel:
            measured.append(measure(one, CPU, parallel).allocated)
        next_port()
    return measured


def of_operations() -> dict[str, tuple[int, int, int]]:
    """Of large products: what they take when they are done, what doing a part of them tells, bytes of operands."""
    aten, bf16 = torch.ops.aten, torch.bfloat16
    x, weight, row = (torch.zeros(size, 512, dtype=bf16) for size in (256, 4096, 1))
    out = torch.zeros(256, 4096, dtype=bf16)
    operations: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
        "product": (aten.mm.default, (x, weight.t()), {}),
        "product into a result": (aten.mm.out, (x, weight.t()), {"out": out}),
        "product of transposed operands": (aten.mm.default, (weight, x.t()), {}),
        "product and sum": (aten.addmm.default, (out[0], x, weight.t()), {}),
        "product of a row": (aten.mm.default, (row, weight.t()), {}),
    }
    found = {}
    for name, (operation, args, kwargs) in operations.items():
        taken = []
        for workspaces._WORK in (1 << 40, 0):
            taken.append(workspaces.cpu_workspace(operation, args, kwargs))
        operands = sum(tensor.nbytes for tensor in (*args[:4], out) if isinstance(tensor, torch.Tensor))
        found[name] = (taken[0], taken[1], operands)
    return found
