"""Which examples an optimizer step sees, and how they are split into micro-batches.

The first depends on data, seed, epoch and `global_batch_size` only, so a run is the same on any number of processes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from llama_acc.core.data.dataset import Dataset
    from llama_acc.core.data.encode import Labels

IGNORED = -100
"""The target of a position that is not trained."""

Lengths = Sequence[int] | NDArray[np.integer[Any]]
"""Tokens of every document."""


Uses = tuple[tuple[int, float], ...]
"""Of each file, whose documents follow each other: how many it has, and how often one is used in an epoch."""


def epoch_length(uses: Uses) -> int:
    """How many documents an epoch has, one that is used twice counted twice."""
    return sum(_uses_of(*file) for file in uses)


def _uses_of(documents: int, weight: float) -> int:
    return max(round(documents * weight), min(documents, 1))


def epoch_order(uses: Uses, seed: int, epoch: int, shuffle: bool = True) -> NDArray[np.int64]:
    """The documents of an epoch in their order, a function of (seed, epoch). [epoch_length]

    Of a weight such as 2.3, each document is used twice, and three tenths of them, drawn anew, once more.
    """
    documents, first = [np.zeros(0, dtype=np.int64)], 0
    for number, (count, weight) in enumerate(uses):
        times, more = divmod(_uses_of(count, weight), max(count, 1))
        own = np.arange(first, first + count)
        documents += [own] * times
        if more:
            drawn = np.random.default_rng(np.random.SeedSequence([seed, epoch, number])).permutation(own)
            documents.append(np.sort(drawn[:more]))
        first += count
    order = np.concatenate(documents)
    if not shuffle:
        return order
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return order[generator.permutation(len(order))]


def micro_batches(
    items: Sequence[int] | NDArray[np.int64],
    lengths: Lengths,
    batch_size: int,
    max_tokens: int | None = None,
    multiple_of: int = 1,
) -> list[list[int]]:
    """Split a step's documents into few micro-batches of about equally many tokens.

    A micro-batch has at most `batch_size` documents and `max_tokens` tokens; a longer document gets one of its own.
    Their number is a multiple of `multiple_of`: where there are too few documents, some are empty.
    """
    longest_first = sorted((int(item) for item in items), key=lambda item: (-int(lengths[item]), item))
    bound = np.inf if max_tokens is None else max_tokens
    alone = [[item] for item in longest_first if lengths[item] > bound]
    rest = longest_first[len(alone) :]
    by_tokens = 1 if max_tokens is None else -(-sum(int(lengths[item]) for item in rest) // max_tokens)
    count = max(-(-len(rest) // batch_size), by_tokens) if rest else 0
    while True:
        count += -(len(alone) + count) % multiple_of
        # Balanced where that fits; packed tightly before one more micro-batch is spent.
        for split in (_split_evenly, _split_tightly):
            if (found := split(rest, lengths, count, batch_size, bound)) is not None:
                batches = alone + [batch for batch in found if batch]
                return batches + [[] for _ in range(-len(batches) % multiple_of)]
        count += 1


def assign_to_ranks(batches: list[list[int]], lengths: Lengths, ranks: int) -> list[list[int]]:
    """Which micro-batches each data-parallel rank computes: equally many, of about equally many tokens.

    Returns:
        For each rank the indices into `batches`, whose number is a multiple of `ranks`.
    """
    loads = [sum(int(lengths[item]) for item in batch) for batch in batches]
    fullest_first = sorted(range(len(batches)), key=lambda index: (-loads[index], index))
    assigned = _split_evenly(fullest_first, loads, ranks, len(batches) // ranks, np.inf)
    assert assigned is not None
    return assigned


def _split_evenly(
    items: list[int], lengths: Lengths, count: int, batch_size: int, bound: float
) -> list[list[int]] | None:
    """Each item to the least loaded batch that has room; None if one finds no room."""
    batches: list[list[int]] = [[] for _ in range(count)]
    # Of those that may take another item, by (load, number).
    open_ones = [(0, number) for number in range(count)]
    for item in items:
        if not open_ones or open_ones[0][0] + int(lengths[item]) > bound:
            return None
        load, number = heapq.heappop(open_ones)
        batches[number].append(item)
        if len(batches[number]) < batch_size:
            heapq.heappush(open_ones, (load + int(lengths[item]), number))
    return batches


def _split_tightly(
    items: list[int], lengths: Lengths, count: int, batch_size: int, bound: float
) -> list[list[int]] | None:
    """Each item to the fullest batch that has room; None if one finds no room."""
    batches: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for item in items:
        length = int(lengths[item])
        room = [b for b in range(count) if len(batches[b]) < batch_size and loads[b] + length <= bound]
        if not room:
            return None
        best = max(room, key=loads.__getitem__)
        batches[best].append(item)
        loads[best] += length
    return batches


class ImageAt(NamedTuple):
    """An image of a micro-batch."""

    reference: str  # what it is, see `images`
    document: int  # of the data set, the one it belongs to
    nth: int  # which of that document's images it is, from 0


@dataclass(frozen=True)
class MicroBatch:
    """Documents end to end, without padding. T is the sum of `lengths`; I the number of their images."""

    tokens: NDArray[np.int64]  # [T]
    targets: NDArray[np.int64]  # [T]: the next token of the same document where that one is labeled, else -100
    positions: NDArray[np.int64]  # [T]: from 0 in each document
    lengths: list[int]  # tokens of each document
    label_weights: NDArray[np.float32] | None = None
    """[T]: how much a target counts in the loss; None: all count in full."""
    images: tuple[ImageAt, ...] = ()  # [I]: in the order of the stream
    image_documents: tuple[int, ...] = ()  # [I]: which document of this micro-batch each belongs to
    image_places: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[I * positions]: where they stand in the stream; what `tokens` has there does not matter."""
    inputs: "Tensor | None" = None  # [I, ...]: what a model takes of them; see `generate.load`
    draws: list[int] = field(default_factory=list)  # in training, a random number for each document; see `draws_of`
    example_sizes: list[int] = field(default_factory=list)
    """How many of the documents each example has: one, but of plain text."""
    packed: "tuple[Tensor, list[int]] | None" = None  # what `train.step.pack` makes of it, if that was done ahead

    @property
    def labeled(self) -> NDArray[np.int64]:
        """[N]: the positions that have a target."""
        return np.flatnonzero(self.targets != IGNORED)

    @property
    def bounds(self) -> NDArray[np.int64]:
        """[documents + 1]: where documents begin and end."""
        return np.cumsum([0, *self.lengths])


