"""Encoded data files, kept under LLAMA_ACC_HOME so that the next run starts at once.

An entry's name is the sha256 of all that decides its content, so nothing ever has to be invalidated; entries unused
for longest go when the cache outgrows `LLAMA_ACC_CACHE_GIB` (10 by default; 0: no cache), but never one that a run has
mapped. The cache may fail, the run may not: what goes wrong here is logged, and the file is encoded into a temporary
folder.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from llama_acc.core.data.encode import ENCODER_VERSION
from llama_acc.core.data.entry import Encoded, EntryWriter, map_entry, temporary_file, verify
from llama_acc.core.data.survey import CHECKS_VERSION
from llama_acc.core.data.tar_shards import TAR_SUFFIX, tar_digest
from llama_acc.core.data.templates import PromptFormat
from llama_acc.core.errors import UserError
from llama_acc.core.home import home
from llama_acc.core.input_files import open_input
from llama_acc.core.tokenizer import Tokenizer

DEFAULT_GIB = 10.0
SUFFIX = ".tokens"
# Version 1's entries, which an older llama-acc may still use; they count, and go when they are the oldest.
_SUFFIXES = (SUFFIX, ".npz")
_ABANDONED_SECONDS = 24 * 3600
_JUST_MADE_SECONDS = 60
_OWN = ".llama-acc-run-"  # how the folders begin in which runs put what is theirs alone
_BLOCK = 1 << 20

_logger = logging.getLogger("llama_acc")

Write = Callable[[EntryWriter], None]
"""Appends all documents of a file, and finishes."""


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
    parts: dict[str, Any] = {
        "data": content,
        "suffix": suffix.lower(),
        "format": format,
        "tokenizer": tokenizer.fingerprint(),
        "templates": [template.to_json() for template in templates],
        "max_tokens": max_tokens,
        "encoder": ENCODER_VERSION,
        "checks": CHECKS_VERSION,
    }
    if image_positions is not None:
        parts["image_positions"] = image_positions
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class EntryStore:
    """Where the entries of a run are: in the cache, or, what that cannot take, in a folder of the run's own.

    The folder is deleted on leaving. What is mapped by then stays whole.
    """

    def __init__(self) -> None:
        self._limit = _limit_bytes()
        self._cache = home() / "cache" / "tokens"
        self._own: list[Path] = []
        self._locks = contextlib.ExitStack()

    def __enter__(self) -> "EntryStore":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for folder in self._own:
            shutil.rmtree(folder, ignore_errors=True)
        self._locks.close()

    def own_folder(self) -> Path:
        """A folder of this run, for anything its processes are to find."""
        if not self._own:
            self._add_own(self._cache if self._limit and self._is_usable() else None)
        return self._own[-1]

    def get(self, key: str, write: Write, vocab_size: int, waiting: Callable[[], None] = lambda: None) -> Encoded:
        """The entry of that key, written if it is not there. Of several processes that want one, only one writes.

        Args:
            key: what `cache_key` gave.
            write: makes its content.
            vocab_size: of the tokenizer.
            waiting: called if another process is writing it.

        Raises:
            UserError: a newer llama-acc wrote it, or there is no room for it anywhere.
        """
        found = self.find(key)
        if found is None and self._limit and self._is_usable():
            with _alone(self._cache / f"{key}.lock", waiting):
                found = self.find(key) or self._store(key, write, vocab_size)
        return found or self._store_aside(key, write, vocab_size)

    def find(self, key: str) -> Encoded | None:
        """The entry of that key, every byte of it checked, or None where there is none that can be used.

        Raises:
            UserError: a newer llama-acc wrote it.
        """
        for folder in self._own:
            if (path := folder / (key + SUFFIX)).exists():
                return map_entry(path)
        if self._limit == 0:
            return None
        path = self._cache / (key + SUFFIX)
        try:
            encoded = map_entry(path)
            verify(path)
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _logger.warning("ignoring the token cache's entry %s: %s", path, error)
            return None
        return encoded

    def _is_usable(self) -> bool:
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._say_not_kept(error)
            return False
        return os.access(self._cache, os.W_OK)

    def _add_own(self, parent: Path | None) -> Path:
        parent = parent or Path(tempfile.gettempdir())
        for path in parent.glob(f"{_OWN}*"):
            _remove_if_left(path)
        folder, lock = _locked_folder(parent)
        self._locks.callback(os.close, lock)
        self._own.append(folder)
        return folder

    def _store(self, key: str, write: Write, vocab_size: int) -> Encoded | None:
        """Writes an entry into the cache, or beside it if those in use leave no room; None if it cannot."""
        temporary = self._cache / f".{key}.{uuid4().hex}.tmp"
        try:
            _write_whole(temporary, write, vocab_size)
            fits = _make_room(self._cache, self._limit - temporary.stat().st_size)
            path = (self._cache if fits else self.own_folder()) / (key + SUFFIX)
            os.replace(temporary, path)
            return map_entry(path)
        except OSError as error:
            self._say_not_kept(error)
            return None
        finally:
            _remove(temporary)

    def _store_aside(self, key: str, write: Write, vocab_size: int) -> Encoded:
        """Writes an entry where temporary files go."""
        folder = self._own[-1] if self._own and self._limit == 0 else self._add_own(None)
        path = folder / (key + SUFFIX)
        try:
            _write_whole(path, write, vocab_size)
        except OSError as error:
            raise UserError(
                f"cannot write the encoded data to {folder}: {error.strerror or error}",
                "make room there, or set TMPDIR to a folder that has some",
            ) from error
        return map_entry(path)

    def _say_not_kept(self, error: OSError) -> None:
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


def _write_whole(path: Path, write: Write, vocab_size: int) -> None:
    with (
        path.open("wb") as file,
        contextlib.closing(EntryWriter(file, lambda: temporary_file(path.parent), vocab_size)) as writer,
    ):
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # by which others see that somebody is at it
        write(writer)
        os.fsync(file.fileno())


@contextlib.contextmanager
def _alone(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a lock that goes with the process, however that ends. Where there are none, two may do the same work."""
    lock = _locked(path, waiting)
    while not _is_at(lock, path):  # whoever had it has removed it, and the next one makes a new file
        lock.close()
        lock = _locked(path, waiting)
    with lock:
        try:
            yield
        finally:
            _remove(path)


