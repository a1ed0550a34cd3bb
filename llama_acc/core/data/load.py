"""From a recipe's data sources to a dataset: every file read, checked and encoded, or found in the token cache."""

import contextlib
import logging
import os
import shlex
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.cache import About, Encoded, EntryStore, cache_key, content_digest
from llama_acc.core.data.checks import DatasetStats, cross_file_duplicates
from llama_acc.core.data.dataset import DataFile, Dataset, Rows
from llama_acc.core.data.encode import Chunk
from llama_acc.core.data.files import data_suffix
from llama_acc.core.data.findings import KINDS as FINDINGS
from llama_acc.core.data.findings import MOST_PROBLEMS, Finding, other_form
from llama_acc.core.data.prepare import KEPT_PLACES, Batch, Job, prepare_batches
from llama_acc.core.data.readers import Checked, raise_together, stream_items, unreadable
from llama_acc.core.data.sources import OTHERWISE, Fetch, FileSpec, Source, expand
from llama_acc.core.data.templates import KINDS, format_for
from llama_acc.core.errors import DataError, UserError
from llama_acc.core.hub import fetch_data
from llama_acc.core.tokenizer import Tokenizer
from llama_acc.core.units import count_text

_BATCH = 200
FIX_HINT = "mend them, or leave them out with data.on_error=skip"

_logger = logging.getLogger("llama_acc")

OnError = Literal["stop", "skip"]
FileProgress = Callable[[str, int, float], None]
"""Called with (the file's name, items done, which part of the file they are)."""


def load_dataset(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    max_tokens: int,
    seed: int,
    *,
    on_error: OnError = "stop",
    image_positions: int | None = None,
    recipe_folder: Path | None = None,
    progress: FileProgress | None = None,
    store: EntryStore | None = None,
    fetch: Fetch = fetch_data,
    otherwise: str = OTHERWISE,
) -> Dataset:
    """Read, check and encode all sources; files encoded before come from the token cache.

    Args:
        sources: a recipe's `data.sources`.
        tokenizer: the model's.
        max_tokens: longer examples are cut, and counted.
        seed: with `ratio`, decides which items are used.
        on_error: "skip": rows that cannot be trained on are left out, and reported.
        image_positions: how many places the model takes for an image; None: it takes none.
        recipe_folder: where relative paths are looked for first.
        progress: called with how far the encoding of a file is.
        store: where encoded files are kept; None: one for this call.
        fetch: gets data that has an address.
        otherwise: what to do about a source that is nowhere, as a hint.

    Raises:
        UserError: data is missing or wrong: all problems of all files together.
        RunError: the network failed.
    """
    if max_tokens < 2:
        raise UserError(f"data.max_tokens should be at least 2, but is {max_tokens}")
    specs = expand(sources, recipe_folder, fetch, otherwise)
    if not specs:
        raise UserError("no data: the recipe has no data.sources", "give some with --data FILE")
    parts: list[Encoded] = []
    errors: list[UserError] = []
    with (
        contextlib.nullcontext(store) if store is not None else EntryStore() as kept,
        contextlib.closing(_content_digests([spec.path for spec in specs])) as digests,
    ):
        encoder = _Encoder(tokenizer, max_tokens, on_error == "skip", image_positions, kept, progress)
        for spec, content in zip(specs, digests, strict=True):
            try:
                parts.append(encoder.load(spec, content))
            except UserError as error:
                errors.append(error)
    raise_together(errors)
    dataset = _joined(specs, parts, tokenizer, seed)
    if not len(dataset):
        raise _nothing(parts, max_tokens)
    return dataset


