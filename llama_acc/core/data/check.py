"""Checks of whole data files: every item is read, what is found is counted, reported with its place, and summed up."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from llama_acc.core.data.chat_template import template_for
from llama_acc.core.data.checks import (
    DatasetStats,
    duplicate_finding,
    duplicates,
    fields_of,
    merged_finding,
    quantiles,
)
from llama_acc.core.data.encode import Document, encode_rows
from llama_acc.core.data.findings import EXAMPLES, KINDS, Finding, Findings, beginning
from llama_acc.core.data.image_files import ImageWorkers, default_workers, image_problems
from llama_acc.core.data.images import resolved
from llama_acc.core.data.items import Checked, Item, stream_items
from llama_acc.core.data.plain_text import Text, continues
from llama_acc.core.data.sources import FileSpec
from llama_acc.core.data.templates import Template
from llama_acc.core.errors import UserError
from llama_acc.core.text import count_text
from llama_acc.core.tokenizer import Tokenizer

_CHUNK = 500
_BARS, _MOST_PLOTTED = 16, 8
_COUNTS = ("tokens", "label_tokens", "truncated", "truncated_tokens", "truncated_label_tokens")
_DROPPED = ("dropped", "dropped_without_reply", "dropped_without_room")

FileProgress = Callable[[Path, int], None]
"""Called with a file and how many bytes of it have been read."""


@dataclass
class FileReport:
    """What was found in one file."""

    path: Path
    stats: DatasetStats
    tokenizer: Tokenizer | None
    max_tokens: int | None  # where documents are cut; None: nowhere
    kind: str | None = None  # None: it could not be read at all
    template: str | None = None
    error: str | None = None  # why it could not be read, or not to its end
    hint: str | None = None  # what to do about that
    findings: Findings = field(default_factory=Findings)
    characters: "array[int]" = field(default_factory=lambda: array("q"))  # how many each item has
    tokens: "array[int]" = field(default_factory=lambda: array("q"))  # how many each item has, uncut; with a tokenizer
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys((*_COUNTS, *_DROPPED), 0)))
    """With a tokenizer: tokens and label_tokens of what is left of the items; truncated...: items that are cut, and
    what they lose; dropped...: items without a label, and why."""
    images: int = 0
    unused_keys: Counter[str] = field(default_factory=Counter)  # and in how many items

    @property
    def lengths(self) -> "array[int]":
        """Of the items: in tokens if there is a tokenizer, else in characters."""
        return self.characters if self.tokenizer is None else self.tokens

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
            **{name: getattr(self, name) for name in ("kind", "template", "error", "hint")},
            **{name: getattr(self.stats, name) for name in ("rows", "items", "language", "languages")},
            "images": self.images,
            "unused_keys": dict(self.unused_keys),
            "findings": self.findings.to_json(),
            "characters": quantiles(self.characters),
        }
        if self.tokenizer is not None:
            report |= {"max_tokens": self.max_tokens, **self.counts, "lengths": quantiles(self.tokens)}
        return report

    def count_tokens(self, item: Item, where: str, encoded: Sequence[Document], template: Template) -> None:
        """Count the tokens of an item, as the model would see them."""
        findings, counts = self.stats.findings, self.counts
        for tokens, labeled, merged in encoded:
            if merged:
                findings.add(merged_finding(item, where, template))
            length, trained = len(tokens), np.flatnonzero(labeled)
            self.tokens.append(length)
            most = length if self.max_tokens is None or isinstance(item, Text) else self.max_tokens
            kept = int(np.searchsorted(trained, most))
            lost = len(trained) - kept
            kind = message = ""
            if kept:
                counts.update(tokens=min(length, most), label_tokens=kept)
            elif lost:
                counts.update(dropped=1, dropped_without_room=1)
                kind = "no_label"
                message = f"the first trained token is number {trained[0] + 1:,}, and only {most:,} are kept"
            else:
                counts.update(dropped=1, dropped_without_reply=1)
                kind, message = "no_label", "nothing in it is trained: it has no reply that is to be"
            if kept and length > most:
                counts.update(truncated=1, truncated_tokens=length - most, truncated_label_tokens=lost)
                kind = "cut"
                message = f"{length:,} tokens: the last {length - most:,} are cut, {lost:,} of them trained"
            if kind:
                name, text = next(fields_of(item))
                findings.add(Finding(kind, where, name, message, beginning(text)))


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

    Without a tokenizer nothing is said of tokens; with one, items would be cut at `max_tokens`, counting
    `image_positions` for each image. Images are opened, and those of more than `max_pixels` refused; None: they are not
    looked at. Of a file, `most` findings of a kind are kept (None: all); all are counted.
    """
    reports = [FileReport(spec.path, DatasetStats(most), tokenizer, max_tokens) for spec in specs]
    with ImageWorkers(default_workers()) as workers:
        for spec, report in zip(specs, reports, strict=True):
            try:
                tell = None if progress is None else partial(progress, spec.path)
                stream = stream_items(spec.path, spec.format, spec.adapt, progress=tell)
                template = template_for(spec.template, stream.kind, tokenizer)
            except UserError as error:
                report.error, report.hint = error.message, error.hint
                continue
            report.kind, report.template, report.unused_keys = stream.kind, template.name, stream.unused
            stops, marks, rows = template.text_stops(tokenizer), template.marks(tokenizer), _rows(stream, report)
            while chunk := list(islice(rows, _CHUNK)):
                if max_pixels is not None:
                    chunk = _with_usable_images(chunk, spec.image_root, max_pixels, workers)
                for row, encoded in encode_rows(chunk, template, tokenizer, image_positions):
                    report.stats.add(row, stops, marks)
                    if row.item is not None:
                        report.characters.append(sum(len(text) for _, text in fields_of(row.item)))
                        report.images += len(row.item.images)
                        report.count_tokens(row.item, row.where, encoded, template)
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
        rows = (row for row in stream_items(spec.path, spec.format) if not continues(row.item)) if count else iter(())
        for position, row in enumerate(islice(rows, count), begin):
            if position in first_of:
                first, there = places[first_of[position]]
                there = there if first is spec else f"{there} of {first.path.name}"
                assert row.item is not None
                _, text = next(fields_of(row.item))
                report.findings.add(duplicate_finding(row.where, there, beginning(text)))
            else:
                places[position] = spec, row.where