def _locked(path: Path, waiting: Callable[[], None]) -> IO[str]:
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        _logger.debug("no locks on %s", path.parent)
    return lock


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _make_room(folder: Path, room: int) -> bool:
    """Deletes what killed runs have left, and the entries unused for longest until the others fit.

    Returns:
        Whether they do. Entries in use stay; if they alone are too many, so do all.
    """
    entries = []
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:  # another run is at it too
            continue
        if path.suffix in _SUFFIXES:
            entries.append((status.st_mtime, status.st_size, path))
        elif path.name.startswith(_OWN):
            _remove_if_left(path)
        elif path.name.startswith(".") and _is_abandoned(path, time.time() - status.st_mtime):
            _remove(path)
    excess = sum(size for _, size, _ in entries) - room
    free = [entry for entry in sorted(entries) if _unless_used(entry[2])] if excess > 0 else []
    if excess > sum(size for _, size, _ in free):
        return False
    for _, size, path in free:
        if excess <= 0:
            break
        if _unless_used(path, _remove):
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


def _remove_if_left(folder: Path) -> None:
    """Removes a folder of a run of this user that was killed: nobody has it locked, or, without locks, it is old."""
    try:
        status = folder.stat()
        if status.st_uid != os.geteuid():
            return
        lock = os.open(folder, os.O_RDONLY)
    except OSError:  # another run is at it too
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder)
    except BlockingIOError:
        return
    except OSError:
        if time.time() - status.st_mtime > _ABANDONED_SECONDS:
            _remove(folder)
    finally:
        os.close(lock)


def _is_abandoned(path: Path, age: float) -> bool:
    """Whether a killed run has left it: nobody has it locked, or, where that cannot be known, it is old."""
    if path.suffix != ".tmp" or age > _ABANDONED_SECONDS:
        return age > _ABANDONED_SECONDS
    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return age > _JUST_MADE_SECONDS


def _unless_used(path: Path, do: Callable[[Path], None] = lambda _: None) -> bool:
    """Does something to an entry, unless a run has it mapped and so holds a lock on it. Returns whether it did."""
    try:
        with path.open("rb+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                _logger.debug("no locks on %s", path.parent)
            do(path)
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning("cannot delete %s: %s", path, error.strerror)
