"""The layers a LLaMA is made of. Parameters may be of another type than the activations: they are cast for compute.

Shapes: T tokens of the stream, H heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        return F.linear(x, self.weight.to(x.dtype))


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
        normed = F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)


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