def _nothing(parts: Sequence[Encoded], max_tokens: int) -> UserError:
    """Why there is nothing to train on."""
    items, skipped = sum(part.items for part in parts), sum(len(part.skipped_rows) for part in parts)
    if not items:
        first = next((f"{Finding(**problem)}" for part in parts for problem in part.notes["skipped"]), None)
        if first is None:
            return UserError(f"nothing to train on: {count_text(skipped, 'row')}, all of them blank")
        return UserError(
            f"nothing to train on: no item in {count_text(skipped, 'row')}, all skipped; the first: {first}",
            other_form({problem["kind"] for part in parts for problem in part.notes["skipped"]}, "FILE"),
        )
    return UserError(
        f"nothing to train on: of {count_text(items, 'item')} none has a label within {max_tokens} tokens"
        + (f"; skipped: {count_text(skipped, 'row')}" if skipped else ""),
        "raise data.max_tokens, or check that the items have replies",
    )


def _content_digests(paths: Sequence[Path]) -> Generator[str | UserError, None, None]:
    """The digest of each file's bytes, or why it cannot be read; the next ones are computed while one is in use."""

    stopped = threading.Event()

    def digest(path: Path) -> str | UserError:
        try:
            return content_digest(path, stopped.is_set)
        except OSError as error:
            return unreadable(path, error)
        except UserError as error:
            return error

    threads = ThreadPoolExecutor(max_workers=_cores())
    try:
        yield from threads.map(digest, paths)
    finally:
        stopped.set()  # Ctrl-C need not wait for the rest of a large file
        threads.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Encoder:
    """Encodes data files, or finds them encoded; of the fields see `load_dataset`."""

    tokenizer: Tokenizer
    max_tokens: int
    skips: bool
    image_positions: int | None
    store: EntryStore
    progress: FileProgress | None

    def load(self, spec: FileSpec, content: str | UserError) -> Encoded:
        """A file's documents."""
        if isinstance(content, UserError):
            raise content
        # A single-turn format takes no dialogues; which kind of items a file has is not known yet.
        kinds = KINDS if spec.template == "auto" else KINDS[:1]
        templates = [format_for(spec.template, kind, self.tokenizer) for kind in kinds]
        suffix = data_suffix(spec.path)
        encoded = self.store.get(
            cache_key(content, suffix, spec.format, self.tokenizer, templates, self.max_tokens, self.image_positions),
            lambda append: self._encode(spec, append),
            self.tokenizer.vocab_size,
            lambda: _logger.warning("waiting for another process, which is encoding %s", spec.path.name),
        )
        problems = [f"{spec.path}: {Finding(**problem)}" for problem in encoded.notes["skipped"]]
        if problems and not self.skips:
            # An earlier run left them out; the entry is the same for both but for this.
            raise DataError(problems, FIX_HINT)
        return encoded

    def _encode(self, spec: FileSpec, append: Callable[[Chunk], None]) -> About:
        file = _FileReader(spec, self.skips)
        try:
            template = format_for(spec.template, file.stream.kind, self.tokenizer)
        except UserError as error:
            raise UserError(f"{spec.path}: {error.message}", error.hint) from error
        job = Job(self.tokenizer.path, template, self.max_tokens, self.image_positions or 0)
        items, unused_inputs, stats = 0, 0, DatasetStats(KEPT_PLACES)
        for chunk, found in prepare_batches(file.batches(), job, self.tokenizer, _cores()):
            if self.image_positions is None and chunk.table["images"].any():
                raise UserError(
                    f"{spec.path}: the items have images, and this model has no vision encoder",
                    "set vision.encoder, or give a checkpoint of a multimodal model",
                )
            append(chunk)
            stats.merge(found)
            items += chunk.items
            unused_inputs += chunk.unused_inputs
            if self.progress is not None:
                self.progress(spec.path.name, items, file.bytes_read / max(spec.path.stat().st_size, 1))
        if unused_inputs:
            _logger.warning(
                "template %r does not show the input of %s", template.name, count_text(unused_inputs, "item")
            )
        notes = {
            "skipped": [finding._asdict() for finding in file.skipped],
            "skipped_kinds": file.skipped_kinds,
            "unused_keys": file.stream.unused,
            "warnings": {k: found for k, found in stats.all_findings().to_json().items() if not FINDINGS[k].fatal},
        }
        return About(items, file.stream.kind, np.array(file.skipped_rows, np.int64), notes)


