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
import pickle
import resource
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from llama_acc.core.data.checks import CHECKS_VERSION
from llama_acc.core.data.encode import (
    DOCUMENT,
    ENCODER_VERSION,
    Chunk,
    Images,
    stored_images,
    stored_tokens,
    token_type,
)
from llama_acc.core.data.tar_shards import TAR_SUFFIX, tar_digest
from llama_acc.core.data.templates import PromptFormat
from llama_acc.core.errors import UserError
from llama_acc.core.home import home
from llama_acc.core.input_files import open_input
from llama_acc.core.tokenizer import Tokenizer

FORMAT_VERSION = 5
"""Of an entry; part of the cache's key."""
DEFAULT_GIB = 10.0
SUFFIX = ".tokens"
_MAGIC = b"llamaacc"
_TRAILER = struct.Struct("<QI8s")
_BLOCK = 1 << 20
_OWN = ".llama-acc-run-"  # how the folders begin in which runs put what is theirs alone
_ABANDONED_SECONDS = 24 * 3600  # where a file system has no locks

_logger = logging.getLogger("llama_acc")


class About(NamedTuple):
    """What is known of a file when all of its documents are encoded."""

    items: int
    """How many items it has, besides the rows that were skipped."""
    kind: str
    """ "single_turn" or "dialogue"."""
    skipped_rows: NDArray[np.int64]
    """[S]: the numbers of the rows that were skipped, from 0."""
    notes: dict[str, Any]
    """What else was found out, as JSON: `skipped`, what is wrong with rows that were skipped, as the fields of
    `Finding`s, the first of it; `skipped_kinds`, how much of each kind; `warnings`, what else was found in the items,
    by kind, how often and where first; `unused_keys`, the keys that are not used, and in how many items."""


