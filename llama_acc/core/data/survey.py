"""What is found in all items of a file, in memory that hardly grows: counts, the first of each kind, 8 bytes an item.

A survey is filled item by item, in the order of the file. Surveys of consecutive parts of a file can be made by several
processes and merged: the result is the same.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_acc.core.data.checks import checked_item, replies_of
from llama_acc.core.data.duplicates import Hashes, duplicate_finding, duplicates, item_hash
from llama_acc.core.data.findings import KINDS, Finding, beginning
from llama_acc.core.data.items import Item
from llama_acc.core.data.language import language_of

CHECKS_VERSION = 6
"""Part of the cache's key: raise it whenever the same item may lead to other findings."""
EXAMPLES = 100
"""Findings of one kind that are kept; all are counted."""
# A language that so many of the items are in is that of the file; below, the file is a mixture.
_MOST = 0.75
_ENOUGH = 4


@dataclass
class Findings:
    """Findings counted by kind, and the first ones of each kind."""

    most: int | None = EXAMPLES
    """How many of a kind are kept; None: all."""
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Count it, and keep it if it is one of the first."""
        self.extend(finding.kind, 1, [finding])

    def extend(self, kind: str, count: int, places: Sequence[Finding]) -> None:
        """Count so many of a kind, of which some are at hand."""
        self.counts[kind] += count
        kept = self.places.setdefault(kind, [])
        kept.extend(places if self.most is None else places[: max(self.most - len(kept), 0)])

    def keeps(self, kind: str) -> bool:
        """Whether one more of a kind would be kept."""
        return self.most is None or len(self.places.get(kind, ())) < self.most

    def merge(self, later: "Findings") -> None:
        """Add what was found further on."""
        for kind, count in later.counts.items():
            self.extend(kind, count, later.places.get(kind, []))

    def fatal(self) -> int:
        """How many there are of those that keep an item from being trained on."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind].fatal)

    def to_json(self) -> dict[str, Any]:
        """As plain values, kinds in their order."""
        return {
            kind: {
                "count": self.counts[kind],
                "fatal": KINDS[kind].fatal,
                "places": [finding._asdict() for finding in self.places[kind]],
            }
            for kind in KINDS
            if self.counts[kind]
        }


class Survey:
    """Everything found in the rows of one file so far."""

    def __init__(self, most: int | None = EXAMPLES) -> None:
        """Args:
        most: how many findings of a kind are kept; None: all.
        """
        self.findings = Findings(most)
        self.rows = 0
        """Rows of the file."""
        self.items = 0
        """Those of them that can be trained on."""
        self._languages = Findings(most)  # which of them is the language of the rest is known at the end only
        self._hashes = array("Q")

    def add(self, where: str, item: Item | None, problems: Sequence[Finding] = ()) -> None:
        """Look at one more row: an item, or the problems that keep it from being one."""
        self.rows += 1
        for problem in problems:
            self.findings.add(problem)
        if item is None:
            self._hashes.append(0)
            return
        self.items += 1
        for finding in checked_item(item, where):
            self.findings.add(finding)
        self._hashes.append(item_hash(item))
        self._add_language(where, item)

    def _add_language(self, where: str, item: Item) -> None:
        """The language of its first reply that is long enough to tell."""
        for name, text in replies_of(item):
            if (language := language_of(text)) is not None:
                places = []
                if self._languages.keeps(language):
                    places.append(Finding(language, where, name, f"a reply in {language!r}", beginning(text)))
                self._languages.extend(language, 1, places)
                return

    def merge(self, later: "Survey") -> None:
        """Add the survey of what follows in the file."""
        self.findings.merge(later.findings)
        self._languages.merge(later._languages)
        self.rows += later.rows
        self.items += later.items
        self._hashes.extend(later._hashes)

    @property
    def languages(self) -> dict[str, int]:
        """How many items are in each language, most first; those of which it cannot be told are not counted."""
        return dict(self._languages.counts.most_common())

    @property
    def language(self) -> str | None:
        """The language that most of the items are in, if there is one."""
        counts = self.languages
        first = next(iter(counts), None)
        told = sum(counts.values())
        return first if first is not None and told >= _ENOUGH and counts[first] >= _MOST * told else None

    def hashes(self) -> Hashes:
        """One for every row; 0 where it is no item."""
        return np.array(self._hashes, dtype=np.uint64)

    def found(self) -> Findings:
        """All findings so far, but for items that were there before."""
        found = Findings(self.findings.most)
        found.merge(self.findings)
        rest = self.language
        for language in self._languages.counts if rest is not None else ():
            if language != rest:
                places = [
                    f._replace(kind="language", message=f"{f.message}, but the rest is in {rest!r}")
                    for f in self._languages.places[language]
                ]
                found.extend("language", self._languages.counts[language], places)
        return found

    def finish(self) -> Findings:
        """All findings."""
        found = self.found()
        for item, first in duplicates(self.hashes()):
            found.add(duplicate_finding(f"item {item + 1}", f"item {first + 1}"))
        return found
