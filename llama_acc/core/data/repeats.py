"""Which items are the same: told by 64 bits an item, for files that do not fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.checks import fields_of
from llama_acc.core.data.items import Dialogue, Item

Hashes = NDArray[np.uint64]
"""One for every row of a file; 0: the row is no item."""


class Repeat(NamedTuple):
    """An item that was there before. Numbers are positions in the hashes, from 0."""

    item: int
    first: int
    exact: bool
    """It is the same to the character, not only but for case and white space."""


def item_hash(item: Item, text_as: Callable[[str], str] = str) -> int:
    """The same for the same roles and texts; never 0. Of 10 million different items, two share one once in 370,000.

    Args:
        item: what is told apart.
        text_as: what counts of a text.
    """
    digest = blake2b(digest_size=8)
    roles = (
        [turn.role + " " * (not turn.trained) for turn in item.turns] if isinstance(item, Dialogue) else ["single_turn"]
    )
    for part in (*roles, *(text_as(text) for _, text in fields_of(item)), *item.images):
        digest.update(len(part).to_bytes(8, "little") + part.encode("utf-8"))
    return int.from_bytes(digest.digest(), "little") or 1


def repeats(exact: Hashes, near: Hashes) -> Iterator[Repeat]:
    """Every item that was there before, in order.

    Args:
        exact: hashes of items as they are. [N]
        near: hashes of items but for what makes no difference. [N]
    """
    of_more = _of_several(near)  # only these can be the same
    first_near, first_exact = _first(near[of_more]), _first(exact[of_more])
    for i in np.flatnonzero(first_near < np.arange(len(of_more))).tolist():
        is_exact = bool(first_exact[i] < i)
        first = first_exact[i] if is_exact else first_near[i]
        yield Repeat(int(of_more[i]), int(of_more[first]), is_exact)


def _of_several(hashes: Hashes) -> NDArray[np.int64]:
    """The positions of all hashes that are there more than once, but for 0; in order."""
    ordered = np.sort(hashes)
    several = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    return np.flatnonzero(np.isin(hashes, several[several != 0]))


def joined(parts: Sequence[Hashes]) -> Hashes:
    """The hashes of several files, one after the other."""
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _first(hashes: Hashes) -> NDArray[np.int64]:
    """Where the hash of each position stands first. [N]"""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    is_first = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]
    first = np.empty(len(hashes), dtype=np.int64)
    first[order] = order[is_first][np.cumsum(is_first) - 1]
    return first