Encode = Callable[[Callable[[Chunk], None]], About]
"""Encodes a file: calls its argument with chunk after chunk."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """The documents of one file; read-only arrays, mapped."""

    path: Path
    """Where it is mapped from."""
    mapped: mmap.mmap = field(repr=False)
    token_type: "np.dtype[Any]"
    table: NDArray[np.void]
    """[D] of `DOCUMENT`"""
    items: int
    """How many items the file has, besides the rows that were skipped."""
    kind: str
    """ "single_turn" or "dialogue"."""
    skipped_rows: NDArray[np.int64]
    """[S]: the numbers of the rows that were skipped, from 0."""
    notes: dict[str, Any]
    """See `About`."""

    def __len__(self) -> int:
        return len(self.table)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the same file.
        return map_entry, (self.path,)

    def document(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """A document's tokens, and which of them are labeled. [N], [N]"""
        return stored_tokens(self.table[i], self.mapped, self.token_type)

    def images(self, i: int) -> Images:
        """Where a document's images are."""
        return stored_images(self.table[i], self.mapped, self.token_type)

    def release(self) -> None:
        """Lets go of the pages that were read, so as not to seem to hold them: they stay in the system's cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


def write_entry(path: Path, encode: Encode, vocab_size: int) -> None:
    """Write an entry as its documents come.

    Raises:
        OSError: there is no room for it.
    """
    position = crc = documents = 0

    def put(data: Any) -> None:
        nonlocal position, crc
        file.write(data)
        crc = zlib.crc32(data, crc)
        position += memoryview(data).nbytes

    def append(chunk: Chunk) -> None:
        nonlocal documents
        rows = chunk.table.copy()
        rows["begin"] += position
        aside.write(rows.tobytes())
        documents += len(rows)
        put(chunk.content)

    try:
        with path.open("wb") as file, tempfile.TemporaryFile(dir=path.parent, buffering=_BLOCK) as aside:
            about = encode(append)
            put(bytes(-position % DOCUMENT.alignment))
            table = position
            aside.seek(0)
            while block := aside.read(_BLOCK):
                put(block)
            put(about.skipped_rows.astype(np.int64).tobytes())
            index = {
                "vocab_size": vocab_size,
                "table": [documents, table],
                "skipped_rows": [len(about.skipped_rows), table + documents * DOCUMENT.itemsize],
                "items": about.items,
                "kind": about.kind,
                "notes": about.notes,
            }
            text = json.dumps(index).encode()
            put(text)
            file.write(_TRAILER.pack(len(text), crc, _MAGIC))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def map_entry(path: Path, *, verify: bool = False) -> Encoded:
    """Map an entry; nothing of it is read before it is used, and it stays whole if the file is deleted.

    As long as it is mapped, the file carries a shared lock, by which others see that it is in use.

    Args:
        path: where it is.
        verify: read all of its bytes, and compare their checksum.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not an entry, or was damaged.
    """
    with path.open("rb") as file:
        _allow_more_files()
        with contextlib.suppress(OSError):  # a file system without locks: what is mapped stays whole all the same
            fcntl.flock(file, fcntl.LOCK_SH)
        size = os.fstat(file.fileno()).st_size - _TRAILER.size
        if os.fstat(file.fileno()).st_nlink == 0:
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
    return Encoded(
        path,
        mapped,
        token_type(index["vocab_size"]),
        np.frombuffer(mapped, DOCUMENT, *index["table"]),
        index["items"],
        index["kind"],
        np.frombuffer(mapped, np.int64, *index["skipped_rows"]),
        index["notes"],
    )


def _allow_more_files() -> None:
    """Every mapped entry keeps a descriptor: of thousands of shards that is more than a process may open at first."""
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if lowest_free > soft // 2 and soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def content_digest(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """sha256 of a file's bytes, read as a stream; of a shard of images, of all but their pixels.

    Args:
        path: the file.
        stopped: asked now and then whether the digest is still wanted.

    Raises:
        CancelledError: it is not.
        OSError: it cannot be read.
        UserError: it is a damaged shard.
    """
    if path.suffix.lower() == TAR_SUFFIX:
        return tar_digest(path)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open_input(path, pipes=False) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if stopped():
                raise CancelledError
    return digest.hexdigest()


def cache_key(
    content: str,
    suffix: str,
    format: str,
    tokenizer: Tokenizer,
    templates: list[PromptFormat],
    max_tokens: int,
    image_positions: int | None = None,
) -> str:
    """What names an entry: everything that decides the tokens and labels of a file, and what is found in it.

    Args:
        content: the digest of the file's bytes.
        suffix: how its name ends, which says how it is read.
        format: the kind of items asked for.
        tokenizer: by its fingerprint.
        templates: the format to write them in; several where the kind of the items will decide.
        max_tokens: where documents are cut.
        image_positions: how many places an image takes; None: there may be no images.
    """
    versions = [FORMAT_VERSION, ENCODER_VERSION, CHECKS_VERSION]
    formats = [template.to_json() for template in templates]
    parts = [content, suffix.lower(), format, tokenizer.fingerprint(), formats, max_tokens, image_positions, versions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class EntryStore(contextlib.ExitStack):
    """Where the entries of a run are: in the cache, or, what that cannot take, in a folder of the run's own.

    The folder is deleted on leaving. What is mapped by then stays whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self._limit = _limit_bytes()
        self._cache = home() / "cache" / "tokens"
        self._own: dict[Path, Path] = {}  # folders of this run alone, by where they are

    def get(self, key: str, encode: Encode, vocab_size: int, waiting: Callable[[], None] = lambda: None) -> Encoded:
        """The entry of that key, written if it is not there. Of several processes that want one, only one writes.

        Args:
            key: what `cache_key` gave.
            encode: makes its content.
            vocab_size: of the tokenizer.
            waiting: called if another process is writing it.

        Raises:
            UserError: there is no room for it anywhere.
        """
        found = self.find(key)
        if found is None and self._cache_is_usable():
            lock = FileLock(self._cache / f".{key[:4]}.lock")  # goes with the process, however that ends
            with contextlib.suppress(NotImplementedError, OSError):  # without locks, two may do the same work
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    waiting()
                    lock.acquire()
            try:
                found = self.find(key) or self._write(key, encode, vocab_size)
            finally:
                lock.release()
        return found or self._write_aside(key, encode, vocab_size)

    def find(self, key: str) -> Encoded | None:
        """The entry of that key, every byte of it checked, or None where there is none that can be used."""
        for folder in self._own.values():
            if (path := folder / (key + SUFFIX)).exists():
                return map_entry(path)
        path = self._cache / (key + SUFFIX)
        if self._limit == 0:
            return None
        try:
            encoded = map_entry(path, verify=True)
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _logger.warning("ignoring the token cache's entry %s: %s", path, error)
            return None
        return encoded

    def own_folder(self) -> Path:
        """A folder of this run, for anything its processes are to find."""
        parent = self._cache if self._cache_is_usable() else Path(tempfile.gettempdir())
        return next(iter(self._own.values()), None) or self._own_folder_in(parent)

    def _cache_is_usable(self) -> bool:
        if self._limit == 0:
            return False
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._warn(error)
            return False
        return os.access(self._cache, os.W_OK)

    def _own_folder_in(self, parent: Path) -> Path:
        if parent not in self._own:
            for left in parent.glob(f"{_OWN}*"):
                _remove_if_unused(left)
            folder, lock = _locked_folder(parent)
            self.callback(os.close, lock)
            self.callback(shutil.rmtree, folder, ignore_errors=True)
            self._own[parent] = folder
        return self._own[parent]

    def _write(self, key: str, encode: Encode, vocab_size: int) -> Encoded | None:
        """Writes an entry into the cache, or beside it if those in use leave no room; None if it cannot."""
        try:
            path = self._own_folder_in(self._cache) / (key + SUFFIX)
            write_entry(path, encode, vocab_size)
            if _make_room(self._cache, self._limit - path.stat().st_size):
                path = path.rename(self._cache / path.name)
            return map_entry(path)
        except OSError as error:
            self._warn(error)
            return None

    def _write_aside(self, key: str, encode: Encode, vocab_size: int) -> Encoded:
        """Writes an entry where temporary files go."""
        parent = Path(tempfile.gettempdir())
        try:
            path = self._own_folder_in(parent) / (key + SUFFIX)
            write_entry(path, encode, vocab_size)
        except OSError as error:
            raise UserError(
                f"cannot write the encoded data to {parent}: {error.strerror or error}",
                "make room there, or set TMPDIR to a folder that has some",
            ) from error
        return map_entry(path)

    def _warn(self, error: OSError) -> None:
        _logger.warning("not keeping encoded data in %s: %s", self._cache, error.strerror or error)


