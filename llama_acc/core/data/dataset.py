"""The encoded examples of a run: a view over mapped files."""

import hashlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.cache import Encoded
from llama_acc.core.data.encode import Images
from llama_acc.core.data.findings import MOST_PROBLEMS, Finding
from llama_acc.core.data.images import resolved
from llama_acc.core.data.prepare import KEPT_PLACES
from llama_acc.core.data.templates import PromptFormat
from llama_acc.core.errors import UserError

FORMAT_VERSION = 1
_QUANTILES = {"min": 0, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}

# Each maps some 200 KB, for the system maps the neighbours of a page along with it.
_READS_BETWEEN_RELEASES = 512

Rows = NDArray[np.int64]
"""Documents by their number among those of all parts."""


@dataclass(frozen=True)
class DataFile:
    """What one file gave: `items` = documents + `dropped`."""

    path: Path
    template: PromptFormat
    items: int
    dropped: int
    image_root: Path
    """Where relative references to images begin."""
    skipped: tuple[Finding, ...] = ()
    """What is wrong with items that were left out after they had been encoded: the first `MOST_PROBLEMS`."""
    skipped_items: int = 0
    """How many these items are."""
    skipped_kinds: Mapping[str, int] = field(default_factory=dict)
    """How much of each kind is wrong with them."""
    duplicates: int = 0
    """How many documents earlier files have too."""
    duplicate_places: tuple[Finding, ...] = ()
    """The first `KEPT_PLACES` of them."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Documents of several files. Nothing of them is copied: what is chosen is an array of numbers."""

    files: tuple[DataFile, ...]
    parts: tuple[Encoded, ...]
    """For every file its documents."""
    rows: Rows | None = None
    """[D]: which of the parts' documents, in which order; None: all of them as they are."""

    def __len__(self) -> int:
        return self._starts[-1] if self.rows is None else len(self.rows)

    @cached_property
    def _starts(self) -> list[int]:
        """The number of each part's first document, and of all documents."""
        return [0, *np.cumsum([len(part) for part in self.parts], dtype=np.int64).tolist()]

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens per document. [D]"""
        return self._column("length")

    @cached_property
    def label_counts(self) -> NDArray[np.int32]:
        """Label tokens per document. [D]"""
        return self._column("label_count")

    @cached_property
    def image_counts(self) -> NDArray[np.int32]:
        """Images per document. [D]"""
        return self._column("images")

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def label_tokens(self) -> int:
        """Number of label tokens."""
        return int(self.label_counts.sum(dtype=np.int64))

    @property
    def templates(self) -> list[PromptFormat]:
        """The prompt formats in use, each once, in the order of the files."""
        return list({file.template.name: file.template for file in self.files}.values())

    @property
    def template(self) -> PromptFormat:
        """The prompt format; the first file's where they differ."""
        return self.files[0].template

    def document(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Its tokens, and which of them are labeled."""
        part, row = self._place(i)
        document = self.parts[part].document(row)
        self._reads[0] += 1
        if self._reads[0] % _READS_BETWEEN_RELEASES == 0:
            for mapped in self.parts:
                mapped.release()
        return document

    @cached_property
    def _reads(self) -> list[int]:
        """How many documents were read so far."""
        return [0]

    def images(self, i: int) -> Images:
        """Where a document's images are, from any folder."""
        part, row = self._place(i)
        root = self.files[part].image_root
        return tuple(resolved(reference, root) for reference in self.parts[part].images(row))

    def image_start(self, i: int) -> int:
        """Where the first of a document's images stands in it: right behind BOS."""
        return int(self.files[self._place(i)[0]].template.bos)

    def origin(self, i: int) -> str:
        """Where a document came from, such as "alpaca.json item 17"."""
        return f"{self.files[self._place(i)[0]].path.name} {self.where(i)}"

    def where(self, i: int) -> str:
        """Where in its file a document came from, such as "item 17"."""
        part, row = self._place(i)
        return f"item {self.parts[part].table['item'][row] + 1}"

    def _place(self, i: int) -> tuple[int, int]:
        """A document's part, and which one of that it is."""
        row = range(len(self))[i] if self.rows is None else int(self.rows[i])
        part = bisect_right(self._starts, row) - 1
        return part, row - self._starts[part]

    def _column(self, name: str) -> NDArray[Any]:
        """A field of `encode.DOCUMENT` of all documents. [D]"""
        columns = []
        for part in self.parts:
            columns.append(part.table[name].copy())
            part.release()
        whole = np.concatenate(columns)
        return whole if self.rows is None else whole[self.rows]

    def fingerprint(self) -> str:
        """The same if and only if a resumed run would see the same documents and labels in the same order."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return f"v2:{hashlib.sha256(self._column('digest').data).hexdigest()}"

    def prepared(self) -> "Dataset":
        """The same, with all that is computed once computed: for other processes to take over."""
        self.lengths, self.label_counts, self.image_counts, self.fingerprint()
        return self

    def select(self, documents: Rows) -> "Dataset":
        """These documents, in this order. What was dropped stays with the whole."""
        rows = documents if self.rows is None else self.rows[documents]
        counts = np.bincount(np.searchsorted(self._starts, rows, side="right") - 1, minlength=len(self.parts)).tolist()
        files = tuple(replace(file, items=n, dropped=0) for file, n in zip(self.files, counts, strict=True))
        return Dataset(files, self.parts, rows)

    def without(self, found: Iterable[tuple[int, Finding]]) -> "Dataset":
        """All documents but those in which something was found; they count as skipped.

        Args:
            found: documents and what is wrong with them, in the order of the documents. It is not kept.
        """
        bad, first = array("q"), [list(file.skipped) for file in self.files]
        items, kinds = [0] * len(self.files), [Counter(file.skipped_kinds) for file in self.files]
        for document, finding in found:
            number = self._place(document)[0]
            if not bad or bad[-1] != document:
                bad.append(document)
                items[number] += 1
            kinds[number][finding.kind] += 1
            if len(first[number]) < MOST_PROBLEMS:
                first[number].append(finding)
        files = tuple(
            replace(
                file,
                items=file.items - items[i],
                skipped=tuple(first[i]),
                skipped_items=file.skipped_items + items[i],
                skipped_kinds=kinds[i],
            )
            for i, file in enumerate(self.files)
        )
        rows = np.delete(np.arange(len(self)) if self.rows is None else self.rows, bad)
        return Dataset(files, self.parts, rows)

    def split(self, fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """(train, validation): a fixed random part of about `fraction` of the documents is for validation.

        Raises:
            UserError: there are too few documents for one in each.
        """
        if not 0 < fraction < 1:
            raise UserError(f"data.validation.fraction should be above 0 and below 1, but is {fraction}")
        if len(self) < 2:
            raise UserError(f"data.validation.fraction needs at least 2 examples to split, but there are {len(self)}")
        held = min(max(round(len(self) * fraction), 1), len(self) - 1)
        chosen = np.random.default_rng(np.random.SeedSequence([seed, len(self)])).permutation(len(self))
        return self.select(np.sort(chosen[held:])), self.select(np.sort(chosen[:held]))

    def report(self) -> dict[str, Any]:
        """What `data.json` holds. items = documents + dropped; truncated ones are among the documents."""
        by_length = [np.zeros(0, np.int64)]
        reports = []
        for file, part, members in zip(self.files, self.parts, self._members(), strict=True):
            by_length.append(np.bincount(part.table["length"][members], minlength=1))
            report = _counts(
                file.items,
                int(part.table["label_count"][members].sum(dtype=np.int64)),
                int(part.table["cut"][members].sum()),
                file.dropped,
                by_length[-1],
            )
            part.release()
            reports.append({"path": str(file.path), **report, **_findings(file, part)})
        total = np.zeros(max(map(len, by_length)), np.int64)
        for counted in by_length:
            total[: len(counted)] += counted
        warnings: Counter[str] = Counter()
        for report in reports:
            warnings.update(report["warnings"])
        names = [template.name for template in self.templates]
        items, label_tokens, truncated, dropped = (
            sum(report[key] for report in reports) for key in ("items", "label_tokens", "truncated", "dropped")
        )
        return {
            "format_version": FORMAT_VERSION,
            **_counts(items, label_tokens, truncated, dropped, total),
            "skipped": sum(report["skipped"] for report in reports),
            "warnings": dict(warnings),
            "template": names[0] if len(names) == 1 else names,
            "files": reports,
        }

    def _members(self) -> "list[Rows | slice]":
        """For every part, which of its documents are among these; in no order."""
        if self.rows is None:
            return [slice(None) for _ in self.parts]
        ordered = np.sort(self.rows)
        bounds = np.searchsorted(ordered, self._starts)
        return [ordered[bounds[i] : bounds[i + 1]] - self._starts[i] for i in range(len(self.parts))]


def _counts(
    items: int, label_tokens: int, truncated: int, dropped: int, by_length: NDArray[np.int64]
) -> dict[str, Any]:
    """The counts of a report. `by_length`: how many documents have so many tokens."""
    up_to = np.cumsum(by_length)
    lengths = {}
    if up_to[-1]:
        # Each figure is the length of a document that is there: the highest at or below the quantile.
        ranks = np.floor((up_to[-1] - 1) * (np.array(list(_QUANTILES.values())) / 100)).astype(np.int64)
        lengths = dict(zip(_QUANTILES, np.searchsorted(up_to, ranks, side="right").tolist(), strict=True))
    return {
        "items": items,
        "tokens": int(np.arange(len(by_length)) @ by_length),
        "label_tokens": label_tokens,
        "truncated": truncated,
        "dropped": dropped,
        "lengths": lengths,
    }


def _findings(file: DataFile, part: Encoded) -> dict[str, Any]:
    """What was found in a whole file, whether all of its items are in use or not."""
    found = {kind: (of_kind["count"], of_kind["places"]) for kind, of_kind in part.notes["warnings"].items()}
    if file.duplicates:
        count, places = found.get("duplicate", (0, []))
        more = [finding._asdict() for finding in file.duplicate_places]
        found["duplicate"] = count + file.duplicates, [*places, *more][:KEPT_PLACES]
    return {
        "skipped": len(part.skipped_rows) + file.skipped_items,
        "warnings": {kind: count for kind, (count, _) in found.items()},
        "skipped_kinds": dict(Counter(part.notes["skipped_kinds"]) + Counter(file.skipped_kinds)),
        "skipped_items": [*part.notes["skipped"], *(finding._asdict() for finding in file.skipped)][:MOST_PROBLEMS],
        "warning_places": {kind: places for kind, (_, places) in found.items()},
        "unused_keys": part.notes["unused_keys"],
        "template": file.template.name,
    }
