"""Files and folders that appear whole or not at all: written aside, synced, described by a manifest, renamed.

A link that lies where something is to be written is replaced: what it points to is never written, nor removed.

manifest.json: `{"format_version": 1, "files": {name: {"bytes": n, "sha256": hex}}, ...}`.
"""

import contextlib
import ctypes
import glob
import hashlib
import json
import mmap
import os
import secrets
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import read_object

FORMAT_VERSION = 1
_ASIDE = ".writing-"
_HASHED_AT_ONCE = 16 << 20
_SYNC_FILE_RANGE_WRITE = 2
_LEFT_SECONDS = 24 * 3600.0  # a file aside that nobody has written to for so long is a killed writer's


def write_text_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new, never a part."""
    write_whole(path, text.encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    with whole_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write that takes the name `path` on a normal exit; until then, and after an exception, `path` is what
    it was. Several processes may do so at once: one of them has the last word. `durable`: it is on the disk first, so
    that it is also whole after a loss of power."""
    begin = f"{_ASIDE}{path.name}-"
    for left in path.parent.glob(f"{glob.escape(begin)}*"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - _LEFT_SECONDS:
                remove(left)
    aside = path.with_name(begin + secrets.token_hex(4))
    try:
        with aside.open("xb") as file:
            yield file
        publish(aside, path, durable)
    except BaseException:
        remove(aside)
        raise


def publish(aside: Path, path: Path, durable: bool = True) -> None:
    """Gives a file that was written aside its name, once it is on the disk."""
    if durable:
        sync(aside)
    aside.replace(path)
    if durable:
        sync(path.parent)


@contextlib.contextmanager
def whole_folder(folder: Path, digests: Mapping[str, str] = MappingProxyType({})) -> Iterator[Path]:
    """Gives a temporary folder to write into; on a normal exit it is synced and takes the name `folder`. `digests` are
    SHA-256 of its files that are known by then.

    After an exception, or a kill, `folder` is what it was. One that is already there is replaced, in two renames: do
    not replace what must survive a kill between them.
    """
    try:
        yield begin_folder(folder)
        finish_folder(folder, digests)
    except BaseException:
        abandon_folder(folder)
        raise


def aside_of(path: Path) -> Path:
    """Where a file or folder is written before it takes its name."""
    return path.with_name(_ASIDE + path.name)


def begin_folder(folder: Path) -> Path:
    """Makes `folder`'s temporary folder, empty."""
    aside = aside_of(folder)
    remove(aside)
    aside.mkdir(parents=True)
    return aside


def finish_folder(folder: Path, digests: Mapping[str, str]) -> None:
    """Syncs the temporary folder, describes it and gives it its name. `digests`: SHA-256 that are known already."""
    aside, old = aside_of(folder), _old_of(folder)
    write_manifest(aside, digests)
    for path in (*aside.rglob("*"), aside):
        sync(path)
    if os.path.lexists(folder):
        remove(old)
        folder.rename(old)
    aside.rename(folder)
    sync(folder.parent)
    remove(old)


def abandon_folder(folder: Path) -> None:
    """Removes the temporary folder; `folder` is again what it was."""
    old = _old_of(folder)
    if os.path.lexists(old) and not os.path.lexists(folder):
        old.rename(folder)
    remove(aside_of(folder))


def remove_folder(folder: Path) -> None:
    """Removes a folder; it first loses its name, so that a kill leaves no half of it under that name."""
    remove(_old_of(folder))
    folder.rename(_old_of(folder))
    remove(_old_of(folder))


def _old_of(folder: Path) -> Path:
    return folder.with_name(f"{_ASIDE}{folder.name}-old")


def remove_unfinished(parent: Path) -> None:
    """Removes what a killed writer left."""
    for path in parent.glob(_ASIDE + "*"):
        remove(path)


def remove(path: Path) -> None:
    """Removes a file, a link (and not what it points to) or a folder, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Keeps other processes out by a lock file, which is released however this one ends; calls `on_wait` once if held.

    Some network file systems have no locks: there it keeps nobody out.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    with contextlib.suppress(NotImplementedError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path, kind: str = "sha256", progress: Callable[[int], None] = lambda done: None) -> str:
    """Hexadecimal SHA-256 of a file or, for the kind "git", git's identity of it as a blob; tells the bytes done."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    done = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            done += len(block)
            progress(done)
    return digest.hexdigest()


def digests_of_written(parts: Iterable[tuple[Path, int]]) -> dict[str, str]:
    """SHA-256 of files by name that are written meanwhile: each part is a file, and how many bytes are as they stay.

    They are mapped, as reading takes a third of the time of hashing, in large pieces: between two the thread waits for
    what is done in Python meanwhile, several times and 5 ms each. The disk gets each at once: else `sync` would have to
    wait for all of them at the end.
    """
    digests, done, ends = defaultdict[Path, Any](hashlib.sha256), Counter[Path](), Counter[Path]()
    library = ctypes.CDLL(None)

    def take(path: Path) -> None:
        with path.open("rb") as file:
            for start in range(done[path], ends[path], _HASHED_AT_ONCE):
                begin, stop = start - start % mmap.ALLOCATIONGRANULARITY, min(start + _HASHED_AT_ONCE, ends[path])
                if begin_sync := getattr(library, "sync_file_range", None):  # Linux
                    begin_sync(file.fileno(), *map(ctypes.c_int64, (begin, stop - begin)), _SYNC_FILE_RANGE_WRITE)
                with mmap.mmap(file.fileno(), stop - begin, access=mmap.ACCESS_READ, offset=begin) as mapped:
                    digests[path].update(memoryview(mapped)[start - begin :])
        done[path] = ends[path]

    for path, end in parts:
        ends[path] = max(ends[path], end)
        if ends[path] - done[path] >= _HASHED_AT_ONCE:
            take(path)
    for path in ends:
        take(path)
    return {path.name: digests[path].hexdigest() for path in ends}


def write_manifest(folder: Path, digests: Mapping[str, str] = MappingProxyType({})) -> None:
    """Describes every file in the folder in its manifest.json; `digests` are SHA-256 that are known already."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {
        name: {"bytes": path.stat().st_size, "sha256": digests.get(name) or digest_of(path)}
        for name, path in paths.items()
        if name != "manifest.json"
    }
    text = json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def check_manifest(folder: Path, verify: bool = False, contents: str | None = None) -> None:
    """Compares a checkpoint's folder with its manifest, if it has one: which files, their sizes, and the SHA-256 of
    all of them (`verify`), or of those whose name begins with `contents`, such as "state/".

    Raises:
        UserError: a newer format, or files that are missing or not what was written; all of them listed. Or `verify`
            was asked for, and there is no manifest.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        if verify:
            raise UserError(f"{folder} has no manifest.json to compare its files with", "leave --verify out")
        return
    try:
        manifest = read_object(path)
        version = int(manifest["format_version"])
        if version > FORMAT_VERSION:
            message = f"{path} has format_version {version}, this program knows up to {FORMAT_VERSION}"
            raise UserError(message, "update it")
        files = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in manifest["files"].items()}
    except (AttributeError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"cannot read {path}: {error!r}") from None
    problems = []
    for name, (size, sha256) in files.items():
        file = folder / name
        is_read = verify or (contents is not None and name.startswith(contents))
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes, {size} were written")
        elif is_read and digest_of(file) != sha256:
            problems.append(f"{name} was changed: its SHA-256 is not the one written")
    if problems:
        raise UserError(f"{folder} is damaged:\n{listed(problems)}", "use another checkpoint of the run")
