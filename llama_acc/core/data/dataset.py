"""The encoded examples of a run, mapped: every file read, checked and encoded, or found in the cache."""

import contextlib
import hashlib
import json
import logging
import shlex
import threading
from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.batches import Uses
from llama_acc.core.data.cache import About, Encoded, EntryStore, cache_key, content_digest, map_entry
from llama_acc.core.data.chat_template import ChatTemplate, end_note, template_for
from llama_acc.core.data.checks import DatasetStats, cross_file_duplicates, quantiles
from llama_acc.core.data.encode import KEPT_PLACES, Chunk, Encoding, Labels, encode_batches
from llama_acc.core.data.findings import KINDS as FINDINGS
from llama_acc.core.data.findings import MOST_PROBLEMS, Finding, Findings, other_form
from llama_acc.core.data.images import resolved
from llama_acc.core.data.items import Checked, stream_items
from llama_acc.core.data.plain_text import Text
from llama_acc.core.data.read import data_suffix
from llama_acc.core.data.sources import MISSING_HINT, Fetch, FileSpec, Source, expand
from llama_acc.core.data.templates import KINDS, Template
from llama_acc.core.errors import DataError, UserError, raise_all
from llama_acc.core.hub import fetch_data
from llama_acc.core.text import count_text
from llama_acc.core.tokenizer import Tokenizer
from llama_acc.core.workers import cores

FORMAT_VERSION = 1
"""Of data.json."""
FIX_HINT = "mend them, or leave them out with data.on_error=skip"
_BATCH = 200  # rows
_LARGE = 8 << 20  # bytes of a file that takes longer than worker processes take to start
_BATCH_CHARACTERS, _ROW = 1 << 21, 1000  # of plain text, of which a row counts as so many more
# Each maps some 200 KB, for the system maps the neighbors of a page along with it.
_READS_BETWEEN_RELEASES = 512

_logger = logging.getLogger("llama_acc")

OnError = Literal["stop", "skip"]
FileProgress = Callable[[str, int, float], None]
"""Called with (the file's name, items done, which part of the file they are)."""
Rows = NDArray[np.int64]
"""Documents by their number among those of all parts."""


@dataclass(frozen=True)
class DataFile:
    """What one file gave: `items` = documents + `dropped`, where each reply of an item in `split` counts as one."""

    path: Path
    template: Template
    items: int
    dropped: int
    image_root: Path  # where relative references to images begin
    left_out: int = 0  # items that were left out after they had been encoded
    problems: Findings = field(default_factory=Findings)  # what is wrong with them: the first `MOST_PROBLEMS` of a kind
    split: int = 0  # items that became one document for each reply, as the template writes earlier turns otherwise
    weight: float = 1.0  # how often each is used in an epoch
    documents: int = 0  # of plain text: how many the whole file has; its items are pieces of them


