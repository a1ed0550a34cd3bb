"""One optimizer step: micro-batches forward and backward, then the update. Everything a run does in its hot loop."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llama_acc.core.data.batches import MicroBatch
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.model.attention import keep_out_of_graphs
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.model.vision import Images
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.optimizer import ClippedAdamW


class StepResult(NamedTuple):
    """What a step came to, on the device, of all ranks together.

    Attributes:
        loss: per label token, or per weight of them, a scalar.
        grad_norm: the gradients' L2 norm before clipping, a scalar.
        extra_sums: the sums over all ranks of the numbers they passed in.
    """

    loss: Tensor
    grad_norm: Tensor
    extra_sums: Tensor


def pack(batch: MicroBatch, device: torch.device) -> tuple[Tensor, list[int]]:
    """All of a micro-batch that goes to the device, end to end and to be copied at once, and the lengths of the parts.
    For CUDA it is in memory from which the copy is made while the host goes on."""
    weights = np.zeros(0, np.float32) if batch.label_weights is None else batch.label_weights
    images = (batch.image_places, np.asarray(batch.image_documents, np.int64))
    parts = (batch.tokens, batch.positions, batch.targets, batch.labeled, batch.bounds, *images, weights.view(np.int32))
    numbers, sizes = torch.from_numpy(np.concatenate(parts)), [len(part) for part in parts]
    return numbers.pin_memory() if device.type == "cuda" else numbers, sizes


def packed_ahead(batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Micro-batches, each made and packed by a thread while the one before is computed."""
    remaining = (replace(batch, packed=pack(batch, device)) for batch in batches)
    # A thread begins with the first GPU.
    begin = None if device.index is None else torch.cuda.set_device
    with ThreadPoolExecutor(1, "batches", begin, (device,)) as thread:
        coming = thread.submit(next, remaining, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, remaining, None)
            yield batch


def forward(model: Transformer, batch: MicroBatch, loss_scale: float, device: torch.device) -> Tensor:
    """The summed cross-entropy of a micro-batch times `loss_scale`, a scalar."""
    numbers, sizes = batch.packed or pack(batch, device)
    parts = numbers.to(device, non_blocking=True).split(sizes)
    tokens, positions, targets, labeled, bounds, places, owners, weights = parts
    loss: Tensor = model(
        tokens,
        positions,
        batch.lengths,
        targets=targets,
        loss_scale=loss_scale,
        images=None if batch.inputs is None else Images(batch.inputs, places, owners),
        draws=batch.draws,
        bounds=bounds.to(torch.int32),
        labeled=labeled,
        label_weights=weights.to(torch.int32).view(torch.float32) if sizes[-1] else None,
    )
    return loss


def train_step(
    model: Transformer,
    optimizer: ClippedAdamW,
    data_parallel: DataParallel,
    batches: Iterable[MicroBatch],
    label_weight: float,
    lr: float,
    device: torch.device,
    extras: Sequence[float] = (),
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """One optimizer step over this rank's micro-batches of one global batch.

    The loss is the weighted sum over label tokens divided by `label_weight`, the sum of weights in the whole step (the
    number of tokens where all count in full). So it does not depend on how examples are assigned to ranks and
    micro-batches. Ranks speak to each other about it once: loss, gradient norm and `extras` are summed together.
    `before_update` is called when only the update is left.
    """
    total = torch.zeros((), device=device)
    remaining = iter(batches)
    batch = next(remaining, None)
    while batch is not None:
        following = next(remaining, None)
        data_parallel.before_backward(last=following is None)
        loss = forward(model, batch, 1.0 / label_weight, device)
        loss.backward()
        total += loss.detach()
        batch = following
    result = _summed(model.parallel, total, optimizer.squared_norm(), extras)
    before_update()
    optimizer.step(lr, result.grad_norm, result.loss)
    return result


def _summed(parallel: Parallel, loss: Tensor, squared_norm: Tensor, extras: Sequence[float]) -> StepResult:
    own = torch.tensor(extras, dtype=torch.float32).to(loss.device, non_blocking=True)
    if parallel.world_size == 1:
        return StepResult(loss, squared_norm.sqrt(), own)
    # The ranks of a model-parallel group have the same loss.
    counted = loss if parallel.model_rank == 0 else torch.zeros_like(loss)
    sums = torch.cat((counted.view(1), squared_norm.view(1), own))
    dist.all_reduce(sums)
    return StepResult(sums[0], sums[1].sqrt(), sums[2:])


@torch.no_grad()
def evaluate(
    model: Transformer,
    data_parallel: DataParallel,
    batches: Iterable[MicroBatch],
    label_weight: float,
    device: torch.device,
) -> float:
    """The loss per label token over all ranks' micro-batches, without training. Every rank has equally many."""
    total = torch.zeros((), device=device)
    for batch in batches:
        total += forward(model, batch, 1.0 / label_weight, device)
    data_parallel.after_evaluation()
    return _summed(model.parallel, total, torch.zeros_like(total), ()).loss.item()


def apply_activation_checkpointing(model: Transformer) -> None:
    """Makes the backward pass recompute each block instead of keeping its activations."""
    # Nothing in a block is random, so there is no generator state to keep.
    model.run_block = lambda block, *args: checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)


def apply_compile(model: Transformer) -> None:
    """Compiles each block, for streams of any length."""
    keep_out_of_graphs()
    for block in model.layers:
        block.compile(dynamic=True)
