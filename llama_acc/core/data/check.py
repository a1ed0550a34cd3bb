"""Checks of whole data files: every item is read, what is found is counted, reported with its place, and summed up."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from llama_acc.core.data.checks import DatasetStats, duplicate_finding, duplicates, fields_of, merged_finding
from llama_acc.core.data.encode import documents
from llama_acc.core.data.findings import EXAMPLES, KINDS, Finding, Findings, beginning
from llama_acc.core.data.image_workers import ImageWorkers, default_workers, image_problems
from llama_acc.core.data.images import resolved
from llama_acc.core.data.items import Item
from llama_acc.core.data.read import Checked, stream_items
from llama_acc.core.data.sources import FileSpec
from llama_acc.core.data.templates import PromptFormat, format_for
from llama_acc.core.errors import UserError
from llama_acc.core.text import count_text
from llama_acc.core.tokenizer import Tokenizer

_CHUNK = 500
_BARS, _MOST_PLOTTED = 16, 8
_QUANTILES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}
_TRUNCATED = ("truncated", "truncated_tokens", "truncated_label_tokens")
_DROPPED = ("dropped", "dropped_without_reply", "dropped_without_room")

FileProgress = Callable[[Path, int], None]
"""Called with a file and how many bytes of it have been read."""


@dataclass
class Truncation:
    """Counts the tokens of items as the model would see them, and what `data.max_tokens` takes of them."""

    template: PromptFormat
    tokenizer: Tokenizer
    max_tokens: int | None
    """Where documents are cut; None: nowhere."""
    findings: Findings
    """Receives the items that are cut or dropped."""
    image_positions: int = 0
    """How many positions an image takes, in front of the text."""
    lengths: Counter[int] = field(default_factory=Counter)
    """How many items have so many tokens, uncut."""
    counts: Counter[str] = field(
        default_factory=lambda: Counter(dict.fromkeys(("tokens", "label_tokens", *_TRUNCATED, *_DROPPED), 0))
    )
    """tokens, label_tokens: of what is left of the items. truncated...: items that are cut, and what they lose."""

    def add(self, items: Sequence[tuple[str, Item]]) -> None:
        """Measure some items, given with their places."""
        encoded = documents([item for _, item in items], self.template, self.tokenizer)
        for (where, item), (tokens, labeled, merged) in zip(items, encoded, strict=True):
            if merged:
                self.findings.add(merged_finding(item, where, self.template))
            labeled[:1] = False  # nothing predicts it
            positions = self.image_positions * len(item.images)
            length, trained = positions + len(tokens), positions + np.flatnonzero(labeled)
            self.lengths[length] += 1
            most = length if self.max_tokens is None else self.max_tokens
            kept = int(np.searchsorted(trained, most))
            lost = len(trained) - kept
            kind = message = ""
            if kept:
                self.counts.update(tokens=min(length, most), label_tokens=kept)
            elif lost:
                self.counts.update(dropped=1, dropped_without_room=1)
                kind = "no_label"
                message = f"the first trained token is number {trained[0] + 1:,}, and only {most:,} are kept"
            else:
                self.counts.update(dropped=1, dropped_without_reply=1)
                kind, message = "no_label", "nothing in it is trained: it has no reply that is to be"
            if kept and length > most:
                self.counts.update(truncated=1, truncated_tokens=length - most, truncated_label_tokens=lost)
                kind = "cut"
                message = f"{length:,} tokens: the last {length - most:,} are cut, {lost:,} of them trained"
            if kind:
                name, text = next(fields_of(item))
                self.findings.add(Finding(kind, where, name, message, beginning(text)))


@dataclass
class FileReport:
    """What was found in one file."""

    path: Path
    stats: DatasetStats
    kind: str | None = None
    """None: it could not be read at all."""
    template: str | None = None
    error: str | None = None
    """Why it could not be read, or not to its end."""
    hint: str | None = None
    """What to do about that."""
    findings: Findings = field(default_factory=Findings)
    truncation: Truncation | None = None
    characters: Counter[int] = field(default_factory=Counter)
    """How many items have so many characters."""
    images: int = 0
    unused_keys: Counter[str] = field(default_factory=Counter)
    """Keys that are not used, and in how many items."""

    @property
    def lengths(self) -> Counter[int]:
        """How many items are so long: in tokens if there is a tokenizer, else in characters."""
        return self.characters if self.truncation is None else self.truncation.lengths

    @property
    def wrong(self) -> int:
        """Rows that cannot be trained on, besides blank ones."""
        return self.stats.rows - self.stats.items - self.findings.counts["blank"]

    @property
    def fatal(self) -> int:
        """How many things in it keep a run from starting."""
        counts = self.findings.counts.items()
        return sum(count for kind, count in counts if KINDS[kind].fatal) + (self.error is not None)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        report = {
            "path": str(self.path),
            "kind": self.kind,
            "template": self.template,
            "error": self.error,
            "hint": self.hint,
            "rows": self.stats.rows,
            "items": self.stats.items,
            "language": self.stats.language,
            "languages": self.stats.languages,
            "images": self.images,
            "unused_keys": dict(self.unused_keys),
            "findings": self.findings.to_json(),
            "characters": quantiles(self.characters),
        }
        if self.truncation is not None:
            report |= {"max_tokens": self.truncation.max_tokens, **self.truncation.counts}
            report["lengths"] = quantiles(self.lengths)
        return report


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
        max_tokens: where items would be cut, counting `image_positions` for each image; None: nowhere.
        max_pixels: images are opened, and larger ones refused; None: images are not looked at.
        most: how many findings of a kind are kept of a file; None: all. All are counted.
    """
    reports = [FileReport(spec.path, DatasetStats(most)) for spec in specs]
    with ImageWorkers(default_workers()) as workers:
        for spec, report in zip(specs, reports, strict=True):
            try:
                tell = None if progress is None else partial(progress, spec.path)
                stream = stream_items(spec.path, spec.format, progress=tell)
                template = format_for(spec.template, stream.kind, tokenizer)
            except UserError as error:
                report.error, report.hint = error.message, error.hint
                continue
            report.kind, report.template, report.unused_keys = stream.kind, template.name, stream.unused
            if tokenizer is not None:
                findings = report.stats.findings
                report.truncation = Truncation(template, tokenizer, max_tokens, findings, image_positions)
            stops, marks, rows = template.text_stops(tokenizer), template.marks(tokenizer), _rows(stream, report)
            while chunk := list(islice(rows, _CHUNK)):
                if max_pixels is not None:
                    chunk = _with_usable_images(chunk, spec.image_root, max_pixels, workers)
                for row in chunk:
                    report.stats.add(row, stops, marks)
                items = [(row.where, row.item) for row in chunk if row.item is not None]
                report.characters.update(sum(len(text) for _, text in fields_of(item)) for _, item in items)
                report.images += sum(len(item.images) for _, item in items)
                if report.truncation is not None:
                    report.truncation.add(items)
            report.findings = report.stats.all_findings(with_duplicates=False)
    _add_duplicates(specs, reports)
    return reports


