"""Encoded data files, kept under LLAMA_ACC_HOME so that the next run starts at once.

An entry's name is the sha256 of all that decides its content, so nothing ever has to be invalidated; entries unused
for longest go when the cache outgrows `LLAMA_ACC_CACHE_GIB` (10 by default; 0: no cache), but never one that a run has
mapped. The cache may fail, the run may not: what goes wrong here is logged, and the file is encoded into a temporary
folder.

An entry is one file: the bytes of all documents, a table with a row for each (`encode.DOCUMENT`), the numbers of
skipped rows, an index in JSON, and a trailer with the index's length, the CRC-32 of all before it and a magic number.
It is written as a stream, in constant memory, and memory-mapped: all processes that use it share one copy.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import resource
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.atomic import locked
from llama_acc.core.data.checks import CHECKS_VERSION
from llama_acc.core.data.encode import DOCUMENT, ENCODER_VERSION, Chunk, Labels, stored_images, stored_tokens
from llama_acc.core.data.read import TAR_SUFFIX, unreadable
from llama_acc.core.data.tar_shards import tar_digest
from llama_acc.core.data.templates import Template
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import home, open_input
from llama_acc.core.tokenizer import Tokenizer

FORMAT_VERSION = 6
"""Of an entry; part of the cache's key."""
DEFAULT_GIB = "10"
SUFFIX = ".tokens"
_MAGIC = b"llamaacc"
_TRAILER = struct.Struct("<QI8s")
_BLOCK = 1 << 20

_logger = logging.getLogger("llama_acc")


class About(NamedTuple):
    """What is known of a file when all of its documents are encoded."""

    items: int  # how many items it has, besides the rows that were skipped
    kind: str  # "single_turn", "dialogue" or "text"
    skipped_rows: NDArray[np.int64]  # [S]: the numbers of the rows that were skipped, from 0
    notes: dict[str, Any]
    """What else was found out, as JSON: `skipped`, what is wrong with rows that were skipped, as the fields of
    `Finding`s, the first of it; `skipped_kinds`, how much of each kind; `warnings`, what else was found in the items,
    by kind, how often and where first; `unused_keys`, the keys that are not used, and in how many items;
    `documents`, how many plain text has, the items of which are its pieces."""


