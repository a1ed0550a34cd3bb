"""The encoded examples of a run: a view over mapped files."""

import hashlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.duplicates import Across
from llama_acc.core.data.encode import Images
from llama_acc.core.data.entry import Encoded
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
    across: Across = field(default_factory=Across)
    """What earlier files have too."""


class _Skipped:
    """What is left out of a file, found by found: the first of it, and counts."""

    def __init__(self) -> None:
        self._first: list[Finding] = []
        self._kinds: Counter[str] = Counter()
        self._items = 0

    def add(self, finding: Finding, is_new: bool) -> None:
        """One thing more that is wrong, with an item that is new or the last one's."""
        self._first += [finding][: MOST_PROBLEMS - len(self._first)]
        self._kinds[finding.kind] += 1
        self._items += is_new

    def added_to(self, file: DataFile) -> DataFile:
        return replace(
            file,
            items=file.items - self._items,
            skipped=(*file.skipped, *self._first)[:MOST_PROBLEMS],
            skipped_items=file.skipped_items + self._items,
            skipped_kinds=Counter(file.skipped_kinds) + self._kinds,
        )


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
        return self._column("lengths")

    @cached_property
    def label_counts(self) -> NDArray[np.int32]:
        """Label tokens per document. [D]"""
        return self._column("label_counts")

    @cached_property
    def image_counts(self) -> NDArray[np.int32]:
        """Images per document. [D]"""
        return self._column("image_counts")

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
        """Its tokens, and which of them are labelled."""
        part, row = self._place(i)
        document = self.parts[part].document(row)
        self._reads[0] += 1
        if self._reads[0] % _READS_BETWEEN_RELEASES == 0:
            self._release()
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
        return f"item {self.parts[part].item[row] + 1}"

    def _place(self, i: int) -> tuple[int, int]:
        """A document's part, and which one of that it is."""
        row = range(len(self))[i] if self.rows is None else int(self.rows[i])
        part = bisect_right(self._starts, row) - 1
        return part, row - self._starts[part]

    def _column(self, name: str) -> NDArray[Any]:
        whole = self._column_of_parts(name)
        return whole if self.rows is None else whole[self.rows]

    def _column_of_parts(self, name: str) -> NDArray[Any]:
        columns = [getattr(part, name) for part in self.parts]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    def fingerprint(self) -> str:
        """The same if and only if a resumed run would see the same documents and labels in the same order."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self._column("digests"), dtype="<u8").data)
        self._release()
        return f"v2:{digest.hexdigest()}"

    def is_data_of(self, fingerprint: str) -> bool:
        """Whether `fingerprint` was that of this data, in this version or the one before."""
        return fingerprint == (self.fingerprint() if fingerprint.startswith("v2:") else self._first_fingerprint())

    def _first_fingerprint(self) -> str:
        """sha256 of all offsets, tokens and labels: what there was before every document had a digest of its own."""
        digest = hashlib.sha256(np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype("<i8").data)
        for i in range(len(self)):
            digest.update(self.document(i)[0].astype("<i4").data)
        bits = np.zeros(0, np.bool_)
        for i in range(len(self)):
            bits = np.concatenate([bits, self.document(i)[1]])
            whole = len(bits) // 8 * 8
            digest.update(np.packbits(bits[:whole]).data)
            bits = bits[whole:]
        digest.update(np.packbits(bits).data)
        return digest.hexdigest()

    def prepared(self) -> "Dataset":
        """The same, with all that is computed only once in its life computed: for another process to take over."""
        self.lengths, self.label_counts, self.fingerprint()
        return self

    def select(self, documents: Rows) -> "Dataset":
        """These documents, in this order. What was dropped stays with the whole."""
        rows = documents if self.rows is None else self.rows[documents]
        chosen = Dataset(self.files, self.parts, rows)
        counts = [len(part.item[members]) for part, members in zip(self.parts, chosen._members(), strict=True)]
        files = tuple(replace(file, items=n, dropped=0) for file, n in zip(self.files, counts, strict=True))
        return replace(chosen, files=files)

    def without(self, found: Iterable[tuple[int, Finding]]) -> "Dataset":
        """All documents but those in which something was found; they count as skipped.

        Args:
            found: documents and what is wrong with them, in the order of the documents. It is not kept.
        """
        bad, skipped = array("q"), [_Skipped() for _ in self.files]
        for document, finding in found:
            is_new = not bad or bad[-1] != document
            if is_new:
                bad.append(document)
            skipped[self._place(document)[0]].add(finding, is_new)
        rows = np.delete(np.arange(len(self)) if self.rows is None else self.rows, bad)
        files = [more.added_to(file) for file, more in zip(self.files, skipped, strict=True)]
        return Dataset(tuple(files), self.parts, rows)

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
        pairs = zip(self.files, self.parts, self._members(), strict=True)
        counts = [_counted(file, part, members) for file, part, members in pairs]
        self._release()
        names = [template.name for template in self.templates]
        return {
            "format_version": FORMAT_VERSION,
            **_Counts.total(counts).report(),
            **_found(self.files, self.parts),
            "template": names[0] if len(names) == 1 else names,
            "files": [
                {
                    "path": str(file.path),
                    **count.report(),
                    **_found([file], [part]),
                    "skipped_kinds": dict(Counter(part.skipped_kinds) + Counter(file.skipped_kinds)),
                    "skipped_items": [*part.skipped, *(f._asdict() for f in file.skipped)][:MOST_PROBLEMS],
                    "warning_places": _warning_places(file, part),
                    "unused_keys": part.unused_keys,
                    "template": file.template.name,
                }
                for file, part, count in zip(self.files, self.parts, counts, strict=True)
            ],
        }

    def _members(self) -> "list[Rows | slice]":
        """For every part, which of its documents are among these; in no order."""
        if self.rows is None:
            return [slice(0, len(part)) for part in self.parts]
        ordered = np.sort(self.rows)
        bounds = np.searchsorted(ordered, self._starts)
        return [ordered[bounds[i] : bounds[i + 1]] - self._starts[i] for i in range(len(self.parts))]

    def _release(self) -> None:
        for part in self.parts:
            part.release()


@dataclass(frozen=True)
class _Counts:
    """What is told of a file, or of all of them."""

    items: int
    dropped: int
    truncated: int
    label_tokens: int
    documents_of_length: NDArray[np.int64]
    """[longest + 1]"""

    @staticmethod
    def total(counts: "list[_Counts]") -> "_Counts":
        longest = max(len(count.documents_of_length) for count in counts)
        by_length = np.zeros(longest, np.int64)
        for count in counts:
            by_length[: len(count.documents_of_length)] += count.documents_of_length
        return _Counts(
            sum(count.items for count in counts),
            sum(count.dropped for count in counts),
            sum(count.truncated for count in counts),
            sum(count.label_tokens for count in counts),
            by_length,
        )

    def report(self) -> dict[str, Any]:
        lengths = np.arange(len(self.documents_of_length))
        return {
            "items": self.items,
            "tokens": int((lengths * self.documents_of_length).sum()),
            "label_tokens": self.label_tokens,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "lengths": self._quantiles(),
        }

    def _quantiles(self) -> dict[str, int]:
        """Each figure is the length of a document that is there: the highest at or below the quantile."""
        up_to = np.cumsum(self.documents_of_length)
        if not up_to[-1]:
            return {}
        ranks = np.floor((up_to[-1] - 1) * (np.array(list(_QUANTILES.values())) / 100)).astype(np.int64)
        return dict(zip(_QUANTILES, np.searchsorted(up_to, ranks, side="right").tolist(), strict=True))


def _found(files: Sequence[DataFile], parts: Sequence[Encoded]) -> dict[str, Any]:
    """What was found in whole files, whether all of their items are in use or not."""
    warnings: Counter[str] = Counter()
    for file, part in zip(files, parts, strict=True):
        warnings.update({kind: found["count"] for kind, found in part.warnings.items()})
        warnings.update(file.across.counts)
    before, after = sum(len(part.skipped_rows) for part in parts), sum(file.skipped_items for file in files)
    return {"skipped": before + after, "warnings": dict(+warnings)}


def _warning_places(file: DataFile, part: Encoded) -> dict[str, Any]:
    """The first places of each kind of warning."""
    places = {kind: found["places"] for kind, found in part.warnings.items()}
    for kind, across in file.across.places.items():
        places[kind] = [*places.get(kind, []), *(finding._asdict() for finding in across)][:KEPT_PLACES]
    return places


def _counted(file: DataFile, part: Encoded, members: Rows | slice) -> _Counts:
    return _Counts(
        file.items,
        file.dropped,
        int(part.cut[members].sum()),
        int(part.label_counts[members].sum(dtype=np.int64)),
        np.bincount(part.lengths[members], minlength=1),
    )