def _rows(stream: Iterable[Checked], report: FileReport) -> Iterator[Checked]:
    """The rows up to where the file breaks off, if it does: what stands before is checked, too."""
    try:
        yield from stream
    except UserError as error:
        report.error, report.hint = error.message, error.hint


def _with_usable_images(rows: Sequence[Checked], root: Path, max_pixels: int, workers: ImageWorkers) -> list[Checked]:
    """The same rows; of an item with a bad image, what is wrong with it instead."""
    images = [() if row.item is None else row.item.images for row in rows]
    problems = image_problems((resolved(image, root) for of_row in images for image in of_row), max_pixels, workers)
    checked = []
    for row, of_row in zip(rows, images, strict=True):
        found = [
            Finding("image_file", row.where, "image", f"the image {problem}", beginning(image))
            for image in of_row
            if (problem := problems.get(resolved(image, root))) is not None
        ]
        checked.append(Checked(row.where, None, found) if found else row)
    return checked


def _add_duplicates(specs: Sequence[FileSpec], reports: Sequence[FileReport]) -> None:
    """Items that were there before, in the same file or an earlier one.

    Their files are read again for where they stand and how they begin: texts were not kept.
    """
    hashes = np.concatenate([np.zeros(0, np.uint64), *(report.stats.hashes() for report in reports)])
    first_of = dict(duplicates(hashes))
    wanted = np.unique(np.array([*first_of, *first_of.values()], np.int64))
    places: dict[int, tuple[FileSpec, str]] = {}
    end = 0
    for spec, report in zip(specs, reports, strict=True):
        begin, end = end, end + report.stats.rows
        here = wanted[(wanted >= begin) & (wanted < end)]
        count = here[-1] - begin + 1 if len(here) else 0
        for position, row in enumerate(islice(stream_items(spec.path, spec.format), count) if count else (), begin):
            if position in first_of:
                first, there = places[first_of[position]]
                there = there if first is spec else f"{there} of {first.path.name}"
                assert row.item is not None
                _, text = next(fields_of(row.item))
                report.findings.add(duplicate_finding(row.where, there, beginning(text)))
            else:
                places[position] = spec, row.where


