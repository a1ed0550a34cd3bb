"""Rotary positions (RoFormer, arXiv:2104.09864) and how their frequencies are changed for longer contexts.

Shapes: T tokens, H heads, D head dimension.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llama_acc.core.model.config import ModelConfig, RopeScaling
from llama_acc.core.model.kernels import use_kernels


def frequencies(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, float]:
    """How far each pair of features turns from one position to the next, [D / 2], and a factor on what is turned.

    Frequency i is theta^(-2i / D), changed as `rope_scaling` says, by the formulas of transformers: `linear` (positions
    are interpolated, arXiv:2306.15595), `dynamic` (theta grows with the length of the text), `llama3` (long waves are
    interpolated) and `yarn` (arXiv:2309.00071). `length` is the text's, in tokens: `dynamic` depends on it.
    """
    size, theta, scaling = config.head_size, config.rope_theta, config.rope_scaling
    powers = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
    if not isinstance(scaling, RopeScaling):
        return 1.0 / theta**powers * (1.0 if scaling is None else scaling), 1.0
    factor, original = scaling.factor, scaling.original_max_position_embeddings or config.max_seq_len
    if scaling.rope_type == "dynamic":
        longest = config.max_seq_len
        growth = factor * max(length, longest) / longest - (factor - 1)
        return 1.0 / (theta * growth ** (size / (size - 2))) ** powers, 1.0
    plain = 1.0 / theta**powers
    if scaling.rope_type == "linear":
        return plain / factor, 1.0
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
        # How many waves fit into the original context: where there are few, the frequency is divided.
        waves = original * plain / (2 * math.pi)
        kept = ((waves - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - kept) * plain / factor + kept * plain, 1.0
    first, last = (
        size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast or 32.0, scaling.beta_slow or 1.0)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    interpolated = (torch.arange(size // 2, device=device, dtype=torch.float32) - first) / (last - first or 0.001)
    interpolated = interpolated.clamp(0.0, 1.0)
    return plain / factor * interpolated + plain * (1 - interpolated), _yarn_factor(scaling)


def _yarn_factor(scaling: RopeScaling) -> float:
    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def rotary_table(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    """Rotations of positions 0 to length-1 in a text of so many tokens, as complex numbers [length, D / 2]."""
    per_position, factor = frequencies(config, length, device)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), per_position)
    return torch.polar(torch.full_like(angles, factor), angles)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotates pairs (x0, x1), (x2, x3)... of [T, H, D] by [T, D/2] complex rotations, at least in float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations.unsqueeze(1)).flatten(-2).to(x.dtype)


def rotate_both(q: Tensor, k: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of queries [T, H, D] and keys [T, K, D], on a GPU by one kernel."""
    if use_kernels(q):
        return _Rotation.apply(q, k, rotations)
    return rotate(q, rotations), rotate(k, rotations)


class _Rotation(torch.autograd.Function):
    """Gradients are rotated back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rotations)
        return torch.ops.llama_acc.rotate_heads(q, k, rotations, False)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.llama_acc.rotate_heads(*d_outputs, *ctx.saved_tensors, True), None
