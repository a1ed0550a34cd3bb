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
    """Whether what is done to `x` is done by these: on a GPU, if Triton is installed, which torch for CUDA brings.

    Of what is compiled, torch.compile makes kernels itself.
    """
    is_for_them = device_type(x) == "cuda" and x.dtype != torch.float64 and not torch.compiler.is_compiling()
    return is_for_them and has_triton()


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def _define(schema: str, shape: Callable[..., Any], by_torch: Callable[..., Any] | None = None) -> None:
    """Makes an operator; `shape` gives what it gives, without values. `by_torch` does it, else a kernel of its name."""
    name = schema.partition("(")[0]

    def launch(*args: Any) -> Any:
        return getattr(import_module("llama_acc.core.model.triton_kernels"), name)(*args)

    _OPERATORS.define(schema)
    _OPERATORS.impl(name, shape, "Meta")
    for device in ("CUDA", "CPU"):
        _OPERATORS.impl(name, by_torch or launch, device)


def _add_wide_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    if not total.is_cuda:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)
    elif first:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


def _dense(packed: Tensor, *rest: Any) -> Tensor:
    return packed.new_empty(packed.shape[0], 2 * packed.shape[1], dtype=rest[-1])


def _like_the_first(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


_define(
    "dequantize_nf4(Tensor packed, Tensor absmax, Tensor nested, Tensor offset, Tensor levels, Tensor magnitudes, "
    "ScalarType dtype) -> Tensor",
    _dense,
)
_define(
    "add_product_nf4_(Tensor(a!) y, Tensor x, Tensor[] weight, Tensor? a, Tensor? b, float pair_factor, Tensor? bias, "
    "int[] sizes, float factor, bool first) -> ()",
    lambda *_: None,
)
_define(
    "softmax_minus_one_hot_(Tensor(a!) logits, Tensor targets, Tensor? weights) -> Tensor",
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.float32),
)
# Not a kernel of our own, but torch's operator (2.11) does not say what it gives without values.
_define("add_wide_product_(Tensor(a!) total, Tensor a, Tensor b, bool first) -> ()", lambda *_: None, _add_wide_product)
_define("norm_and_add_(Tensor(a!) x, Tensor weight, float eps, Tensor bias, float factor) -> Tensor", _like_the_first)
_define("swiglu(Tensor gate, Tensor up) -> Tensor", _like_the_first)
_define("swiglu_backward_(Tensor(a!) d_product, Tensor(b!) gate, Tensor(c!) up) -> ()", lambda *_: None)
_define(
    "rotate_heads(Tensor q, Tensor k, Tensor rotations, bool back) -> (Tensor, Tensor)",
    lambda q, k, *_: (_like_the_first(q), _like_the_first(k)),
)
_define(
    "rotate_and_store(Tensor q, Tensor k, Tensor v, Tensor? rotations, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor slots, Tensor positions) -> Tensor",
    _like_the_first,
)
_define(
    "attend_slots(Tensor q, Tensor keys, Tensor values, Tensor slots, Tensor positions, int window, Tensor[] prefix) "
    "-> Tensor",
    _like_the_first,
)