@dataclass(frozen=True, eq=False)
class Dataset:
    """Documents of several files. Nothing of them is copied: what is chosen is an array of numbers."""

    files: tuple[DataFile, ...]
    parts: tuple[Encoded, ...]  # for every file its documents
    rows: Rows | None = None  # [D]: which of the parts' documents, in which order; None: all of them as they are

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
    def label_weights(self) -> NDArray[np.float32] | NDArray[np.int32]:
        """What the label tokens of each document count together; the same array as `label_counts` where all count in
        full. [D]"""
        return self._column("label_weight") if self._column("weighted").any() else self.label_counts

    @cached_property
    def image_counts(self) -> NDArray[np.int32]:
        """Images per document. [D]"""
        return self._column("images")

    @property
    def uses(self) -> Uses:
        """How many documents each file has, and how often each of them is used in an epoch."""
        return tuple((file.items - file.dropped, file.weight) for file in self.files)

    def fingerprint(self) -> str:
        """The same if and only if a resumed run would see the same documents and labels in the same order."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return f"v2:{hashlib.sha256(self._column('digest').data).hexdigest()}"

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def label_tokens(self) -> int:
        """Number of label tokens."""
        return int(self.label_counts.sum(dtype=np.int64))

    @property
    def label_weight(self) -> float:
        """What the label tokens count together."""
        return float(self.label_weights.sum(dtype=np.float64))

    @property
    def template(self) -> Template:
        """The prompt format; the first file's where they differ, that of plain text last."""
        return min(self.files, key=lambda file: file.documents > 0).template

    def document(self, i: int) -> tuple[NDArray[np.int32], Labels]:
        """Its tokens, and which of them are labeled."""
        part, row = self._place(i)
        document = self.parts[part].document(row)
        self._reads[0] += 1
        if self._reads[0] % _READS_BETWEEN_RELEASES == 0:
            for mapped in self.parts:
                mapped.release()
        return document

    def documents_in(self, i: int) -> list[tuple[NDArray[np.int32], Labels]]:
        """The documents of an example, which do not attend to each other: one, but of plain text."""
        tokens, labeled = self.document(i)
        if self.parts[self._place(i)[0]].about.kind != "text":
            return [(tokens, labeled)]
        bounds = [*np.flatnonzero(labeled == 0), len(tokens)]  # nothing predicts what a document begins with
        return [(tokens[begin:end], labeled[begin:end]) for begin, end in pairwise(bounds)]

    @cached_property
    def _reads(self) -> list[int]:
        """How many documents were read so far."""
        return [0]

    def images(self, i: int) -> tuple[str, ...]:
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
        thing = "piece" if self.parts[part].about.kind == "text" else "item"
        return f"{thing} {self.parts[part].table['item'][row] + 1}"

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

    def select(self, documents: Rows) -> "Dataset":
        """These documents, in this order. What was dropped stays with the whole."""
        rows = documents if self.rows is None else self.rows[documents]
        counts = np.bincount(np.searchsorted(self._starts, rows, side="right") - 1, minlength=len(self.parts)).tolist()
        files = tuple(replace(file, items=n, dropped=0) for file, n in zip(self.files, counts, strict=True))
        return Dataset(files, self.parts, rows)

    def without(self, found: Iterable[tuple[int, Finding]]) -> "Dataset":
        """All documents but those in which something was found, given in their order; they count as skipped."""
        bad, left_out = array("q"), [0] * len(self.files)
        problems = [Findings(MOST_PROBLEMS) for _ in self.files]
        for document, finding in found:
            number = self._place(document)[0]
            problems[number].add(finding)
            if not bad or bad[-1] != document:
                bad.append(document)
                left_out[number] += 1
        files = tuple(
            replace(file, items=file.items - left_out[i], left_out=left_out[i], problems=problems[i])
            for i, file in enumerate(self.files)
        )
        rows = np.delete(np.arange(len(self)) if self.rows is None else self.rows, bad)
        return Dataset(files, self.parts, rows)

    def split(self, fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
        """(train, validation): a fixed random part of about `fraction` of the documents is for validation.

        Raises:
            UserError: there are too few documents for one in each.
        """
        # What was one item stays on one side.
        item = np.concatenate([part.table["item"] + np.int64(place << 32) for place, part in enumerate(self.parts)])
        _, owner = np.unique(item if self.rows is None else item[self.rows], return_inverse=True)
        items = len(np.unique(owner))
        if items < 2:
            raise UserError(f"data.validation.fraction needs at least 2 examples to split, but there are {items}")
        held = min(max(round(items * fraction), 1), items - 1)
        chosen = np.random.default_rng(np.random.SeedSequence([seed, items])).permutation(items)
        of_held = np.isin(owner, chosen[:held])
        return self.select(np.flatnonzero(~of_held)), self.select(np.flatnonzero(of_held))

    def report(self) -> dict[str, Any]:
        """What `data.json` holds. items = documents + dropped; truncated ones are among the documents."""
        ordered = None if self.rows is None else np.sort(self.rows)
        across = cross_file_duplicates([file.path.name for file in self.files], self.parts, KEPT_PLACES)
        reports = []
        for file, part, start, repeated in zip(self.files, self.parts, self._starts, across, strict=False):
            members: Rows | slice = slice(None)
            if ordered is not None:
                members = ordered[slice(*np.searchsorted(ordered, (start, start + len(part))))] - start
            lengths, labels, cut = (part.table[name][members] for name in ("length", "label_count", "cut"))
            counts = _counts(file.items, lengths, labels, int(cut.sum()), file.dropped)
            part.release()
            more = {name: count for name in ("split", "documents") if (count := getattr(file, name))}
            reports.append({"path": str(file.path), **counts, **more, **_findings(file, part, *repeated)})
        items, truncated, dropped, skipped = (
            sum(report[key] for report in reports) for key in ("items", "truncated", "dropped", "skipped")
        )
        names = list(dict.fromkeys(file.template.name for file in self.files))
        return {
            "format_version": FORMAT_VERSION,
            **_counts(items, self.lengths, self.label_counts, truncated, dropped),
            "skipped": skipped,
            "warnings": dict(sum((Counter(report["warnings"]) for report in reports), Counter())),
            "template": names[0] if len(names) == 1 else names,
            "files": reports,
        }


def _counts(
    items: int, lengths: NDArray[np.int32], labels: NDArray[np.int32], truncated: int, dropped: int
) -> dict[str, Any]:
    """The counts of a report."""
    return {
        "items": items,
        "tokens": int(lengths.sum(dtype=np.int64)),
        "label_tokens": int(labels.sum(dtype=np.int64)),
        "truncated": truncated,
        "dropped": dropped,
        "lengths": quantiles(lengths),
    }


def _findings(file: DataFile, part: Encoded, repeated: int, places_repeated: list[Finding]) -> dict[str, Any]:
    """What was found in a whole file, whether all of its items are in use or not; `repeated`: how many of its documents
    earlier files have too, with the places of the first."""
    notes = part.about.notes
    later = (finding._asdict() for places in file.problems.places.values() for finding in places)
    found = {kind: (of_kind["count"], of_kind["places"]) for kind, of_kind in notes["warnings"].items()}
    if repeated:
        count, places = found.get("duplicate", (0, []))
        more = [finding._asdict() for finding in places_repeated]
        found["duplicate"] = count + repeated, [*places, *more][:KEPT_PLACES]
    return {
        "skipped": len(part.about.skipped_rows) + file.left_out,
        "warnings": {kind: count for kind, (count, _) in found.items()},
        "skipped_kinds": dict(Counter(notes["skipped_kinds"]) + file.problems.counts),
        "skipped_items": [*notes["skipped"], *later][:MOST_PROBLEMS],
        "warning_places": {kind: places for kind, (_, places) in found.items()},
        "unused_keys": notes["unused_keys"],
        "template": file.template.name,
    }


def load_dataset(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    max_tokens: int,
    seed: int,
    *,
    on_error: OnError = "stop",
    image_positions: int | None = None,
    progress: FileProgress | None = None,
    store: EntryStore | None = None,
    fetch: Fetch = fetch_data,
    missing_hint: str = MISSING_HINT,
) -> Dataset:
    """Read, check and encode all sources; files encoded before come from the token cache.

    Examples longer than `max_tokens` are cut, and counted. `seed` decides which items a `ratio` takes. With `on_error`
    "skip", rows that cannot be trained on are left out, and reported. The model takes `image_positions` places for an
    image; None: it takes none. Encoded files are kept in `store`, or in one for this call; of the rest see `expand`.

    Raises:
        UserError: data is missing or wrong: all problems of all files together.
        RunError: the network failed.
    """
    specs = expand(sources, fetch, missing_hint)
    parts: list[Encoded] = []
    errors: list[UserError] = []
    stopped = threading.Event()
    with contextlib.nullcontext(store) if store else EntryStore() as kept, ThreadPoolExecutor(cores()) as threads:
        encoder = _Encoder(tokenizer, max_tokens, on_error == "skip", image_positions, kept, progress)
        try:
            # The next files are read for their digests while one is encoded.
            digests = [threads.submit(content_digest, spec.path, stopped.is_set) for spec in specs]
            for spec, digest in zip(specs, digests, strict=True):
                try:
                    parts.append(encoder.load(spec, digest.result()))
                except UserError as error:
                    errors.append(error)
        finally:
            stopped.set()  # Ctrl-C need not wait for the rest of a large file
    raise_all(errors)
    dataset = _joined(specs, parts, tokenizer, seed)
    if not len(dataset):
        raise _nothing_to_train_on([part.about for part in parts], max_tokens)
    return dataset


def _nothing_to_train_on(abouts: Sequence[About], max_tokens: int) -> UserError:
    items = sum(about.items for about in abouts)
    skipped = count_text(sum(len(about.skipped_rows) for about in abouts), "row")
    wrong = [Finding(**problem) for about in abouts for problem in about.notes["skipped"]]
    if items:
        message = f"of {count_text(items, 'item')} none has a label within {max_tokens} tokens; skipped: {skipped}"
        hint = "raise data.max_tokens, or check that the items have replies"
        return UserError(f"nothing to train on: {message.removesuffix('; skipped: 0 rows')}", hint)
    if not wrong:
        return UserError(f"nothing to train on: {skipped}, all of them blank")
    hint = other_form({problem.kind for problem in wrong}, "FILE")
    return UserError(f"nothing to train on: no item in {skipped}, all skipped; the first: {wrong[0]}", hint)


@dataclass(frozen=True)
class _Encoder:
    """Encodes data files, or finds them encoded; of the fields see `load_dataset`."""

    tokenizer: Tokenizer
    max_tokens: int
    skips: bool
    image_positions: int | None
    store: EntryStore
    progress: FileProgress | None

    def load(self, spec: FileSpec, content: str) -> Encoded:
        """A file's documents; `content` is its digest."""
        # A single-turn format takes no dialogues; which kind of items a file has is not known yet.
        kinds = KINDS if spec.template == "auto" else KINDS[:1]
        templates = [template_for(spec.template, kind, self.tokenizer) for kind in kinds]
        settings = (data_suffix(spec.path), spec.format, spec.adapt, self.max_tokens, self.image_positions)
        encoded = self.store.get(
            cache_key(content, self.tokenizer, templates, *settings),
            lambda append: self._encode(spec, append),
            self.tokenizer.vocab_size,
            lambda: _logger.warning("waiting for another process, which is encoding %s", spec.path.name),
        )
        problems = [f"{spec.path}: {Finding(**problem)}" for problem in encoded.about.notes["skipped"]]
        if problems and not self.skips:
            # An earlier run left them out; the entry is the same for both but for this.
            raise DataError(problems, FIX_HINT)
        return encoded

    def _encode(self, spec: FileSpec, append: Callable[[Chunk], None]) -> About:
        """Once something is wrong that is not to be skipped, nothing comes of it, and all that is wrong is raised."""
        read, errors = deque([0], maxlen=1), list[UserError]()  # read: how many bytes of the file
        stream = stream_items(spec.path, spec.format, spec.adapt, progress=read.append)

        def rows() -> Iterator[tuple[int, Checked]]:
            try:
                yield from enumerate(stream)
            except UserError as error:
                errors.append(error)

        try:
            template = template_for(spec.template, stream.kind, self.tokenizer)
        except UserError as error:
            raise UserError(f"{spec.path}: {error.message}", error.hint) from error
        encoding = Encoding(template, self.max_tokens, self.image_positions or 0)
        skipped, unused_inputs, stats = list[Finding](), 0, DatasetStats(KEPT_PLACES)
        numbered = rows()
        pieces = 0
        workers = cores() if spec.path.stat().st_size >= _LARGE else 1
        for chunk in encode_batches(_batches(numbered), encoding, self.tokenizer, workers):
            if self.image_positions is None and chunk.table["images"].any():
                raise UserError(
                    f"{spec.path}: the items have images, and this model has no vision encoder",
                    "set vision.encoder, or give a checkpoint of a multimodal model",
                )
            if stream.kind == "text":  # a piece is no row: it counts as an item of its own
                chunk.table["item"] = np.arange(pieces, pieces + len(chunk.table))
                pieces += len(chunk.table)
            append(chunk)
            stats.merge(chunk.stats)
            unused_inputs += chunk.unused_inputs
            skipped += chunk.skipped[: MOST_PROBLEMS - len(skipped)]
            if len(skipped) >= MOST_PROBLEMS and not self.skips:
                break
            if self.progress is not None:
                self.progress(spec.path.name, stats.items, read[0] / max(spec.path.stat().st_size, 1))
        skipped_kinds = {k: n for k, n in stats.findings.counts.items() if FINDINGS[k].fatal or k == "blank"}
        if skipped and not self.skips:
            hint = FIX_HINT if stats.items else other_form(skipped_kinds, shlex.quote(str(spec.path)))
            if len(skipped) >= MOST_PROBLEMS:
                hint = f"reading ended after {MOST_PROBLEMS:,} problems; {hint}"
            errors.insert(0, DataError([f"{spec.path}: {problem}" for problem in skipped], hint))
        raise_all(errors)
        if unused_inputs:
            count = count_text(unused_inputs, "item")
            _logger.warning("template %r does not show the input of %s", template.name, count)
        notes = {
            "skipped": [finding._asdict() for finding in skipped],
            "skipped_kinds": skipped_kinds,
            "unused_keys": stream.unused,
            "warnings": {k: found for k, found in stats.all_findings().to_json().items() if not FINDINGS[k].fatal},
        }
        rows_skipped = np.flatnonzero(stats.hashes() == 0)
        if stream.kind != "text":
            return About(stats.items, stream.kind, rows_skipped, notes)
        return About(pieces, "text", pieces + np.arange(len(rows_skipped)), {**notes, "documents": stats.items})


def _batches(rows: Iterator[tuple[int, Checked]]) -> Iterator[list[tuple[int, Checked]]]:
    """Rows that are encoded at once, of texts about equally many characters."""
    batch, size = list[tuple[int, Checked]](), 0
    for row in rows:
        batch.append(row)
        item = row[1].item
        size += len(item.text) + _ROW if isinstance(item, Text) else -(-_BATCH_CHARACTERS // _BATCH)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _joined(specs: Sequence[FileSpec], parts: Sequence[Encoded], tokenizer: Tokenizer, seed: int) -> Dataset:
    """All documents, but of a file with a ratio only those of the items it chooses."""
    files: list[DataFile] = []
    rows: list[Rows] = []
    start = 0
    templates = [
        template_for(spec.template, part.about.kind, tokenizer) for spec, part in zip(specs, parts, strict=True)
    ]
    for note in {end_note(form, tokenizer): None for form in templates if isinstance(form, ChatTemplate)}:
        if note is not None:
            _logger.warning("%s: it is trained as text", note)
    stop_in_reply = {
        form.name
        for form, part in zip(templates, parts, strict=True)
        if "stop_in_reply" in part.about.notes["warnings"]
    }
    for spec, part, template in zip(specs, parts, templates, strict=True):
        chosen = _chosen_rows(part.about, spec.ratio, [seed, *spec.seed])
        of_part = np.flatnonzero(chosen[part.table["item"]])
        rows.append(of_part + start)
        start += len(part)
        _, documents = np.unique(part.table["item"][of_part], return_counts=True)
        dropped, split = int(chosen.sum()) - len(documents), int((documents > 1).sum())
        template = template.with_strict_stops() if template.name in stop_in_reply else template
        items = len(of_part) + dropped
        counts = {"split": split, "documents": part.about.notes.get("documents", 0)}
        files.append(DataFile(spec.path, template, items, dropped, spec.image_root, weight=spec.weight, **counts))
    whole = all(spec.ratio == 1 for spec in specs)
    return Dataset(tuple(files), tuple(parts), None if whole else np.concatenate(rows))


def _chosen_rows(about: About, ratio: float, seed: list[int]) -> NDArray[np.bool_]:
    """Which rows of a file are in a fixed subset of its items, which has at least one. [rows]"""
    chosen = np.ones(about.items + len(about.skipped_rows), dtype=np.bool_)
    chosen[about.skipped_rows] = False
    if ratio < 1:
        items = np.flatnonzero(chosen)
        order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(about.items)
        chosen[items[order[max(int(about.items * ratio), 1) :]]] = False
    return chosen


_ARRAYS = ("rows", "lengths", "label_counts", "image_counts")


def publish(dataset: Dataset, folder: Path) -> None:
    """Leave a dataset in a new folder for this machine's other processes of the run, which map its arrays."""
    folder.mkdir()
    for name in _ARRAYS:
        if (values := getattr(dataset, name)) is not None:
            np.save(folder / name, values)
    if dataset.label_weights is not dataset.label_counts:
        np.save(folder / "label_weights", dataset.label_weights)
    files = []
    for file, part in zip(dataset.files, dataset.parts, strict=True):
        paths, form = map(str, (part.path, file.path, file.image_root)), file.template
        # A format as a text, and where it came from if that is a chat template.
        chat = (str(form.path), form.source) if isinstance(form, ChatTemplate) else ("", form.to_json())
        files.append((*paths, file.items, file.dropped, file.weight, file.documents, *chat))
    (folder / "files.json").write_text(json.dumps([dataset.fingerprint(), files]), encoding="utf-8")


def load_published(folder: Path, tokenizer: Tokenizer) -> Dataset:
    """What was left there, but for what is only reported. It stays whole when the folder is deleted."""
    fingerprint, published = json.loads((folder / "files.json").read_text(encoding="utf-8"))
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    files, parts = [], []
    for entry, path, root, items, dropped, weight, documents, chat, template in published:
        form = ChatTemplate(template, tokenizer, Path(chat)) if chat else Template.model_validate_json(template)
        parts.append(map_entry(Path(entry)))
        files.append(DataFile(Path(path), form, items, dropped, Path(root), weight=weight, documents=documents))
    arrays.setdefault("label_weights", arrays["label_counts"])
    dataset = Dataset(tuple(files), tuple(parts), arrays.pop("rows", None))
    vars(dataset).update(arrays, _fingerprint=fingerprint)  # the cached properties
    return dataset
