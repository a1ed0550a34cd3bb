"""One optimizer step: micro-batches forward and backward, then the update. Everything a run does in its hot loop."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llama_acc.core.data.batches import MicroBatch
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.train.optimizer import ClippedAdamW


class StepResult(NamedTuple):
    """Scalars on the device: the loss per label token, and the gradients' norm before clipping."""

    loss: Tensor
    grad_norm: Tensor


def forward(model: Transformer, batch: MicroBatch, loss_scale: float, device: torch.device) -> Tensor:
    """The summed cross-entropy of a micro-batch times `loss_scale`, a scalar."""
    loss: Tensor = model(
        torch.from_numpy(batch.tokens).to(device, non_blocking=True),
        torch.from_numpy(batch.positions).to(device, non_blocking=True),
        batch.lengths,
        targets=torch.from_numpy(batch.targets).to(device, non_blocking=True),
        loss_scale=loss_scale,
    )
    return loss


def train_step(
    model: Transformer,
    optimizer: ClippedAdamW,
    batches: Iterable[MicroBatch],
    label_tokens: int,
    lr: float,
    device: torch.device,
) -> StepResult:
    """One optimizer step over the micro-batches of one global batch.

    The loss is the sum over label tokens divided by `label_tokens`, the number of them in the whole step, so it does
    not depend on how examples are dealt to micro-batches.
    """
    total = torch.zeros((), device=device)
    for batch in batches:
        loss = forward(model, batch, 1.0 / label_tokens, device)
        loss.backward()
        total += loss.detach()
    return StepResult(total, optimizer.step(lr, total))


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[MicroBatch], label_tokens: int, device: torch.device) -> float:
    """The loss per label token over micro-batches, without training."""
    total = torch.zeros((), device=device)
    for batch in batches:
        total += forward(model, batch, 1.0 / label_tokens, device)
    return total.item()


def apply_activation_checkpointing(model: Transformer) -> None:
    """Makes the backward pass recompute each block instead of keeping its activations."""
    # Nothing in a block is random, so there is no generator state to keep.
    model.run_block = lambda block, x, attend: checkpoint(
        block, x, attend, use_reentrant=False, preserve_rng_state=False
    )


def apply_compile(model: Transformer) -> None:
    """Compiles each block, for streams of any length."""
    for block in model.layers:
        block.compile(dynamic=True)
