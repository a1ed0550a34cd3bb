"""Exact duplicates, found by 64 bits an item, for data that does not fit into memory."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.checks import fields_of
from llama_acc.core.data.findings import Finding
from llama_acc.core.data.items import Dialogue, Item

if TYPE_CHECKING:
    from llama_acc.core.data.cache import Encoded

Hashes = NDArray[np.uint64]
"""One for every item; 0: there is none."""
KIND = "duplicate"
_AT_ONCE = 1 << 20


def item_hash(item: Item) -> int:
    """The same for the same roles and texts; never 0. Of 10 million different items, two share one once in 370,000."""
    digest = blake2b(digest_size=8)
    roles = (
        [turn.role + " " * (not turn.trained) for turn in item.turns] if isinstance(item, Dialogue) else ["single_turn"]
    )
    for part in (*roles, *(text for _, text in fields_of(item)), *item.images):
        digest.update(len(part).to_bytes(8, "little") + part.encode("utf-8"))
    return int.from_bytes(digest.digest(), "little") or 1


def duplicates(hashes: Hashes) -> list[tuple[int, int]]:
    """The position of every item that was there before, in order, and the first position of the same. [N]"""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    begins = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]  # a group of equal ones
    first = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    again = ~begins & (ordered != 0)
    return sorted(zip(order[again].tolist(), first[again].tolist(), strict=True))


def duplicate_finding(where: str, first: str, value: str = "") -> Finding:
    """Says that an item was there before."""
    return Finding(KIND, where, "", f"the same as {first}", value)


def cross_file_duplicates(
    names: Sequence[str], parts: Sequence["Encoded"], kept: int
) -> list[tuple[int, list[Finding]]]:
    """For every file what earlier ones have too, token by token and label by label: how much, and the first of it.

    What is in a file twice counts once; the rest is the file's own.

    Args:
        names: what the files are called.
        parts: their documents. A file that is used twice is not its own duplicate.
        kept: how many places are reported of a file.
    """
    first_use: dict[Path, int] = {}
    for number, part in enumerate(parts):
        first_use.setdefault(part.path, number)
    found: list[list[tuple[int, int, int]]] = [[] for _ in parts]  # row, first part, row in that
    counts = [0] * len(parts)
    # In groups that memory has room for: those of one remainder.
    groups = -(-sum(len(parts[number]) for number in first_use.values()) // _AT_ONCE) if len(first_use) > 1 else 0
    for remainder in range(groups):
        numbers, rows, hashes = [], [], []
        for number in first_use.values():
            digests = parts[number].table["digest"].copy()
            parts[number].release()
            chosen = np.flatnonzero((digests % np.uint64(groups) == remainder) & (digests != 0))
            chosen = chosen[np.sort(np.unique(digests[chosen], return_index=True)[1])]
            numbers.append(np.full(len(chosen), number))
            rows.append(chosen)
            hashes.append(digests[chosen])
        part_of, row_of = np.concatenate(numbers), np.concatenate(rows)
        for again, first in duplicates(np.concatenate(hashes)):
            counts[part_of[again]] += 1
            found[part_of[again]].append((int(row_of[again]), int(part_of[first]), int(row_of[first])))
        found = [sorted(pairs)[:kept] for pairs in found]

    def item(number: int, row: int) -> str:
        return f"item {parts[number].table['item'][row] + 1}"

    return [
        (
            counts[place],
            [
                duplicate_finding(item(place, row), f"{item(first, there)} of {names[first]}")
                for row, first, there in found[place]
            ],
        )
        for place in range(len(parts))
    ]