Encode = Callable[[Callable[[Chunk], None]], About]
"""Encodes a file: calls its argument with chunk after chunk."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """The documents of one file; read-only arrays, mapped."""

    path: Path  # where it is mapped from
    mapped: mmap.mmap = field(repr=False)
    vocab_size: int
    table: NDArray[np.void]  # [D] of `DOCUMENT`
    about: About

    def __len__(self) -> int:
        return len(self.table)

    def document(self, i: int) -> tuple[NDArray[np.int32], Labels]:
        """A document's tokens, and which of them are labeled. [N], [N]"""
        return stored_tokens(self.table[i], self.mapped, self.vocab_size)

    def images(self, i: int) -> tuple[str, ...]:
        """Where a document's images are."""
        return stored_images(self.table[i], self.mapped, self.vocab_size)

    def release(self) -> None:
        """Lets go of the pages that were read, so as not to seem to hold them: they stay in the system's cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


def write_entry(path: Path, encode: Encode, vocab_size: int) -> None:
    """Write an entry as its documents come.

    Raises:
        OSError: there is no room for it.
    """
    position = crc = 0

    def put(data: bytes) -> None:
        nonlocal position, crc
        file.write(data)
        crc = zlib.crc32(data, crc)
        position += len(data)

    def append(chunk: Chunk) -> None:
        rows = chunk.table.copy()
        rows["begin"] += position
        tables.write(rows.tobytes())
        put(chunk.content)

    with path.open("wb") as file, tempfile.TemporaryFile(dir=path.parent, buffering=_BLOCK) as tables:
        _share(file)
        about = encode(append)
        put(bytes(-position % DOCUMENT.alignment))
        table = position
        tables.seek(0)
        for block in iter(partial(tables.read, _BLOCK), b""):
            put(block)
        skipped_rows = position
        put(about.skipped_rows.astype(np.int64).tobytes())
        index = {
            **about._asdict(),
            "vocab_size": vocab_size,
            "table": [(skipped_rows - table) // DOCUMENT.itemsize, table],
            "skipped_rows": [len(about.skipped_rows), skipped_rows],
        }
        text = json.dumps(index).encode()
        put(text)
        file.write(_TRAILER.pack(len(text), crc, _MAGIC))  # not synced: what a loss of power leaves, `find` checks


def map_entry(path: Path, *, verify: bool = False) -> Encoded:
    """Map an entry; nothing of it is read before it is used, and it stays whole if the file is deleted. To
    `verify` it, all of its bytes are read, and their checksum compared.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not an entry, or was damaged.
    """
    with path.open("rb") as file:
        _allow_more_files()
        _share(file)
        status = os.fstat(file.fileno())
        size = status.st_size - _TRAILER.size
        if status.st_nlink == 0:
            raise FileNotFoundError(path)  # deleted after it was opened
        if size < 0:
            raise ValueError("it was cut off")
        # Python's mmap keeps a duplicate of the descriptor, and that keeps the lock.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length, wanted, magic = _TRAILER.unpack(mapped[size:])
        if magic != _MAGIC or length > size:
            raise ValueError("it does not end as an entry does")
        crc, left = 0, size if verify else 0
        while block := file.read(min(left, _BLOCK)):
            crc, left = zlib.crc32(block, crc), left - len(block)
        if verify and crc != wanted:
            raise ValueError("its checksum is wrong")
    index = json.loads(mapped[size - length : size])
    skipped_rows = np.frombuffer(mapped, np.int64, *index["skipped_rows"])
    about = About(index["items"], index["kind"], skipped_rows, index["notes"])
    return Encoded(path, mapped, index["vocab_size"], np.frombuffer(mapped, DOCUMENT, *index["table"]), about)


def _share(file: IO[bytes]) -> None:
    """Locks a file, by which others see that it is in use."""
    with contextlib.suppress(OSError):  # a file system without locks: what is mapped stays whole all the same
        fcntl.flock(file, fcntl.LOCK_SH)


def _allow_more_files() -> None:
    """Every mapped entry keeps a descriptor: of thousands of shards that is more than a process may open at first."""
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if lowest_free > soft // 2 and soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def content_digest(path: Path, stopped: Callable[[], bool]) -> str:
    """sha256 of a file's bytes, read as a stream until it is `stopped`; of a shard of images, of all but their pixels.

    Raises:
        CancelledError: it was stopped.
        UserError: it cannot be read, or is a damaged shard.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    try:
        with open_input(path, pipes=False) as file:
            if path.suffix.lower() == TAR_SUFFIX:
                return tar_digest(path)
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                if stopped():
                    raise CancelledError
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def cache_key(content: str, tokenizer: Tokenizer, templates: Sequence[Template], *settings: object) -> str:
    """What names an entry: everything that decides the tokens and labels of a file, and what is found in it.

    `content` is the digest of its bytes; there are several templates where the kind of the items will decide.
    """
    versions = [FORMAT_VERSION, ENCODER_VERSION, CHECKS_VERSION]
    parts = [content, tokenizer.fingerprint(), [template.to_json() for template in templates], settings, versions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class EntryStore(contextlib.ExitStack):
    """Where the entries of a run are: in the cache, or, what that cannot take, in a temporary folder of the run's own.

    That folder is deleted on leaving. What is mapped by then stays whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self._limit, self._cache = _limit_bytes(), home() / "cache" / "tokens"
        self._own: dict[str, Path] = {}  # entries in the run's own folder
        try:
            if self._limit:
                self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._warn(error)
            self._limit = 0

    def get(self, key: str, encode: Encode, vocab_size: int, waiting: Callable[[], None] = lambda: None) -> Encoded:
        """The entry of that `cache_key`, written if it is not there. Of several processes that want one, one writes;
        the others call `waiting` first.

        Raises:
            UserError: there is no room for it anywhere.
        """
        if (found := self.find(key)) is not None:
            return found
        if self._limit and os.access(self._cache, os.W_OK):
            with locked(self._cache / f".{key[:4]}.lock", waiting):
                if (found := self.find(key)) is not None:
                    return found
                aside = self._cache / f".{key}.part"
                try:
                    write_entry(aside, encode, vocab_size)
                    if _make_room(self._cache, self._limit - aside.stat().st_size, aside):
                        return map_entry(aside.rename(self._cache / (key + SUFFIX)))
                    self._own[key] = Path(shutil.move(aside, self.own_folder / (key + SUFFIX)))
                    return map_entry(self._own[key])
                except OSError as error:
                    self._warn(error)
                finally:
                    aside.unlink(missing_ok=True)
        try:
            path = self.own_folder / (key + SUFFIX)
            write_entry(path, encode, vocab_size)
        except OSError as error:
            raise UserError(
                f"cannot write the encoded data to {tempfile.gettempdir()}: {error.strerror or error}",
                "make room there, or set TMPDIR to a folder that has some",
            ) from error
        self._own[key] = path
        return map_entry(path)

    def find(self, key: str) -> Encoded | None:
        """The entry of that key, every byte of it checked, or None where there is none that can be used."""
        if key in self._own or not self._limit:
            return map_entry(self._own[key]) if key in self._own else None
        path = self._cache / (key + SUFFIX)
        try:
            encoded = map_entry(path, verify=True)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _logger.warning("ignoring the token cache's entry %s: %s", path, error)
            return None
        return encoded

    @cached_property
    def own_folder(self) -> Path:
        """A folder of this run, for anything its processes are to find."""
        return Path(self.enter_context(tempfile.TemporaryDirectory(prefix="llama-acc-", ignore_cleanup_errors=True)))

    def _warn(self, error: OSError) -> None:
        _logger.warning("not keeping encoded data in %s: %s", self._cache, error.strerror or error)


def _limit_bytes() -> int:
    setting = os.environ.get("LLAMA_ACC_CACHE_GIB") or DEFAULT_GIB
    try:
        gib = float(setting)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < float("inf"):
        raise UserError(f"LLAMA_ACC_CACHE_GIB should be a size in GiB, 0 for no cache, but is {setting!r}")
    return int(gib * 2**30)


def _make_room(folder: Path, room: int, new: Path) -> bool:
    """Deletes what killed runs left, and the entries unused for longest until the others fit. Those in use stay.

    Returns:
        Whether they fit.
    """
    for left in folder.glob(".*.part"):
        if left != new:
            _remove_if_unused(left)
    entries = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another run is at it too
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
    excess = sum(size for _, size, _ in entries) - room
    for _, size, path in sorted(entries if room >= 0 else []):
        if excess > 0 and _remove_if_unused(path):
            excess -= size
    return excess <= 0


def _remove_if_unused(path: Path) -> bool:
    """Deletes an entry that nobody has mapped; where a file system has no locks, that is not known, and it stays."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:  # or another run is at it, or it is another user's
        return False
    return True
