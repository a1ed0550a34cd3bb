"""The micro-batch of a run that has most tokens: the one that needs most memory."""

import heapq
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.batches import epoch_order, micro_batches, step_items
from llama_acc.core.train.plan import Plan

_LOOKED_AT = 32
_DOCUMENTS = 1 << 24
_EPOCHS = 1000


class _Step(NamedTuple):
    """An optimizer step that may have the largest micro-batch."""

    score: int
    number: int
    items: NDArray[np.int64]


def largest_micro_batch(plan: Plan, data_size: int) -> list[int]:
    """Its items, on `data_size` data-parallel ranks.

    How items are dealt to micro-batches is looked at for the steps that have most tokens, and for those whose longest
    items have most; of a run of more than 1,000 epochs or 16 million items, in its first epochs.
    """
    train, lengths = plan.recipe.train, plan.train.lengths
    epochs = min(math.ceil(train.epochs), _EPOCHS, max(1, _DOCUMENTS // len(plan.train)))
    most: list[_Step] = []
    longest: list[_Step] = []
    for epoch in range(epochs):
        of_epoch = _highest(plan, epoch)
        most = heapq.nlargest(_LOOKED_AT, [*most, *of_epoch[0]], _rank)
        longest = heapq.nlargest(_LOOKED_AT, [*longest, *of_epoch[1]], _rank)
    steps = {step.number: step for step in [*most, *longest]}
    fullest: list[int] = []
    for number in sorted(steps):
        items = steps[number].items
        groups = micro_batches(items, lengths, train.batch_size, train.micro_batch_tokens, data_size)
        fullest = max(fullest, *groups, key=lambda group: int(lengths[group].sum()) if group else 0)
    return fullest


def _rank(step: _Step) -> tuple[int, int]:
    return step.score, -step.number


def _highest(plan: Plan, epoch: int) -> tuple[list[_Step], list[_Step]]:
    """An epoch's steps that have most tokens; and those whose longest items, as many as a micro-batch takes, do."""
    train = plan.recipe.train
    first, size = epoch * plan.steps_per_epoch, train.global_batch_size
    count = min(plan.steps_per_epoch, max(0, plan.total_steps - first))
    order = epoch_order(len(plan.train), train.seed, epoch, train.shuffle)[: count * size]
    lengths = np.zeros(count * size, dtype=plan.train.lengths.dtype)
    lengths[: len(order)] = plan.train.lengths[order]
    by_length = lengths.reshape(count, size)
    by_length.sort(axis=1)
    sums, longest = by_length.sum(1, dtype=np.int64), by_length[:, -train.batch_size :].sum(1, dtype=np.int64)

    def chosen(scores: NDArray[np.int64]) -> list[_Step]:
        highest = np.argsort(-scores, kind="stable")[:_LOOKED_AT].tolist()
        return [_Step(int(scores[i]), first + i, step_items(order, i, size).copy()) for i in highest]

    return chosen(sums), chosen(longest)
