"""The encoded examples of a run: read, checked and encoded before any model is built."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.cache import cache_key, load_cached, store
from llama_acc.core.data.encode import Encoded, encode_items
from llama_acc.core.data.readers import raise_together, read_bytes, read_file
from llama_acc.core.data.sources import FileSpec, Source, SourceLike, expand, resolve_data_path
from llama_acc.core.data.templates import TEMPLATES, Template, get_template
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer

__all__ = ["DataFile", "Dataset", "Source", "load_dataset", "resolve_data_path"]

FORMAT_VERSION = 1
_QUANTILES = {"min": 0, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}
_AUTO = {"single_turn": "alpaca", "dialogue": "dialogue"}

FileProgress = Callable[[str, int, int], None]
"""Called with (the file's name, items done, items in all)."""


@dataclass(frozen=True)
class DataFile:
    """What one file gave: `items` = documents + `dropped`."""

    path: Path
    template: Template
    items: int
    dropped: int


@dataclass(frozen=True)
class Dataset:
    """Documents of all files, end to end; arrays as in `Encoded`."""

    tokens: NDArray[np.int32]
    labelled: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    item: NDArray[np.int32]
    """[D]: which item of its file a document was, from 0."""
    file: NDArray[np.int32]
    """[D]: an index into `files`."""
    cut: NDArray[np.bool_]
    files: tuple[DataFile, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per document. [D]"""
        return np.diff(self.offsets)

    @cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """Label tokens per document. [D]"""
        sums = np.concatenate([[0], np.cumsum(self.labelled, dtype=np.int64)])
        counts: NDArray[np.int64] = sums[self.offsets[1:]] - sums[self.offsets[:-1]]
        return counts

    @property
    def templates(self) -> list[Template]:
        """The prompt formats in use, each once, in the order of the files."""
        return list({file.template.name: file.template for file in self.files}.values())

    @property
    def template(self) -> Template:
        """The prompt format; the first file's where they differ."""
        return self.files[0].template

    def document(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Its tokens, and which of them are labelled."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[span], self.labelled[span]

    def origin(self, i: int) -> str:
        """Where a document came from, such as "alpaca.json item 17"."""
        return f"{self.files[self.file[i]].path.name} item {self.item[i] + 1}"

    def fingerprint(self) -> str:
        """sha256 of the documents and labels: the same if and only if a resumed run would see the same data."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.tokens, np.packbits(self.labelled)):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def select(self, documents: NDArray[np.int64]) -> "Dataset":
        """These documents, in this order. What was dropped stays with the whole."""
        spans = [slice(self.offsets[i], self.offsets[i + 1]) for i in documents]
        file = self.file[documents]
        counts = np.bincount(file, minlength=len(self.files))
        return Dataset(
            tokens=np.concatenate([np.zeros(0, np.int32), *(self.tokens[s] for s in spans)]),
            labelled=np.concatenate([np.zeros(0, np.bool_), *(self.labelled[s] for s in spans)]),
            offsets=np.concatenate([[0], np.cumsum(self.lengths[documents])]).astype(np.int64),
            item=self.item[documents],
            file=file,
            cut=self.cut[documents],
            files=tuple(replace(f, items=int(n), dropped=0) for f, n in zip(self.files, counts, strict=True)),
        )

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
        everything = np.ones(len(self), dtype=np.bool_)
        whole = self._counts(everything, list(self.files))
        names = [template.name for template in self.templates]
        whole["template"] = names[0] if len(names) == 1 else names
        whole["files"] = [
            {"path": str(f.path), **self._counts(self.file == i, [f]), "template": f.template.name}
            for i, f in enumerate(self.files)
        ]
        return {"format_version": FORMAT_VERSION, **whole}

    def _counts(self, chosen: NDArray[np.bool_], files: Sequence[DataFile]) -> dict[str, Any]:
        lengths = self.lengths[chosen]
        # "lower", so that every figure is the length of a document that is there.
        values = np.percentile(lengths, list(_QUANTILES.values()), method="lower").tolist() if len(lengths) else []
        return {
            "items": sum(file.items for file in files),
            "tokens": int(lengths.sum()),
            "label_tokens": int(self.label_counts[chosen].sum()),
            "truncated": int(self.cut[chosen].sum()),
            "dropped": sum(file.dropped for file in files),
            "lengths": {name: int(value) for name, value in zip(_QUANTILES, values, strict=False)},
        }


def load_dataset(
    sources: Sequence[SourceLike],
    tokenizer: Tokenizer,
    max_tokens: int,
    seed: int,
    *,
    recipe_folder: Path | None = None,
    progress: FileProgress | None = None,
) -> Dataset:
    """Read, check and encode all sources; files encoded before come from the token cache.

    Args:
        sources: a recipe's `data.sources`.
        tokenizer: the model's.
        max_tokens: longer examples are cut, and counted.
        seed: with `ratio`, decides which items are used.
        recipe_folder: where relative paths are looked for first.
        progress: told how far the encoding of a file is.

    Raises:
        UserError: data is missing or wrong: all problems of all files together.
    """
    if max_tokens < 2:
        raise UserError(f"data.max_tokens should be at least 2, but is {max_tokens}")
    parts: list[_Part] = []
    errors: list[UserError] = []
    for spec in expand(sources, recipe_folder):
        try:
            parts.append(_load_file(spec, tokenizer, max_tokens, seed, progress))
        except UserError as error:
            errors.append(error)
    raise_together(errors)
    dataset = _joined(parts)
    if not len(dataset):
        raise UserError(
            f"nothing to train on: of {sum(p.items for p in parts)} items none has a label within {max_tokens} tokens",
            "raise data.max_tokens, or check that the items have replies",
        )
    return dataset


@dataclass(frozen=True)
class _Part:
    """A file's encoded documents, and how many of its items are in use."""

    path: Path
    template: Template
    encoded: Encoded
    items: int


def _load_file(
    spec: FileSpec, tokenizer: Tokenizer, max_tokens: int, seed: int, progress: FileProgress | None
) -> _Part:
    data = read_bytes(spec.path)
    names = list(_AUTO.values()) if spec.template == "auto" else [spec.template]
    key = cache_key(data, spec.path.suffix, spec.format, tokenizer, [get_template(n) for n in names], max_tokens)
    encoded = load_cached(key)
    if encoded is None:
        encoded = _encode_file(spec, tokenizer, max_tokens, progress)
        store(key, encoded)
    template = _template_for(spec, encoded.kind)
    if spec.ratio == 1:
        return _Part(spec.path, template, encoded, encoded.items)
    chosen = _chosen_items(encoded.items, spec.ratio, [seed, *spec.seed])
    return _Part(spec.path, template, _restricted(encoded, chosen), int(chosen.sum()))


def _encode_file(spec: FileSpec, tokenizer: Tokenizer, max_tokens: int, progress: FileProgress | None) -> Encoded:
    file = read_file(spec.path, spec.format)
    if any(item.images for item in file.items):
        raise UserError(f"{spec.path}: the items have images, which the model does not take")
    template = _template_for(spec, file.kind)
    tell = None if progress is None else lambda done, total: progress(spec.path.name, done, total)
    try:
        return encode_items(file.items, template, tokenizer, max_tokens, tell)
    except UserError as error:
        raise UserError(f"{spec.path}: {error.message}", error.hint) from error


def _template_for(spec: FileSpec, kind: str) -> Template:
    return TEMPLATES[_AUTO[kind]] if spec.template == "auto" else get_template(spec.template)


def _chosen_items(items: int, ratio: float, seed: list[int]) -> NDArray[np.bool_]:
    """A fixed subset of a file's items, at least one. [items]"""
    chosen = np.zeros(items, dtype=np.bool_)
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(items)
    chosen[order[: max(int(items * ratio), 1)]] = True
    return chosen


def _restricted(encoded: Encoded, chosen: NDArray[np.bool_]) -> Encoded:
    documents = np.flatnonzero(chosen[encoded.item])
    lengths = np.diff(encoded.offsets)
    kept = np.repeat(chosen[encoded.item], lengths)
    return replace(
        encoded,
        tokens=encoded.tokens[kept],
        labelled=encoded.labelled[kept],
        offsets=np.concatenate([[0], np.cumsum(lengths[documents])]).astype(np.int64),
        item=encoded.item[documents],
        cut=encoded.cut[documents],
        items=int(chosen.sum()),
    )


def _joined(parts: Sequence[_Part]) -> Dataset:
    if not parts:
        raise UserError("no data: the recipe has no data.sources", "give some with --data FILE")
    encoded = [part.encoded for part in parts]
    lengths = np.concatenate([np.diff(e.offsets) for e in encoded])
    return Dataset(
        tokens=np.concatenate([e.tokens for e in encoded]),
        labelled=np.concatenate([e.labelled for e in encoded]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        item=np.concatenate([e.item for e in encoded]),
        file=np.repeat(np.arange(len(parts), dtype=np.int32), [len(e.item) for e in encoded]),
        cut=np.concatenate([e.cut for e in encoded]),
        files=tuple(DataFile(p.path, p.template, p.items, p.items - len(p.encoded.item)) for p in parts),
    )
