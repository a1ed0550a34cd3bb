"""The layers a LLaMA is made of. Parameters may be of another type than the activations: they are cast for compute.

Shapes: T tokens of the stream, H heads, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows a feed-forward layer works on at a time on a CPU.
_PIECE_ROWS = 256
_onednn: Any = torch.backends.mkldnn


class Linear(nn.Module):
    """A matrix product without bias.

    Attributes:
        weight: [out_features, in_features].
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the type of `x`."""
        return linear(x, self.weight)


class Packed:
    """Several linear layers of the same input as one matrix product.

    In small models a matrix product of one row costs less than the call. The layers' weights become views of the
    packed one, so they keep their names and no memory is added.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.sizes = [layer.weight.shape[0] for layer in layers]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        for layer, view in zip(layers, self.weight.split(self.sizes), strict=True):
            layer.weight = nn.Parameter(view, requires_grad=False)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """[T, in] to one [T, out] for each layer."""
        return linear(x, self.weight).split(self.sizes, -1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed, in the type of `x`."""
    weight = weight.to(x.dtype)
    if x.dim() == 2 and x.shape[0] == 1 and x.device.type == "cpu" and not torch.is_grad_enabled():
        return _one_row(x, weight)
    return F.linear(x, weight)


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of one row [1, in] on a CPU: generation, where the libraries' products of matrices fall short."""
    rows, columns = weight.shape
    threads = torch.get_num_threads()
    if x.dtype == torch.float32 and rows % threads == 0:
        # The library reads a matrix with one thread if there is one vector to multiply; as a batch of matrices, one
        # for each thread, it is read with all.
        return torch.bmm(x.expand(threads, 1, columns), weight.view(threads, rows // threads, columns).mT).view(1, rows)
    if x.dtype == torch.bfloat16 and _onednn.enabled:
        # oneDNN takes 1.1 to 4 times as long as torch's own product of a matrix and a vector, at every size (measured
        # on two Zen 4 cores).
        _onednn.enabled = False
        try:
            return F.linear(x, weight)
        finally:
            _onednn.enabled = True
    return F.linear(x, weight)


class Embedding(nn.Module):
    """A table of vectors.

    Attributes:
        weight: [vocab_size, dim].
    """

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens [T] to vectors [T, dim] of `dtype`. Rows are cast after they are picked: the table is large."""
        return F.embedding(tokens, self.weight).to(dtype)


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


def normed_linears(x: Tensor, norm: RMSNorm, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    """Each layer of norm(x), [T, dim] to one [T, out] for each layer. For training it keeps x, but not norm(x)."""
    if torch.is_grad_enabled():
        return _NormedLinearsFunction.apply(x, norm.weight, norm.eps, *(layer.weight for layer in layers))
    normed = norm(x)
    return tuple(layer(normed) for layer in layers)


class _NormedLinearsFunction(torch.autograd.Function):
    """Computes the norm's output again in the backward pass, and sums the layers' gradients of it in one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        normed, inverse = _rms_norm(x, norm_weight, eps)
        ctx.save_for_backward(x, norm_weight, inverse, *weights)
        return tuple(F.linear(normed, weight.to(x.dtype)) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, inverse, *weights = ctx.saved_tensors
        needs_norm, needs_weights = ctx.needs_input_grad[1], ctx.needs_input_grad[3:]
        d_normed = d_outputs[0] @ weights[0].to(x.dtype)
        for d_y, weight in zip(d_outputs[1:], weights[1:], strict=True):
            d_normed.addmm_(d_y, weight.to(x.dtype))
        d_weights: list[Tensor | None] = [None] * len(weights)
        if any(needs_weights):
            normed = (x.float() * inverse).to(x.dtype) * norm_weight.to(x.dtype)
            for i, (d_y, weight) in enumerate(zip(d_outputs, weights, strict=True)):
                if needs_weights[i]:
                    d_weights[i] = (d_y.t() @ normed).to(weight.dtype)
            del normed
        d_x, d_norm_weight = _rms_norm_backward(d_normed, x, norm_weight, inverse, needs_norm)
        return d_x, d_norm_weight, None, *d_weights


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """SwiGLU's second half: silu(gate) * up [T, hidden] times weight [out, hidden] transposed, [T, out]."""
    if torch.is_grad_enabled():
        return _GatedLinearFunction.apply(gate, up, weight)
    return linear(F.silu(gate).mul_(up), weight)


class _GatedLinearFunction(torch.autograd.Function):
    """Keeps gate and up for the backward pass and computes silu and product again: half the memory of SwiGLU.

    On a CPU it goes through the rows in pieces that stay in the cache from one operation to the next.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        compute_weight = weight.to(gate.dtype).t()
        y = gate.new_empty(len(gate), len(weight))
        for rows in _pieces(gate):
            torch.mm(F.silu(gate[rows]).mul_(up[rows]), compute_weight, out=y[rows])
        return y

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        d_y = d_outputs[0]
        compute_weight = weight.to(d_y.dtype)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        # Their gradients take the place of gate and up; torch refuses a second backward pass over them.
        for rows in _pieces(gate):
            activated, d_product = F.silu(gate[rows]), d_y[rows] @ compute_weight
            if d_weight is not None:
                add_product(d_weight, d_y[rows].t(), activated * up[rows], first=not rows.start)
            torch.ops.aten.silu_backward.grad_input(d_product * up[rows], gate[rows], grad_input=gate[rows])
            torch.mul(activated, d_product, out=up[rows])
        return gate, up, d_weight


def _pieces(x: Tensor) -> list[slice]:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    return [slice(start, start + _PIECE_ROWS) for start in range(0, len(x), _PIECE_ROWS)]


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Adds the product a @ b to `total`, or writes it there if it is the first. `total` may be of a wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def rotary_table(head_dim: int, length: int, theta: float, scaling: float | None, device: torch.device) -> Tensor:
    """Rotations of positions 0 to length-1 as complex numbers [length, head_dim / 2].

    Frequency i is theta^(-2i / head_dim) (RoFormer, arXiv:2104.09864); positions are multiplied by `scaling`.
    """
    powers = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    positions = torch.arange(length, device=device, dtype=torch.float32) * (1.0 if scaling is None else scaling)
    angles = torch.outer(positions, 1.0 / theta**powers)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotates interleaved pairs (x0, x1), (x2, x3)... of [T, H, D] by [T, D/2] complex rotations, in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations.unsqueeze(1)).flatten(-2).to(x.dtype)
