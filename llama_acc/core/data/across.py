"""Which documents of a run an earlier file of it has too: told by their digests, a million of them at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.entry import Encoded
from llama_acc.core.data.findings import Finding
from llama_acc.core.data.prepare import KEPT_PLACES
from llama_acc.core.data.survey import repeat_finding

_AT_ONCE = 1 << 20


class Across(NamedTuple):
    """Of one file, what earlier ones have too. What is in it twice counts once: the rest is known of the file alone."""

    items: int = 0
    places: tuple[Finding, ...] = ()
    """The first of them."""


class _Repeats(NamedTuple):
    """Documents, each the first of its kind in its part, and where it stands in the first part that has it. [N] each"""

    part: NDArray[np.int64]
    row: NDArray[np.int64]
    first_part: NDArray[np.int64]
    first_row: NDArray[np.int64]


def repeated_across(names: Sequence[str], parts: Sequence[Encoded]) -> list[Across]:
    """For every file what earlier ones have too, token by token and label by label.

    Args:
        names: what the files are called.
        parts: their documents. A file that is used twice is not its own duplicate.
    """
    first_use: dict[Path, int] = {}
    for number, part in enumerate(parts):
        first_use.setdefault(part.path, number)
    distinct = list(first_use.values())
    if len(distinct) < 2:
        return [Across()] * len(parts)
    counts = np.zeros(len(parts), np.int64)
    places: list[list[tuple[int, int, int]]] = [[] for _ in parts]
    for found in _some_at_a_time([parts[number].digests for number in distinct]):
        counts[distinct] += np.bincount(found.part, minlength=len(distinct))
        for place, number in enumerate(distinct):
            mine = np.flatnonzero(found.part == place)
            first = mine[np.argsort(found.row[mine], kind="stable")[:KEPT_PLACES]]
            these = zip(*(column[first].tolist() for column in found[1:]), strict=True)
            places[number] = sorted([*places[number], *these])[:KEPT_PLACES]
    for part in parts:
        part.release()

    def finding(number: int, row: int, first_part: int, first_row: int) -> Finding:
        first = distinct[first_part]
        there = f"item {parts[first].item[first_row] + 1} of {names[first]}"
        return repeat_finding(True, f"item {parts[number].item[row] + 1}", there)

    return [
        Across(int(counts[number]), tuple(finding(number, *place) for place in places[number]))
        for number in range(len(parts))
    ]


def _some_at_a_time(digests: Sequence[NDArray[np.uint64]]) -> Iterator[_Repeats]:
    """All repeats, in groups of digests that memory has room for: those with one remainder."""
    groups = -(-sum(map(len, digests)) // _AT_ONCE)
    for remainder in range(groups):
        rows = [np.flatnonzero(of_part % np.uint64(groups) == remainder) for of_part in digests]
        yield _repeats(
            np.concatenate([of_part[chosen] for of_part, chosen in zip(digests, rows, strict=True)]),
            np.repeat(np.arange(len(rows)), [len(chosen) for chosen in rows]),
            np.concatenate(rows),
        )


def _repeats(digests: NDArray[np.uint64], part: NDArray[np.int64], row: NDArray[np.int64]) -> _Repeats:
    """Args: the digests of documents, and where these are, in order. [N] each"""
    order = np.argsort(digests, kind="stable")
    digests, part, row = digests[order], part[order], row[order]
    begins = np.append(True, digests[1:] != digests[:-1])[: len(digests)]  # of a group of equal ones
    first = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    is_first_of_its_part = begins | np.append(True, part[1:] != part[:-1])[: len(digests)]
    found = np.flatnonzero(is_first_of_its_part & (part != part[first]))
    return _Repeats(part[found], row[found], part[first[found]], row[first[found]])
