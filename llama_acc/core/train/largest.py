"""The micro-batch of a run that has most tokens: the one that needs most memory."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.batches import epoch_order, micro_batches, step_items
from llama_acc.core.train.plan import Plan

_LOOKED_AT = 32
_DOCUMENTS = 1 << 24
_EPOCHS = 1000


def largest_micro_batch(plan: Plan, data_size: int) -> list[int]:
    """Its items, on `data_size` data-parallel ranks.

    How items are dealt to micro-batches is looked at for the steps that have most tokens, and for those whose longest
    items have most; of a run of more than 1,000 epochs or 16 million items, in its first epochs.
    """
    train, lengths = plan.recipe.train, plan.train.lengths
    epochs = min(math.ceil(train.epochs), _EPOCHS, max(1, _DOCUMENTS // len(plan.train)))
    sums, longest = (np.concatenate(scores) for scores in zip(*_scores(plan, epochs), strict=True))
    steps = min(len(sums), plan.total_steps)
    ranked = [np.argsort(-scores[:steps], kind="stable")[:_LOOKED_AT] for scores in (sums, longest)]
    fullest: list[int] = []
    for step in np.unique(np.concatenate(ranked)).tolist():
        epoch, within = divmod(step, plan.steps_per_epoch)
        items = step_items(_order(plan, epoch), within, train.global_batch_size)
        groups = micro_batches(items, lengths, train.batch_size, train.micro_batch_tokens, data_size)
        fullest = max(fullest, *groups, key=lambda group: int(lengths[group].sum()) if group else 0)
    return fullest


def _order(plan: Plan, epoch: int) -> NDArray[np.int64]:
    return epoch_order(len(plan.train), plan.recipe.train.seed, epoch, plan.recipe.train.shuffle)


def _scores(plan: Plan, epochs: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each epoch its steps' tokens, and the tokens of as many of a step's longest items as a micro-batch takes."""
    train = plan.recipe.train
    count, size = plan.steps_per_epoch, train.global_batch_size
    for epoch in range(epochs):
        lengths = np.zeros(count * size, dtype=np.int64)
        lengths[: len(plan.train)] = plan.train.lengths[_order(plan, epoch)]
        by_length = np.sort(lengths.reshape(count, size), axis=1)
        yield by_length.sum(1), by_length[:, -train.batch_size :].sum(1)