def histogram(lengths: Sequence[int]) -> list[tuple[str, int, int]]:
    """Bars of one round width: (such as "200 to 299", the least of these lengths, how many items).

    A last bar without an end holds what is longer than 99% of the items.
    """
    longest = int(np.percentile(lengths, 99, method="inverted_cdf"))
    steps = (digit * 10**zeros for zeros in range(30) for digit in (1, 2, 5))
    width = next(step for step in steps if step * _BARS > longest)
    begins = list(range(0, longest + width + 1, width))
    counts, _ = np.histogram(lengths, [*begins, inf])
    names = [f"{begin:,} to {begin + width - 1:,}" if width > 1 else f"{begin:,}" for begin in begins]
    names[-1] = f"{begins[-1]:,} or more"
    bars = list(zip(names, begins, map(int, counts), strict=True))
    return bars if bars[-1][2] else bars[:-1]


def plot_lengths(reports: Sequence[FileReport], max_tokens: int | None, path: Path) -> None:
    """Draw a histogram of the lengths as a PNG, a few files apart, many together; `max_tokens` is a line in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = {str(report.path): np.array(report.lengths) for report in reports if report.lengths}
    if not lengths:
        raise UserError("there is nothing to draw: no item could be read")
    total = np.concatenate(list(lengths.values()))
    if len(lengths) > _MOST_PLOTTED:
        lengths = {f"{len(lengths)} files": total}
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.hist(list(lengths.values()), 60, stacked=True, label=list(lengths))
    if max_tokens is not None:
        label = f"max_tokens {max_tokens:,}: {(total > max_tokens).sum():,} are longer"
        axes.axvline(max_tokens, color="black", ls="--", lw=1, label=label)
    unit = "characters" if reports[0].tokenizer is None else "tokens"
    axes.set(xlabel=unit, ylabel="items", title=f"Lengths of {count_text(len(total), 'item')}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.legend()
    try:
        FigureCanvasAgg(figure).print_png(str(path))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
