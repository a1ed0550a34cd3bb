"""The output head and the cross-entropy in one, without ever holding the logits of more than a chunk of tokens.

With a vocabulary of 32000 the logits, their softmax and their gradient are the largest tensors of a training step, and
their memory traffic most of its time. Here they are made in chunks of rows, and the gradient of a chunk is made at
once, while its logits are at hand (the idea of Liger Kernel's fused linear cross-entropy, arXiv:2410.10989).

Under model parallelism each rank has the logits of a part of the vocabulary. Ranks tell each other only the
log-sum-exp of a row and the logit of its target, and sum the gradient of the hidden states.
"""

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_acc.core.device import device_type
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.model.kernels import use_kernels
from llama_acc.core.model.nf4 import Scales, dense
from llama_acc.core.model.products import accumulator, add_product, product

# Rows of float32 per matrix product on a CPU, twice as many of bfloat16: 31 MiB of logits at a vocabulary of 32000.
# Fewer make it slower, more cost memory.
CHUNK_ROWS = 256
# Logits that a GPU makes at a time, 4,096 rows at that vocabulary: each product has to be launched, and the weight's
# gradient is read and written for each.
_GPU_LOGITS = 1 << 27
# Rows whose softmax is made at once on a CPU: their logits should stay in its cache between the passes over them.
_CACHED_ROWS = 64
_ALONE = Parallel()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        parallel: Parallel,
        scales: Scales | None,
        label_weights: Tensor | None,
    ) -> Tensor:
        label_weights = None if label_weights is None else label_weights.unsqueeze(1)
        compute_weight = dense(weight, scales, hidden.dtype)
        size = max(CHUNK_ROWS, _GPU_LOGITS // len(weight))
        if device_type(hidden) == "cpu":
            size = CHUNK_ROWS * 4 // min(hidden.element_size(), 4)
        d_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        d_weight = accumulator(weight, -(-len(hidden) // size)) if weight.requires_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            x = hidden[chunk]
            d_logits = product(x, compute_weight)
            weights = None if label_weights is None else label_weights[chunk]
            loss += _softmax_minus_one_hot_(d_logits, targets[chunk], parallel, weights)
            if d_hidden is not None:
                product(d_logits, compute_weight.t(), out=d_hidden[chunk])
            if d_weight is not None:
                add_product(d_weight, d_logits.t(), x * scale, first=start == 0)
            del d_logits  # before there are those of the next chunk
        if d_hidden is not None:
            if parallel.model_size > 1 and len(hidden):
                dist.all_reduce(d_hidden, group=parallel.model_group)
            d_hidden.mul_(scale)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = d_loss
        if device_type(factor) == "cpu" and factor.item() == 1.0:
            return *ctx.saved_tensors, *[None] * 5  # the weight's is too large to be multiplied by 1
        gradients = [None if d is None else d * factor.to(d.dtype) for d in ctx.saved_tensors]
        return *gradients, *[None] * 5


def _softmax_minus_one_hot_(logits: Tensor, targets: Tensor, parallel: Parallel, weights: Tensor | None) -> Tensor:
    """Turns logits [R, V] into the gradient of their summed cross-entropy, in place; returns that sum, in float32.

    Rows count as `weights` [R, 1] says.
    """
    if parallel.model_size > 1:
        return _split_softmax_minus_one_hot_(logits, targets, parallel, weights)
    if use_kernels(logits):
        return torch.ops.llama_acc.softmax_minus_one_hot_(logits, targets, weights).sum()
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    block = _CACHED_ROWS if device_type(logits) == "cpu" else len(logits)
    weights_of_blocks = itertools.repeat(None) if weights is None else weights.split(block)
    targets_of_blocks = targets.unsqueeze(1).split(block)
    for rows, wanted, weight in zip(logits.split(block), targets_of_blocks, weights_of_blocks, strict=False):
        # Of float32 logits this is `rows` itself, and everything happens in place. The largest one gives what they are
        # divided by: log_softmax and its exponential take twice as long as softmax.
        probabilities = rows.float()
        below_largest = probabilities.amax(-1, keepdim=True) - probabilities.gather(1, wanted)
        torch.softmax(probabilities, -1, out=probabilities)
        losses = below_largest - probabilities.amax(-1, keepdim=True).log()
        loss += _weighted(losses, weight).sum()
        probabilities.scatter_add_(1, wanted, probabilities.new_full(wanted.shape, -1.0))
        probabilities = _weighted(probabilities, weight)
        rows.copy_(probabilities)
    return loss


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Values [R, ...] times the weights of rows [R, 1], in place."""
    return values if weights is None else values.mul_(weights)


def _split_softmax_minus_one_hot_(
    logits: Tensor, targets: Tensor, parallel: Parallel, weights: Tensor | None
) -> Tensor:
    """The same where this rank has a part of the vocabulary: logits [R, V / model_size]; the sum is the whole one."""
    wanted = (targets - parallel.model_rank * logits.shape[1]).unsqueeze(1)
    here = (wanted >= 0) & (wanted < logits.shape[1])
    wanted = wanted.where(here, 0)
    probabilities = logits.float()
    own = torch.stack((probabilities.logsumexp(-1), probabilities.gather(1, wanted).where(here, 0.0).squeeze(1)))
    parts = [torch.empty_like(own) for _ in range(parallel.model_size)]
    dist.all_gather(parts, own, group=parallel.model_group)
    log_sums, target_logits = torch.stack(parts).unbind(1)
    log_sum = log_sums.logsumexp(0)
    probabilities.sub_(log_sum.unsqueeze(1)).exp_()
    probabilities.scatter_add_(1, wanted, -here.float())
    logits.copy_(_weighted(probabilities, weights))
    return _weighted((log_sum - target_logits.sum(0)).unsqueeze(1), weights).sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    parallel: Parallel = _ALONE,
    scales: Scales | None = None,
    label_weights: Tensor | None = None,
) -> Tensor:
    """Sum over rows of the cross-entropy of `hidden @ weight.T`, times `scale`.

    Args:
        hidden: [N, dim], what has a label.
        weight: [vocab_size / model_size, dim], this rank's rows; cast to the type of `hidden` for compute.
        targets: [N] token to predict at each row.
        scale: factor on the loss, such as 1 / (what all label tokens of the optimizer step count).
        parallel: who has the other rows.
        scales: of a quantized weight.
        label_weights: [N] how much each row counts, in float32; None: all count in full.

    Returns:
        float32 scalar; zero, with zero gradients, where there is no row.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, scale, parallel, scales, label_weights)
    return loss
