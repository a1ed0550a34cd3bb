"""What kernels take for themselves, and which attention a GPU runs: no tensor of the program shows it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama_acc.core.device import device_type
from llama_acc.core.model import nf4
from llama_acc.core.vram.cpu_workspaces import cpu_workspace, product_workspace

_aten = torch.ops.aten
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_backward
_HALF = (torch.bfloat16, torch.float16)


def workspace(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Bytes that an operation takes besides its results and gives back before it returns."""
    packet = operation._overloadpacket
    if packet is _FLASH_BACKWARD:
        return _flash_backward(args[1], args[2])
    if not args or not isinstance(args[0], Tensor) or device_type(args[0]) != "cpu":
        return 0
    # Compared by name: the library is imported only where something is quantised.
    if packet._qualified_op_name == "bitsandbytes::gemm_4bit":
        return _written_out(*args[:3])
    return cpu_workspace(operation, args, kwargs)


def _flash_backward(q: Tensor, k: Tensor) -> int:
    """FlashAttention's backward pass sums the queries' gradients in float32 over rows and head dimensions rounded up,
    keeps a number a row, and, where heads share keys, makes every head's own gradients of keys and values first
    (mha_bwd in PyTorch's flash_api.cpp)."""
    _, heads, rows, width = q.shape
    rounded_rows = -(-rows // 128) * 128
    rounded_width = -(-width // 32) * 32 if width <= 128 else -(-width // 64) * 64
    shared = 2 * heads * k.shape[2] * width * q.element_size() if k.shape[1] != heads else 0
    return heads * rounded_rows * 4 * (rounded_width + 1) + shared


def _written_out(x: Tensor, packed: Tensor, shape: Sequence[int]) -> int:
    """On a CPU, bitsandbytes' product of a row and a quantised matrix writes the matrix out, and its blocks' magnitudes
    in float32, and multiplies."""
    numbers = shape[0] * shape[1]
    return numbers * x.element_size() + 4 * (numbers // nf4.BLOCK) + product_workspace(x, shape[0])


def gpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as it chooses on a GPU: q [1, H, T, D], k and v [1, K, S, D] to [1, H, T, D].

    FlashAttention for half precision without a mask, the memory-efficient kernel where every head has its own keys,
    otherwise single operations.
    """
    if q.dtype in _HALF and attn_mask is None:
        return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if q.shape[1] == k.shape[1]:
        keeps = torch.is_grad_enabled() and q.requires_grad
        fused = _aten._scaled_dot_product_efficient_attention
        return fused(q, k, v, attn_mask, keeps, dropout_p, is_causal, scale=scale)[0]
    plain = _aten._scaled_dot_product_attention_math
    return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
