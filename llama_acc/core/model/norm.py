"""RMSNorm, and the matrix products of what it gives: together, training need not keep that. T: tokens of the stream."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llama_acc.core.distributed.groups import Group, copied
from llama_acc.core.model.linear import ColumnParallelLinear
from llama_acc.core.model.nf4 import Scales, dense


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 as Meta's code does.

    Attributes:
        weight: [dim].
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim], in the type of `x`."""
        if torch.is_grad_enabled():
            return _RMSNormFunction.apply(x, self.weight, self.eps)
        return _rms_norm(x, self.weight, self.eps)[0]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed [..., dim] in the type of `x`, and 1 / rms [..., 1] in float32."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype) * weight.to(x.dtype), inverse


def _rms_norm_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, weight_needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and weight from that of the output, all [..., dim]."""
    wide = d_y.float()
    normed = x.float() * inverse
    d_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype) if weight_needs_grad else None
    d_normed = wide * weight.float()
    # d x = (d n - n * mean(d n * n)) / rms
    projection = (d_normed * normed).mean(-1, keepdim=True)
    d_x = d_normed.sub_(normed.mul_(projection)).mul_(inverse)
    return d_x.to(x.dtype), d_weight


class _RMSNormFunction(torch.autograd.Function):
    """Keeps only its input and 1 / rms for the backward pass; out of single operations it would keep copies of both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        return *_rms_norm_backward(d_outputs[0], x, weight, inverse, ctx.needs_input_grad[1]), None


def normed_linears(x: Tensor, norm: RMSNorm, layers: Sequence[ColumnParallelLinear]) -> tuple[Tensor, ...]:
    """Each layer of norm(x), [T, dim] to one [T, out] for each layer. For training it keeps x, but not norm(x)."""
    if not torch.is_grad_enabled():
        normed = norm(x)
        return tuple(layer(normed) for layer in layers)
    group = layers[0].group
    low = [layer.lora_a.weight for layer in layers if layer.lora_a is not None]
    weights = [layer.weight for layer in layers]
    scales = [*(layer.scales for layer in layers), *(None for _ in low)]
    outputs = _NormedLinearsFunction.apply(x, norm.weight, norm.eps, group, scales, len(low), *weights, *low)
    products, lows = outputs[: len(layers)], iter(outputs[len(layers) :])
    return tuple(
        layer.finish(y, None if layer.lora_a is None else copied(next(lows), group))
        for layer, y in zip(layers, products, strict=True)
    )


class _NormedLinearsFunction(torch.autograd.Function):
    """Computes the norm's output again in the backward pass, and sums the layers' gradients of it in one tensor.

    Under model parallelism that tensor is summed over the group while the weights' gradients are computed. The last
    `whole` weights are those that every rank has all of: their outputs' gradients are complete, so they are added to
    the sum, not summed themselves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        group: Group | None,
        scales: Sequence[Scales | None],
        whole: int,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        normed, inverse = _rms_norm(x, norm_weight, eps)
        ctx.save_for_backward(x, norm_weight, inverse, *weights)
        ctx.group, ctx.scales, ctx.split = group, scales, len(weights) - whole
        return tuple(F.linear(normed, dense(*matrix, x.dtype)) for matrix in zip(weights, scales, strict=True))

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, inverse, *weights = ctx.saved_tensors
        needs_norm, needs_weights = ctx.needs_input_grad[1], ctx.needs_input_grad[6:]
        matrices = list(zip(weights, ctx.scales, strict=True))
        d_normed = d_outputs[0] @ dense(*matrices[0], x.dtype)
        for d_y, matrix in zip(d_outputs[1 : ctx.split], matrices[1 : ctx.split], strict=True):
            d_normed.addmm_(d_y, dense(*matrix, x.dtype))
        summing = None if ctx.group is None else dist.all_reduce(d_normed, group=ctx.group, async_op=True)
        d_weights: list[Tensor | None] = [None] * len(weights)
        if any(needs_weights):
            normed = (x.float() * inverse).to(x.dtype) * norm_weight.to(x.dtype)
            for i, (d_y, weight) in enumerate(zip(d_outputs, weights, strict=True)):
                if needs_weights[i]:
                    d_weights[i] = (d_y.t() @ normed).to(weight.dtype)
            del normed
        if summing is not None:
            summing.wait()
        for d_y, matrix in zip(d_outputs[ctx.split :], matrices[ctx.split :], strict=True):
            d_normed.addmm_(d_y, dense(*matrix, x.dtype))
        d_x, d_norm_weight = _rms_norm_backward(d_normed, x, norm_weight, inverse, needs_norm)
        return d_x, d_norm_weight, None, None, None, None, *d_weights
