"""Exact duplicates, found by 64 bits an item, for data that does not fit into memory."""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.checks import fields_of
from llama_acc.core.data.entry import Encoded
from llama_acc.core.data.findings import Finding
from llama_acc.core.data.items import Dialogue, Item

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


class Across(NamedTuple):
    """Duplicates in one file of items in earlier files; what is in it twice counts once, the rest is the file's own."""

    counts: Mapping[str, int] = {}
    places: Mapping[str, Sequence[Finding]] = {}


def duplicates_across(names: Sequence[str], parts: Sequence[Encoded], kept: int) -> list[Across]:
    """For every file what earlier ones have too, token by token and label by label.

    Args:
        names: what the files are called.
        parts: their documents. A file that is used twice is not its own duplicate.
        kept: how many places are told of a file.
    """
    first_use: dict[Path, int] = {}
    for number, part in enumerate(parts):
        first_use.setdefault(part.path, number)
    numbers = list(first_use.values())
    found: list[list[tuple[int, int, int]]] = [[] for _ in parts]  # row, first part, row in that
    counts = [0] * len(parts)
    if len(numbers) > 1:
        for number, pairs in _across([parts[number].digests for number in numbers]):
            place = numbers[number]
            counts[place] += len(pairs)
            found[place] = sorted([*found[place], *pairs])[:kept]
        for part in parts:
            part.release()

    def told(place: int) -> Across:
        def item(number: int, row: int) -> str:
            return f"item {parts[number].item[row] + 1}"

        places = [
            duplicate_finding(item(place, row), f"{item(numbers[first], there)} of {names[numbers[first]]}")
            for row, first, there in found[place]
        ]
        return Across({KIND: counts[place]}, {KIND: places}) if places else Across()

    return [told(place) for place in range(len(parts))]


def _across(digests: Sequence[Hashes]) -> Iterable[tuple[int, list[tuple[int, int, int]]]]:
    """Duplicates of earlier parts by part, in groups of digests that memory has room for: those with one remainder."""
    groups = -(-sum(map(len, digests)) // _AT_ONCE)
    for remainder in range(groups):
        rows = [np.flatnonzero((of_part % np.uint64(groups) == remainder) & (of_part != 0)) for of_part in digests]
        # Each part's own duplicates count once.
        rows = [
            chosen[np.sort(np.unique(of_part[chosen], return_index=True)[1])]
            for of_part, chosen in zip(digests, rows, strict=True)
        ]
        part = np.repeat(np.arange(len(rows)), [len(chosen) for chosen in rows])
        row = np.concatenate(rows)
        chosen = np.concatenate([of_part[some] for of_part, some in zip(digests, rows, strict=True)])
        found: dict[int, list[tuple[int, int, int]]] = {}
        for again, first in duplicates(chosen):
            found.setdefault(int(part[again]), []).append((int(row[again]), int(part[first]), int(row[first])))
        yield from found.items()
