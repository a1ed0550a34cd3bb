"""Operators of our own for a GPU, a kernel each: `torch.ops.llama_acc.NAME`. The kernels are in `triton_kernels`.

A GPU's time for a small operation is that of its launch, and memory's for a large one that only moves numbers: what is
several of torch's kernels in a row is one here. docs/benchmarks.md counts what they save. A CPU has them in Triton's
interpreter only (TRITON_INTERPRET=1), by which they are tested.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from llama_acc.core.device import device_type

_OPERATORS = torch.library.Library("llama_acc", "DEF")


def use_kernels(x: Tensor) -> bool:
    """Whether what is done to `x` is done by these: on a GPU, if Triton is installed, which torch for CUDA brings."""
    return device_type(x) == "cuda" and has_triton()


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def _define(schema: str, shape: Callable[..., Any]) -> None:
    """Makes an operator; `shape` gives what it gives, without values."""
    name = schema.partition("(")[0]

    def launch(*args: Any) -> Any:
        return getattr(import_module("llama_acc.core.model.triton_kernels"), name)(*args)

    _OPERATORS.define(schema)
    _OPERATORS.impl(name, shape, "Meta")
    for device in ("CUDA", "CPU"):
        _OPERATORS.impl(name, launch, device)


def _dense(packed: Tensor, *rest: Any) -> Tensor:
    return packed.new_empty(packed.shape[0], 2 * packed.shape[1], dtype=rest[-1])


_define(
    "dequantize_nf4(Tensor packed, Tensor absmax, Tensor nested, Tensor offset, Tensor levels, Tensor magnitudes, "
    "ScalarType dtype) -> Tensor",
    _dense,
)
