"""Rotary positions. T: tokens of the stream, H: heads, D: head dimension."""

import torch
from torch import Tensor


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
