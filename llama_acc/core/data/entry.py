"""One encoded data file, as a file of arrays that are memory-mapped: all processes that use it share one copy.

Written as a stream, in constant memory: the tokens as they come, the other arrays aside and then behind them, each
aligned to 64 bytes; a JSON footer that says where each array is and what the file holds; a trailer with a magic number,
the footer's length and the CRC-32 of all before it.
"""

import contextlib
import fcntl
import json
import mmap
import os
import resource
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llama_acc.core.data.encode import Chunk, Images
from llama_acc.core.errors import UserError

FORMAT_VERSION = 4

# Arrays with a value for every document, named as the fields of `Chunk` they are made of.
COLUMNS: dict[str, DTypeLike] = {
    "lengths": np.int32,
    "label_counts": np.int32,
    "item": np.int32,
    "cut": np.bool_,
    "digests": np.uint64,
}
# The others. Those of images are there only where a document has one, and `skipped_rows` where rows were.
_STREAMS: dict[str, DTypeLike] = {
    "label_bits": np.uint8,
    "offsets": np.int64,
    "image_ends": np.int64,
    "name_ends": np.int64,
    "names": np.uint8,
    "skipped_rows": np.int64,
}
_OF_IMAGES = ("image_ends", "name_ends", "names")
_MAGIC = b"llamaacc"
_TRAILER = struct.Struct("<8sQI")
_ALIGNMENT = 64
_BLOCK = 1 << 20


