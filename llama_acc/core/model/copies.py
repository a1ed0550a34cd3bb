"""Copies of what trains in the type of the activations: on a GPU they are made once a step, not at each use.

What trains is float32. Cast at each use, it costs a kernel and 6 bytes a number, forward, backward and in each
micro-batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in the type of the activations: its copy, if `ComputeCopies` has made one."""
    copy: Tensor | None = getattr(weight, "compute_copy", None)
    if copy is None or copy.dtype != dtype:
        return weight.to(dtype)
    if torch.is_grad_enabled() and weight.requires_grad:
        with_gradient: Tensor = _Copy.apply(weight, copy)
        return with_gradient
    return copy


class _Copy(torch.autograd.Function):
    """The copy, whose gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return d_outputs[0].to(ctx.dtype), None


class ComputeCopies:
    """The copies of some parameters; each is an attribute of its parameter, by which `cast` finds it."""

    def __init__(self, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._originals = {name: original for name, original in parameters.items() if original.dtype != dtype}
        self.tensors: dict[str, Tensor] = {}  # the copies, by the parameters' names
        for name, original in self._originals.items():
            self.tensors[name] = torch.empty_like(original, dtype=dtype, requires_grad=False)
            original.compute_copy = self.tensors[name]  # type: ignore[attr-defined]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the parameters' present values."""
        if self.tensors:
            torch._foreach_copy_([*self.tensors.values()], [*self._originals.values()])