def build(dataset: "Dataset", items: Sequence[int]) -> MicroBatch:
    """The micro-batch of these examples, in this order. Of none it is a single token without a label: a rank that has
    nothing to learn still takes part in what all ranks do together."""
    examples = [dataset.documents_in(item) for item in items] or [[(np.zeros(1, np.int32), np.zeros(1, np.bool_))]]
    documents = list(chain.from_iterable(examples))
    weights = None
    if any(labeled.dtype != np.bool_ for _, labeled in documents):
        weights = np.concatenate([np.append(labeled[1:], 0) for _, labeled in documents]).astype(np.float32)
    return MicroBatch(
        tokens=np.concatenate([tokens for tokens, _ in documents]).astype(np.int64),
        targets=np.concatenate([_targets(tokens, labeled) for tokens, labeled in documents]),
        positions=np.concatenate([np.arange(len(tokens), dtype=np.int64) for tokens, _ in documents]),
        lengths=[len(tokens) for tokens, _ in documents],
        label_weights=weights,
        example_sizes=list(map(len, examples)),
    )


def build_multimodal_batch(dataset: "Dataset", items: Sequence[int], positions: int) -> MicroBatch:
    """As `build`, of examples that may have images, each of which takes so many positions."""
    batch = build(dataset, items)
    images: list[ImageAt] = []
    owners: list[int] = []
    places = [np.zeros(0, dtype=np.int64)]
    begin = number = 0
    for item, size in zip(items, batch.example_sizes, strict=False):
        references = dataset.images(item)
        images += [ImageAt(reference, item, nth) for nth, reference in enumerate(references)]
        owners += [number] * len(references)
        places.append(begin + dataset.image_start(item) + np.arange(positions * len(references), dtype=np.int64))
        begin += sum(batch.lengths[number : number + size])
        number += size
    return replace(batch, images=tuple(images), image_documents=tuple(owners), image_places=np.concatenate(places))


def draws_of(items: Sequence[int], sizes: Sequence[int], seed: int, epoch: int) -> list[int]:
    """For each document of a micro-batch, whose examples have so many, a number of 32 bits that decides what is random
    in training it: a function of (seed, epoch, item)."""
    drawn = (
        np.random.SeedSequence([seed, epoch, item]).generate_state(n)
        for item, n in zip(items or [0], sizes, strict=True)
    )
    return np.concatenate(list(drawn)).tolist()


def _targets(tokens: NDArray[np.int32], labeled: "Labels") -> NDArray[np.int64]:
    targets = np.full(len(tokens), IGNORED, dtype=np.int64)
    targets[:-1] = np.where(labeled[1:], tokens[1:], IGNORED)
    return targets