def _limit_bytes() -> int:
    setting = os.environ.get("LLAMA_ACC_CACHE_GIB") or str(DEFAULT_GIB)
    try:
        gib = float(setting)
        if not 0 <= gib < float("inf"):
            raise ValueError
    except ValueError as error:
        raise UserError(f"LLAMA_ACC_CACHE_GIB should be a size in GiB, 0 for no cache, but is {setting!r}") from error
    return int(gib * 2**30)


def _make_room(folder: Path, room: int) -> bool:
    """Deletes the entries unused for longest until the others fit. Those in use stay.

    Returns:
        Whether they do; if those in use alone are too many, nothing is deleted.
    """
    entries = []
    for path in folder.glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):  # another run is at it too
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
    excess = sum(size for _, size, _ in entries) - room
    unused = [entry for entry in sorted(entries) if excess > 0 and _is_unused(entry[2])]
    if excess > sum(size for _, size, _ in unused):
        return False
    for _, size, path in unused:
        if excess > 0 and _remove_if_unused(path):
            excess -= size
    return True


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor of a lock on it, which goes with the process, however that ends."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_OWN, dir=parent))
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # another run took it for a folder that was left


def _is_unused(path: Path, then: Callable[[], Any] = lambda: None) -> bool:
    """Whether nobody has an entry or a run's folder locked, or, where there are no locks, touched it for a day.

    Args:
        path: of the entry or the folder.
        then: done before anybody else can lock it.
    """
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:  # another run is at it, or it is another user's
        return False
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError) or time.time() - path.stat().st_mtime < _ABANDONED_SECONDS:
                return False
        then()
        return True
    finally:
        os.close(lock)


def _remove_if_unused(path: Path) -> bool:
    def remove() -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    try:
        return _is_unused(path, remove)
    except OSError as error:
        _logger.warning("cannot delete %s: %s", path, error.strerror)
        return False


def publish_to_local_ranks(value: Any, folder: Path) -> None:
    """Leave a value in a folder of this run for its other processes on this machine, which map its arrays.

    Both ends are processes of one run of one user, so it may be a pickle.
    """
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    (folder / "published.pickle").write_bytes(pickle.dumps(([view.nbytes for view in views], data)))
    with (folder / "published.arrays").open("wb") as file:
        for view in views:
            file.write(view)
            file.write(bytes(-view.nbytes % 64))


def load_published(folder: Path) -> Any:
    """What was left there. Its arrays stay whole when the folder is deleted."""
    sizes, data = pickle.loads((folder / "published.pickle").read_bytes())
    mapped = np.memmap(folder / "published.arrays", mode="r") if any(sizes) else np.zeros(0, np.uint8)
    buffers, begin = [], 0
    for size in sizes:
        buffers.append(mapped[begin : begin + size].data)
        begin += size + -size % 64
    return pickle.loads(data, buffers=buffers)