class DamagedEntry(ValueError):
    """The file is not what `EntryWriter` wrote."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """The documents of one file, end to end; read-only arrays, mapped."""

    tokens: NDArray[Any]
    """[N], uint16 where all of the vocabulary fits, else int32."""
    label_bits: NDArray[np.uint8]
    """Eight tokens' labels to a byte, the first one in its highest bit."""
    offsets: NDArray[np.int64]
    """[D + 1]: document i is tokens[offsets[i] : offsets[i + 1]]."""
    lengths: NDArray[np.int32]
    """[D]"""
    label_counts: NDArray[np.int32]
    """[D]"""
    item: NDArray[np.int32]
    """[D]: which item of the file it was, from 0."""
    cut: NDArray[np.bool_]
    """[D]: it was longer than max_tokens."""
    digests: NDArray[np.uint64]
    """[D]: equal for equal documents, as far as 64 bits can tell."""
    items: int
    """How many items the file has, besides the rows that were skipped."""
    kind: str
    """"single_turn" or "dialogue"."""
    notes: dict[str, Any]
    """What else was found out about the file; JSON."""
    path: Path
    """Where it is mapped from."""
    mapped: mmap.mmap = field(repr=False)
    image_ends: NDArray[np.int64] | None = None
    """[D]: how many images there are up to a document's end; None: no document has one."""
    name_ends: NDArray[np.int64] | None = None
    """[I]: where in `names` the name of each image ends."""
    names: NDArray[np.uint8] | None = None
    """The names of all images, in UTF-8."""
    skipped_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S]: the numbers of the rows that were skipped, from 0."""

    def __len__(self) -> int:
        return len(self.item)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the same file.
        return map_entry, (self.path,)

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """What is wrong with rows that were skipped, as the fields of `Finding`s: the first of it."""
        found: list[dict[str, Any]] = self.notes.get("skipped", [])
        return found

    @property
    def skipped_kinds(self) -> dict[str, int]:
        """How much of each kind is wrong with all of them."""
        kinds = self.notes.get("skipped_kinds")
        return dict(Counter(problem["kind"] for problem in self.skipped)) if kinds is None else dict(kinds)

    @property
    def unused_keys(self) -> dict[str, int]:
        """Keys of the file that are not used, and in how many of its items."""
        return dict(self.notes.get("unused_keys", {}))

    @property
    def warnings(self) -> dict[str, Any]:
        """What else was found in the items: by kind, how often and where first."""
        found: dict[str, Any] = self.notes.get("warnings", {})
        return found

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which tokens are labelled, all at once: for small files. [N]"""
        return np.unpackbits(self.label_bits, count=len(self.tokens)).astype(np.bool_)

    @property
    def truncated(self) -> int:
        """Documents that were cut."""
        return int(self.cut.sum())

    @property
    def dropped(self) -> int:
        """Items that were left without any label, and so without a document."""
        return self.items - len(self)

    def document(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """A document's tokens, and which of them are labelled."""
        begin, end = int(self.offsets[i]), int(self.offsets[i + 1])
        tokens = self.tokens[begin:end].astype(np.int32)
        bits = np.unpackbits(self.label_bits[begin // 8 : -(-end // 8)])
        labelled = bits[begin % 8 : begin % 8 + end - begin].astype(np.bool_)
        return tokens, labelled

    @property
    def image_counts(self) -> NDArray[np.int32]:
        """Images per document. [D]"""
        if self.image_ends is None:
            return np.zeros(len(self), np.int32)
        return np.diff(self.image_ends, prepend=0).astype(np.int32)

    def images(self, i: int) -> Images:
        """Where a document's images are."""
        if self.image_ends is None or self.name_ends is None or self.names is None:
            return ()
        begin, end = int(self.image_ends[i - 1]) if i else 0, int(self.image_ends[i])
        borders = [int(self.name_ends[n - 1]) if n else 0 for n in range(begin, end + 1)]
        return tuple(self.names[a:b].tobytes().decode() for a, b in pairwise(borders))

    def release(self) -> None:
        """Lets go of the pages that were read, so as not to seem to hold them: they stay in the system's cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


class EntryWriter:
    """Writes an entry as the documents come."""

    def __init__(self, file: IO[bytes], aside: Callable[[], IO[bytes]], vocab_size: int) -> None:
        """Args:
        file: to write to, from its start.
        aside: makes a temporary file.
        vocab_size: of the tokenizer.
        """
        self._file, self._position, self._crc = file, 0, 0
        self._token_type = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
        self._aside = {name: aside() for name in (*COLUMNS, *_STREAMS)}
        self._bits = np.zeros(0, np.bool_)  # of labels, those that do not fill a byte yet
        self._tokens = self._images = self._bytes = self._skipped = self.items = self.documents = 0
        self._put("offsets", np.zeros(1, np.int64))

    def append(self, chunk: Chunk) -> None:
        """Adds documents behind those that are there."""
        self._write(chunk.tokens.astype(self._token_type).data)
        for name, dtype in COLUMNS.items():
            self._put(name, getattr(chunk, name).astype(dtype, copy=False))
        self._put("offsets", self._tokens + np.cumsum(chunk.lengths, dtype=np.int64))
        self._put_labels(chunk.labelled)
        self._put_images(chunk.images)
        self._tokens += len(chunk.tokens)
        self.documents += len(chunk.lengths)
        self.items += chunk.items

    def skip(self, rows: NDArray[np.int64]) -> None:
        """Notes rows that were skipped, in order; perhaps a part of them."""
        self._put("skipped_rows", rows)
        self._skipped += len(rows)

    def finish(self, kind: str, notes: dict[str, Any]) -> None:
        """Writes what is left, and the footer.

        Args:
            kind: of the items.
            notes: JSON values to keep with it.
        """
        self._put("label_bits", np.packbits(self._bits))
        arrays = {"tokens": [self._token_type.str, 0, self._tokens]}
        for name, file in self._aside.items():
            if (name in _OF_IMAGES and not self._images) or (name == "skipped_rows" and not self._skipped):
                continue
            arrays[name] = self._append_array(name, file)
        about = {
            "format_version": FORMAT_VERSION,
            "items": self.items,
            "kind": kind,
            "arrays": arrays,
            "notes": notes,
        }
        footer = json.dumps(about).encode()
        self._write(footer)
        self._file.write(_TRAILER.pack(_MAGIC, len(footer), self._crc))
        self._file.flush()

    def close(self) -> None:
        """Lets go of the temporary files."""
        for file in self._aside.values():
            file.close()

    def _write(self, data: Any) -> None:
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._position += memoryview(data).nbytes

    def _put(self, name: str, array: NDArray[Any]) -> None:
        self._aside[name].write(np.ascontiguousarray(array).data)

    def _put_labels(self, labelled: NDArray[np.bool_]) -> None:
        bits = np.concatenate([self._bits, labelled])
        whole = len(bits) // 8 * 8
        self._put("label_bits", np.packbits(bits[:whole]))
        self._bits = bits[whole:]

    def _put_images(self, images: list[Images]) -> None:
        names = [name.encode() for of_document in images for name in of_document]
        self._put("image_ends", self._images + np.cumsum([len(of_document) for of_document in images], dtype=np.int64))
        self._put("name_ends", self._bytes + np.cumsum([len(name) for name in names], dtype=np.int64))
        self._put("names", np.frombuffer(b"".join(names), np.uint8))
        self._images += len(names)
        self._bytes += sum(map(len, names))

    def _append_array(self, name: str, file: IO[bytes]) -> list[Any]:
        """Copies what was put aside; where it is then: [type, first byte, number of values]."""
        self._write(bytes(-self._position % _ALIGNMENT))
        dtype, start = np.dtype({**COLUMNS, **_STREAMS}[name]), self._position
        file.seek(0)
        while block := file.read(_BLOCK):
            self._write(block)
        return [dtype.str, start, (self._position - start) // dtype.itemsize]


def temporary_file(folder: Path) -> IO[bytes]:
    """A file without a name, gone when it is closed."""
    return tempfile.TemporaryFile(dir=folder, buffering=_BLOCK)


def map_entry(path: Path) -> Encoded:
    """Maps an entry; nothing of it is read before it is used, and it stays whole if the file is deleted.

    As long as it is mapped, the file carries a shared lock, by which others see that it is in use.

    Raises:
        OSError: it cannot be opened.
        DamagedEntry: it is not an entry, or was cut off.
        UserError: a newer llama-acc wrote it.
    """
    with path.open("rb") as file:
        _allow_more_files()
        _lock_shared(file.fileno())
        if os.fstat(file.fileno()).st_nlink == 0:
            raise FileNotFoundError(path)  # deleted after it was opened
        if os.fstat(file.fileno()).st_size < _TRAILER.size:
            raise DamagedEntry("it was cut off")
        # Python's mmap keeps a duplicate of the descriptor, and that keeps the lock.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _read(mapped, path)


def verify(path: Path) -> None:
    """Reads all of an entry's bytes.

    Raises:
        DamagedEntry: they are not the ones that were written.
    """
    left, crc = path.stat().st_size - _TRAILER.size, 0
    with path.open("rb", buffering=0) as file:
        while left > 0:
            block = file.read(min(left, 4 * _BLOCK))
            if not block:
                raise DamagedEntry("it was cut off")
            crc = zlib.crc32(block, crc)
            left -= len(block)
        magic, _, wanted = _TRAILER.unpack(file.read(_TRAILER.size))
    if magic != _MAGIC or crc != wanted:
        raise DamagedEntry("its checksum is wrong")


def _allow_more_files() -> None:
    """Every mapped entry keeps a descriptor: of thousands of shards that is more than a process may open at first."""
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if lowest_free > soft // 2 and soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _lock_shared(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks: a mapped file is whole even when deleted
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def _read(mapped: mmap.mmap, path: Path) -> Encoded:
    data = memoryview(mapped)
    magic, length, _ = _TRAILER.unpack(data[-_TRAILER.size :])
    if magic != _MAGIC or length > len(data) - _TRAILER.size:
        raise DamagedEntry("it does not end as an entry does")
    about = json.loads(bytes(data[-_TRAILER.size - length : -_TRAILER.size]))
    _check_version(path, about)
    arrays: dict[str, Any] = {
        name: np.frombuffer(data, np.dtype(dtype), count, start)
        for name, (dtype, start, count) in about["arrays"].items()
    }
    encoded = Encoded(
        **arrays, items=about["items"], kind=about["kind"], notes=about["notes"], path=path, mapped=mapped
    )
    if {len(getattr(encoded, name)) for name in COLUMNS} != {len(encoded.offsets) - 1}:
        raise DamagedEntry("its parts do not fit together")
    if encoded.offsets[-1] != len(encoded.tokens) or len(encoded.label_bits) != -(-len(encoded.tokens) // 8):
        raise DamagedEntry("its parts do not fit together")
    return encoded


def _check_version(path: Path, about: dict[str, Any]) -> None:
    version = int(about["format_version"])
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}; this llama-acc reads up to {FORMAT_VERSION}",
            "update llama-acc, or delete that file",
        )
    if version < FORMAT_VERSION:
        raise DamagedEntry("an early version wrote it")