class _FileReader:
    """Reads a file's items a batch at a time, and all that is wrong with them."""

    def __init__(self, spec: FileSpec, skips: bool) -> None:
        self.skipped: list[Finding] = []
        """What is wrong with the rows so far that are no items: the first `MOST_PROBLEMS`."""
        self.skipped_kinds: Counter[str] = Counter()
        """How much of each kind it is in all."""
        self.skipped_rows = array("q")
        """The numbers of these rows, from 0."""
        self.bytes_read = 0
        self._path, self._skips, self._items = spec.path, skips, 0
        self.stream = stream_items(spec.path, spec.format, progress=lambda read: setattr(self, "bytes_read", read))

    def batches(self) -> Iterator[Batch]:
        """Once something is wrong that is not to be skipped, the rest is only checked, up to `MOST_PROBLEMS`.

        Raises:
            UserError: something is wrong, at the end: all of it together.
        """
        errors: list[UserError] = []
        rows = enumerate(self._rows())
        try:
            while batch := list(islice(rows, _BATCH)):
                if self._skips or not self.skipped:
                    yield batch
                elif len(self.skipped) >= MOST_PROBLEMS:
                    break
        except UserError as error:
            errors.append(error)
        if self.skipped and not self._skips:
            hint = FIX_HINT if self._items else other_form(self.skipped_kinds, shlex.quote(str(self._path)))
            if len(self.skipped) >= MOST_PROBLEMS:
                hint = f"reading ended after {MOST_PROBLEMS:,} problems; {hint}"
            errors.insert(0, DataError([f"{self._path}: {problem}" for problem in self.skipped], hint))
        raise_together(errors)

    def _rows(self) -> Iterator[Checked]:
        for index, row in enumerate(self.stream):
            if row.item is None:
                fatal = [problem for problem in row.problems if problem.fatal]
                self.skipped += fatal[: MOST_PROBLEMS - len(self.skipped)]
                self.skipped_kinds.update(problem.kind for problem in row.problems)
                self.skipped_rows.append(index)
            else:
                self._items += 1
            yield row


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _joined(specs: Sequence[FileSpec], parts: Sequence[Encoded], tokenizer: Tokenizer, seed: int) -> Dataset:
    """All documents, but of a file with a ratio only those of the items it chooses."""
    files: list[DataFile] = []
    rows: list[Rows] = []
    start, all_of_them = 0, all(spec.ratio == 1 for spec in specs)
    templates = [format_for(spec.template, part.kind, tokenizer) for spec, part in zip(specs, parts, strict=True)]
    held = {form.name for form, part in zip(templates, parts, strict=True) if "stop_in_reply" in part.notes["warnings"]}
    across = cross_file_duplicates([spec.path.name for spec in specs], parts, KEPT_PLACES)
    for spec, part, template, (count, places) in zip(specs, parts, templates, across, strict=True):
        items, documents = part.items, len(part)
        if not all_of_them:
            chosen = _chosen_rows(part, spec.ratio, [seed, *spec.seed])
            of_part = np.flatnonzero(chosen[part.table["item"]])
            items, documents = int(chosen.sum()), len(of_part)
            rows.append(of_part + start)
        if template.name in held:
            template = template.told_apart()
        dropped = items - documents
        files.append(
            DataFile(
                spec.path, template, items, dropped, spec.image_root, duplicates=count, duplicate_places=tuple(places)
            )
        )
        start += len(part)
    return Dataset(tuple(files), tuple(parts), None if all_of_them else np.concatenate(rows))


def _chosen_rows(part: Encoded, ratio: float, seed: list[int]) -> NDArray[np.bool_]:
    """Which rows of a file are in a fixed subset of its items, which has at least one. [rows]"""
    chosen = np.zeros(part.items + len(part.skipped_rows), dtype=np.bool_)
    items = np.delete(np.arange(len(chosen)), part.skipped_rows)
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(part.items)
    chosen[items[order[: max(int(part.items * ratio), 1)]]] = True
    return chosen
