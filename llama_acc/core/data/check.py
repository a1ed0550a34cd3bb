"""Checks of whole data files: every item is read, what is found is counted, told with its place, and summed up."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.checks import fields_of, format_findings
from llama_acc.core.data.duplicates import KIND, duplicate_finding, duplicates
from llama_acc.core.data.findings import beginning
from llama_acc.core.data.items import Item
from llama_acc.core.data.opened_images import ImageOpener
from llama_acc.core.data.readers import Checked, stream_items
from llama_acc.core.data.sources import FileSpec
from llama_acc.core.data.survey import EXAMPLES, Findings, Survey
from llama_acc.core.data.templates import PromptFormat, format_for
from llama_acc.core.data.truncation import Truncation
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer

_CHUNK = 500
_QUANTILES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}

FileProgress = Callable[[Path, int], None]
"""Called with a file and how many bytes of it have been read."""


@dataclass
class FileReport:
    """What was found in one file."""

    path: Path
    kind: str | None = None
    """None: it could not be read at all."""
    template: str | None = None
    format: PromptFormat | None = None
    """That of this name."""
    error: str | None = None
    """Why it could not be read, or not to its end."""
    hint: str | None = None
    """What to do about that."""
    survey: Survey = field(default_factory=Survey)
    findings: Findings = field(default_factory=Findings)
    truncation: Truncation | None = None
    characters: Counter[int] = field(default_factory=Counter)
    """How many items have so many characters."""

    images: int = 0
    """Of all items together."""

    unused_keys: Counter[str] = field(default_factory=Counter)
    """Keys that are not used, and in how many items."""

    @property
    def lengths(self) -> Counter[int]:
        """How many items are so long: in tokens if there is a tokenizer, else in characters."""
        return self.characters if self.truncation is None else self.truncation.lengths

    @property
    def unit(self) -> str:
        """Of `lengths`."""
        return "characters" if self.truncation is None else "tokens"

    @property
    def blank(self) -> int:
        """Rows without a question and an answer, which are left out."""
        return self.findings.counts["blank"]

    @property
    def wrong(self) -> int:
        """Rows that cannot be trained on, besides blank ones."""
        return self.survey.rows - self.survey.items - self.blank

    @property
    def fatal(self) -> int:
        """How many things in it keep a run from starting."""
        return self.findings.fatal() + (self.error is not None)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        survey, truncation = self.survey, self.truncation
        report = {
            "path": str(self.path),
            "kind": self.kind,
            "template": self.template,
            "error": self.error,
            "hint": self.hint,
            "rows": survey.rows,
            "items": survey.items,
            "language": survey.language,
            "languages": survey.languages,
            "images": self.images,
            "unused_keys": dict(self.unused_keys),
            "findings": self.findings.to_json(),
            "characters": quantiles(self.characters),
        }
        return report if truncation is None else {**report, **truncation.to_json(), "lengths": quantiles(self.lengths)}


def check_files(
    specs: Sequence[FileSpec],
    tokenizer: Tokenizer | None,
    max_tokens: int | None,
    *,
    image_positions: int = 0,
    max_pixels: int | None = None,
    most: int | None = EXAMPLES,
    progress: FileProgress | None = None,
) -> list[FileReport]:
    """Read every item of every file.

    Args:
        specs: the files, and in which prompt format.
        tokenizer: the model's; None: nothing is said of tokens.
        max_tokens: where items would be cut; None: nowhere.
        image_positions: how many places an image takes in the model.
        max_pixels: images are opened, and larger ones refused; None: images are not looked at.
        most: how many findings of a kind are kept of a file; None: all. All are counted.
        progress: told how far the reading is.
    """
    with contextlib.nullcontext() if max_pixels is None else ImageOpener(max_pixels) as opener:
        checker = _Checker(tokenizer, max_tokens, image_positions, opener, most, progress)
        reports = [checker.check(spec) for spec in specs]
    _add_duplicates(reports, specs)
    return reports


def first_items(specs: Sequence[FileSpec], count: int) -> list[tuple[FileSpec, str, str, Item]]:
    """The first items that can be trained on: (file, kind, place, item)."""
    found: list[tuple[FileSpec, str, str, Item]] = []
    for spec in specs:
        try:
            stream = stream_items(spec.path, spec.format)
            good = ((row.where, row.item) for row in stream if row.item is not None)
            found += [(spec, stream.kind, *pair) for pair in islice(good, count - len(found))]
        except UserError:
            continue  # the check itself tells
    return found


def quantiles(lengths: Counter[int]) -> dict[str, int]:
    """Quantiles of a counted distribution, each the length of an item that is there."""
    if not lengths:
        return {}
    values = sorted(lengths)
    ranks = np.cumsum([lengths[value] for value in values])
    # As numpy's percentile with method "lower".
    return {
        name: values[int(np.searchsorted(ranks, int(share * (ranks[-1] - 1)), side="right"))]
        for name, share in _QUANTILES.items()
    }


@dataclass(frozen=True)
class _Checker:
    """Checks one file after the other."""

    tokenizer: Tokenizer | None
    max_tokens: int | None
    image_positions: int
    opener: ImageOpener | None
    most: int | None
    progress: FileProgress | None

    def check(self, spec: FileSpec) -> FileReport:
        report = FileReport(spec.path, survey=Survey(self.most))
        tell = None if self.progress is None else partial(self.progress, spec.path)
        rows: list[Checked] = []
        try:
            stream = stream_items(spec.path, spec.format, progress=tell)
            template = format_for(spec.template, stream.kind, self.tokenizer)
            report.kind, report.template, report.unused_keys = stream.kind, template.name, stream.unused
            report.format = template
            if self.tokenizer is not None:
                report.truncation = Truncation(
                    template, self.tokenizer, self.max_tokens, report.survey.findings, self.image_positions
                )
            for row in stream:
                rows.append(row)
                if len(rows) == _CHUNK:
                    self._look_at(rows, report, spec)
                    rows.clear()
        except UserError as error:
            report.error, report.hint = error.message, error.hint
        # Where a file breaks off, what stands before is checked too.
        self._look_at(rows, report, spec)
        report.findings = report.survey.found()
        return report

    def _look_at(self, rows: list[Checked], report: FileReport, spec: FileSpec) -> None:
        if self.opener is not None:
            rows = self.opener.opened(rows, spec.image_root)
        form = report.format
        looks = ([], []) if form is None else (form.text_stops(self.tokenizer), form.marks(self.tokenizer))
        for row in rows:
            report.survey.add(row.where, row.item, row.problems)
            if row.item is not None:
                for finding in format_findings(row.item, row.where, *looks):
                    report.survey.findings.add(finding)
                report.characters[sum(len(text) for _, text in fields_of(row.item))] += 1
                report.images += len(row.item.images)
        if report.truncation is not None:
            report.truncation.add([(row.where, row.item) for row in rows if row.item is not None])


def _add_duplicates(reports: Sequence[FileReport], specs: Sequence[FileSpec]) -> None:
    """Items that were there before, in the same file or an earlier one."""
    hashes = [report.survey.hashes() for report in reports]
    begins = np.cumsum([0, *map(len, hashes)])
    shown: list[tuple[_Place, _Place]] = []
    for position, first_position in duplicates(np.concatenate([np.zeros(0, np.uint64), *hashes])):
        item, first = _place(begins, position), _place(begins, first_position)
        findings = reports[item.file].findings
        findings.extend(KIND, 1, [])
        if findings.most is None or findings.counts[KIND] <= findings.most:
            shown.append((item, first))
    looked = _look_up(specs, {place for pair in shown for place in pair})
    for item, first in shown:
        (where, value), (there, _) = looked[item], looked[first]
        there = there if first.file == item.file else f"{there} of {specs[first.file].path.name}"
        reports[item.file].findings.extend(KIND, 0, [duplicate_finding(where, there, value)])


class _Place(NamedTuple):
    """An item, by the numbers of its file and row from 0."""

    file: int
    row: int


def _place(begins: NDArray[np.int64], position: int) -> _Place:
    file = int(np.searchsorted(begins, position, side="right")) - 1
    return _Place(file, position - int(begins[file]))


def _look_up(specs: Sequence[FileSpec], places: set[_Place]) -> dict[_Place, tuple[str, str]]:
    """Where these items stand and how they begin: read again, as texts were not kept."""
    found: dict[_Place, tuple[str, str]] = {}
    for file, spec in enumerate(specs):
        rows = {row for number, row in places if number == file}
        if not rows:
            continue
        for row, checked in enumerate(stream_items(spec.path, spec.format)):
            if row in rows and checked.item is not None:
                _, text = next(fields_of(checked.item))
                found[_Place(file, row)] = checked.where, beginning(text)
            if row == max(rows):
                break
    return found
