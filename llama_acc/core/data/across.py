"""Which items of a run an earlier file of it has too: told by digests and hashes, a million of them at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.entry import Encoded
from llama_acc.core.data.findings import Finding
from llama_acc.core.data.prepare import KEPT_PLACES
from llama_acc.core.data.survey import repeat_finding, repeat_kind

_AT_ONCE = 1 << 20


class Across(NamedTuple):
    """Of one file, what earlier ones have too. What is in it twice counts once: the rest is known of the file alone."""

    counts: Mapping[str, int]
    """How many items, by the kind of finding."""
    places: Mapping[str, Sequence[Finding]]
    """The first of them."""


@dataclass
class _Tally:
    """Of one file and kind, how many there are and where the first stand: (row, first part, row in that)."""

    count: int = 0
    places: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, found: "_Repeats") -> None:
        self.count += len(found.row)
        first = np.argsort(found.row, kind="stable")[:KEPT_PLACES]
        these = zip(*(column[first].tolist() for column in found[1:]), strict=True)
        self.places = sorted([*self.places, *these])[:KEPT_PLACES]


class _Repeats(NamedTuple):
    """Documents or rows, each the first of its kind in its part, and where the first part that has it does. [N] each"""

    part: NDArray[np.int64]
    row: NDArray[np.int64]
    first_part: NDArray[np.int64]
    first_row: NDArray[np.int64]

    def by_part(self) -> "Iterator[tuple[int, _Repeats]]":
        """Each part that has some, and these."""
        for part in np.unique(self.part).tolist():
            yield part, self.where(self.part == part)

    def where(self, chosen: NDArray[np.bool_]) -> "_Repeats":
        """Some of them. [N]"""
        return _Repeats(*(column[chosen] for column in self))


def repeated_across(names: Sequence[str], parts: Sequence[Encoded]) -> list[Across]:
    """For every file what earlier ones have too: token by token and label by label, or but for case and white space.

    Args:
        names: what the files are called.
        parts: their documents. A file that is used twice is not its own duplicate.
    """
    first_use: dict[Path, int] = {}
    for number, part in enumerate(parts):
        first_use.setdefault(part.path, number)
    distinct = list(first_use.values())
    if len(distinct) < 2:
        return [Across({}, {})] * len(parts)
    files = [parts[number] for number in distinct]
    exact, near = _tallies(files)
    for part in parts:
        part.release()
    called = [names[number] for number in distinct]
    found = [Across({}, {})] * len(parts)
    for place, number in enumerate(distinct):
        found[number] = _across(called, files, place, exact[place], near[place])
    return found


def _tallies(files: Sequence[Encoded]) -> tuple[list[_Tally], list[_Tally]]:
    """Of every file what is the same as in an earlier one, by documents, and what else is nearly, by rows."""
    exact, near = ([_Tally() for _ in files] for _ in range(2))
    is_exact = [np.zeros(len(file.near), np.bool_) for file in files]
    for repeats in _some_at_a_time([file.digests for file in files]):
        for part, found in repeats.by_part():
            exact[part].add(found)
            is_exact[part][files[part].item[found.row]] = True
    for file in files:
        file.release()
    for repeats in _some_at_a_time([file.near for file in files]):
        for part, found in repeats.by_part():
            near[part].add(found.where(~is_exact[part][found.row]))
    return exact, near


def _across(names: Sequence[str], files: Sequence[Encoded], part: int, exact: _Tally, near: _Tally) -> Across:
    """What is told of one file."""
    counts, places = {}, {}
    for tally, is_exact in ((exact, True), (near, False)):
        if not tally.count:
            continue
        kind = repeat_kind(is_exact)
        counts[kind] = tally.count
        places[kind] = [
            repeat_finding(
                is_exact,
                f"item {(files[part].item[row] if is_exact else row) + 1}",
                f"item {(files[first].item[first_row] if is_exact else first_row) + 1} of {names[first]}",
            )
            for row, first, first_row in tally.places
        ]
    return Across(counts, places)


def _some_at_a_time(digests: Sequence[NDArray[np.uint64]]) -> Iterator[_Repeats]:
    """All repeats, in groups of digests that memory has room for: those with one remainder. 0 is the digest of none."""
    groups = -(-sum(map(len, digests)) // _AT_ONCE)
    for remainder in range(groups):
        rows = [np.flatnonzero((of_part % np.uint64(groups) == remainder) & (of_part != 0)) for of_part in digests]
        yield _repeats(
            np.concatenate([of_part[chosen] for of_part, chosen in zip(digests, rows, strict=True)]),
            np.repeat(np.arange(len(rows)), [len(chosen) for chosen in rows]),
            np.concatenate(rows),
        )


def _repeats(digests: NDArray[np.uint64], part: NDArray[np.int64], row: NDArray[np.int64]) -> _Repeats:
    """Args: the digests of documents or rows, and where these are, in order. [N] each"""
    order = np.argsort(digests, kind="stable")
    digests, part, row = digests[order], part[order], row[order]
    begins = np.append(True, digests[1:] != digests[:-1])[: len(digests)]  # of a group of equal ones
    first = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    is_first_of_its_part = begins | np.append(True, part[1:] != part[:-1])[: len(digests)]
    found = np.flatnonzero(is_first_of_its_part & (part != part[first]))
    return _Repeats(part[found], row[found], part[first[found]], row[first[found]])
