"""The output head and the cross-entropy in one, without ever holding the logits of more than a chunk of tokens.

With a vocabulary of 32000 the logits, their softmax and their gradient are the largest tensors of a training step, and
their memory traffic most of its time. Here rows without a label are never projected, the rest is done in chunks, and
the gradient of a chunk is made at once, while its logits are at hand (the idea of Liger Kernel's fused linear
cross-entropy, arXiv:2410.10989).
"""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
# 256 rows of 32000 float32 logits are 31 MiB; fewer rows make the products slower, more only cost memory.
CHUNK_ROWS = 256


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
        needs_gradient = hidden.requires_grad or weight.requires_grad
        rows = (targets != IGNORED).nonzero().squeeze(1)
        compute_weight = weight.detach().to(hidden.dtype)
        picked, picked_targets = hidden.detach()[rows], targets[rows]
        d_picked = torch.empty_like(picked) if needs_gradient else None
        d_weight = None
        if needs_gradient and weight.requires_grad:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, rows.numel(), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            loss += _chunk(picked[chunk], compute_weight, picked_targets[chunk], scale, d_picked, d_weight, chunk)
        d_hidden = None
        if d_picked is not None:
            d_hidden = torch.zeros_like(hidden).index_copy_(0, rows, d_picked)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [_times(gradient, d_loss[0]) for gradient in ctx.saved_tensors]
        return gradients[0], gradients[1], None, None


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    chunk: slice,
) -> Tensor:
    """The scaled loss of some rows, all labelled; their gradients are written into d_hidden and added to d_weight."""
    log_probabilities = (hidden @ weight.t()).float()
    torch.log_softmax(log_probabilities, -1, out=log_probabilities)
    picked = log_probabilities.gather(1, targets.unsqueeze(1))
    if d_hidden is not None:
        # d loss / d logits = softmax - one-hot.
        d_logits = log_probabilities.exp_()
        d_logits.scatter_add_(1, targets.unsqueeze(1), torch.full_like(picked, -1.0))
        d_logits = d_logits.to(hidden.dtype)
        torch.mm(d_logits, weight, out=d_hidden[chunk]).mul_(scale)
        if d_weight is not None:
            if d_weight.dtype == hidden.dtype:
                d_weight.addmm_(d_logits.t(), hidden * scale)
            else:
                d_weight.add_(d_logits.t() @ (hidden * scale))
    return -picked.sum() * scale


def _times(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    if gradient is None or (factor.device.type == "cpu" and factor.item() == 1.0):
        return gradient  # the usual case, and the weight's gradient is too large to be multiplied by 1
    return gradient * factor.to(gradient.dtype)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    """Sum over labelled rows of the cross-entropy of `hidden @ weight.T`, times `scale`.

    Args:
        hidden: [T, dim].
        weight: [vocab_size, dim]; cast to the type of `hidden` for compute.
        targets: [T] token to predict at each row; -100 = no label.
        scale: factor on the loss, such as 1 / label tokens of the optimizer step.

    Returns:
        float32 scalar; zero, with zero gradients, where nothing is labelled.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, scale)
    return loss