def quantiles(lengths: Counter[int]) -> dict[str, int]:
    """Quantiles of a counted distribution, each the length of an item that is there (numpy's method "lower")."""
    values = sorted(lengths)
    ranks = np.cumsum([lengths[value] for value in values])
    return {
        name: values[int(np.searchsorted(ranks, int(share * (ranks[-1] - 1)), side="right"))]
        for name, share in _QUANTILES.items()
        if values
    }


def histogram(lengths: Counter[int]) -> list[tuple[str, int, int]]:
    """Bars of one round width: (such as "200 to 299", the least of these lengths, how many items).

    A last bar without an end holds what is longer than 99% of the items.
    """
    values = sorted(lengths)
    ranks = np.cumsum([lengths[value] for value in values])
    longest = values[int(np.searchsorted(ranks, 0.99 * ranks[-1]))]
    steps = (digit * 10**zeros for zeros in range(30) for digit in (1, 2, 5))
    width = next(step for step in steps if step * _BARS > longest)
    begins = list(range(0, longest + width + 1, width))
    counts, _ = np.histogram(list(lengths), [*begins, inf], weights=list(lengths.values()))
    names = [f"{begin:,} to {begin + width - 1:,}" if width > 1 else f"{begin:,}" for begin in begins]
    names[-1] = f"{begins[-1]:,} or more"
    bars = list(zip(names, begins, map(int, counts), strict=True))
    return bars if bars[-1][2] else bars[:-1]


def plot_lengths(reports: Sequence[FileReport], max_tokens: int | None, path: Path) -> None:
    """Draw a histogram of the lengths as a PNG, a few files apart, many together; `max_tokens` is a line in it.

    Raises:
        UserError: there are none, or it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [report for report in reports if report.lengths]
    if not drawn:
        raise UserError("there is nothing to draw: no item could be read")
    lengths = {str(report.path): report.lengths for report in drawn}
    total: Counter[int] = sum(lengths.values(), Counter())
    if len(lengths) > _MOST_PLOTTED:
        lengths = {f"{len(lengths)} files": total}
    values, weights = [list(of_file) for of_file in lengths.values()], [list(c.values()) for c in lengths.values()]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.hist(values, 60, weights=weights, stacked=True, label=list(lengths))
    if max_tokens is not None:
        longer = sum(count for length, count in total.items() if length > max_tokens)
        label = f"max_tokens {max_tokens:,}: {longer:,} are longer"
        axes.axvline(max_tokens, color="black", ls="--", lw=1, label=label)
    unit = "characters" if drawn[0].truncation is None else "tokens"
    axes.set(xlabel=unit, ylabel="items", title=f"Lengths of {count_text(total.total(), 'item')}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.legend()
    try:
        FigureCanvasAgg(figure).print_png(str(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
