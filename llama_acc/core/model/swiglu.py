"""SwiGLU (arXiv:2002.05202) from its two products on, with half the activations kept. T: tokens of the stream."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_acc.core.device import device_type
from llama_acc.core.distributed.groups import summed
from llama_acc.core.model.linear import RowParallelLinear, accumulator, add_product
from llama_acc.core.model.nf4 import Scales, dense

# Rows that are worked on at a time on a CPU.
_PIECE_ROWS = 256


def gated_linear(gate: Tensor, up: Tensor, w2: RowParallelLinear) -> Tensor:
    """SwiGLU's second half: w2(silu(gate) * up), [T, hidden] to [T, out]."""
    if not torch.is_grad_enabled():
        return w2(F.silu(gate).mul_(up))
    if w2.lora_a is None:
        (y,) = _GatedLinearFunction.apply(gate, up, [w2.scales], w2.weight)
        return w2.finish(summed(y, w2.group), None)
    y, low = _GatedLinearFunction.apply(gate, up, [w2.scales, None], w2.weight, w2.lora_a.weight)
    return w2.finish(summed(y, w2.group), summed(low, w2.group))


class _GatedLinearFunction(torch.autograd.Function):
    """Keeps gate and up for the backward pass and computes silu and product again: half the memory of SwiGLU.

    It multiplies by one or several matrices. On a CPU it goes through the rows in pieces that stay in the cache from
    one operation to the next.
    """

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, scales: Sequence[Scales | None], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gate, up, *weights)
        ctx.scales = scales
        compute_weights = [dense(*matrix, gate.dtype).t() for matrix in zip(weights, scales, strict=True)]
        outputs = tuple(gate.new_empty(len(gate), len(weight)) for weight in weights)
        for rows in _pieces(gate):
            product = F.silu(gate[rows]).mul_(up[rows])
            for y, weight in zip(outputs, compute_weights, strict=True):
                torch.mm(product, weight, out=y[rows])
        return outputs

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *weights = ctx.saved_tensors
        compute_weights = [dense(*matrix, gate.dtype) for matrix in zip(weights, ctx.scales, strict=True)]
        pieces = _pieces(gate)
        d_weights = [
            accumulator(weight, len(pieces)) if needed else None
            for weight, needed in zip(weights, ctx.needs_input_grad[3:], strict=True)
        ]
        # Their gradients take the place of gate and up; torch refuses a second backward pass over them.
        for rows in pieces:
            activated, d_product = F.silu(gate[rows]), d_outputs[0][rows] @ compute_weights[0]
            for d_y, weight in zip(d_outputs[1:], compute_weights[1:], strict=True):
                d_product.addmm_(d_y[rows], weight)
            if any(ctx.needs_input_grad[3:]):
                product = activated * up[rows]
                for d_weight, d_y in zip(d_weights, d_outputs, strict=True):
                    if d_weight is not None:
                        add_product(d_weight, d_y[rows].t(), product, first=not rows.start)
            torch.ops.aten.silu_backward.grad_input(d_product * up[rows], gate[rows], grad_input=gate[rows])
            torch.mul(activated, d_product, out=up[rows])
        done = (None if d is None else d.to(w.dtype) for d, w in zip(d_weights, weights, strict=True))
        return gate, up, None, *done


def _pieces(x: Tensor) -> list[slice]:
    if device_type(x) != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    return [slice(start, start + _PIECE_ROWS) for start in range(0, len(x), _PIECE_ROWS)]
