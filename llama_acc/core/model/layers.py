"""The layers a LLaMA is made of. Parameters may be of another type than the activations: they are cast for compute.

Shapes: T tokens of the stream, H heads, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements of a bf16 matrix up to which one row is multiplied faster without oneDNN (measured on two Zen 4 cores).
_SMALL = 1 << 19
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
    if x.dtype == torch.bfloat16 and weight.numel() <= _SMALL and _onednn.enabled:
        # oneDNN takes longer to start its threads than a small product takes without it.
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
        return _RMSNormFunction.apply(x, self.weight, self.eps)


class _RMSNormFunction(torch.autograd.Function):
    """Keeps only its input and 1 / rms for the backward pass; out of single operations it would keep copies of both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        d_y = d_outputs[0].float()
        normed = x.float() * inverse
        d_weight = (d_y * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        d_normed = d_y * weight.float()
        # d x = (d n - n * mean(d n * n)) / rms
        projection = (d_normed * normed).mean(-1, keepdim=True)
        d_x = (d_normed - normed * projection) * inverse
        return d_x.to(x.dtype), d_weight, None


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """SwiGLU's second half: (silu(gate) * up) [..., hidden] times weight [out, hidden] transposed, [..., out]."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _GatedLinearFunction.apply(gate, up, weight)
    return linear(F.silu(gate).mul_(up), weight)


class _GatedLinearFunction(torch.autograd.Function):
    """Keeps gate and up for the backward pass and computes silu and product again: half the memory of SwiGLU."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        d_y = d_outputs[0]
        activated = F.silu(gate)
        d_weight = None
        if ctx.needs_input_grad[2]:
            d_weight = (d_y.flatten(0, -2).t() @ (activated * up).flatten(0, -2)).to(weight.dtype)
        d_product = d_y @ weight.to(d_y.dtype)
        d_up = activated.mul_(d_product)
        return torch.ops.aten.silu_backward(d_product.mul_(up), gate), d_up, d_weight


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
