"""Items as they are written: JSON lines or a JSON array, perhaps compressed, whole or not at all."""

import fcntl
import gzip
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from llama_acc.core.atomic import sync
from llama_acc.core.data.items import Malformed
from llama_acc.core.data.read import data_suffix
from llama_acc.core.errors import RunError, UserError

if sys.version_info >= (3, 14):
    from compression.zstd import CompressionParameter, ZstdFile
else:
    from backports.zstd import CompressionParameter, ZstdFile

_GZIP_LEVEL = 5  # 6, the default, takes twice the time for 1 % less
_encode = msgspec.json.Encoder().encode


class Layout(NamedTuple):
    """What stands before, between, after and behind each of the items; and what is written of none."""

    begin: bytes = b""
    between: bytes = b""
    end: bytes = b""
    behind: bytes = b""
    empty: bytes = b""
    ascii: bool = False
    """Other characters are written as escapes."""


LINES = Layout(behind=b"\n")  # who reads a pipe has whole lines, however it ends
_ARRAY = Layout(b"[\n", b",\n", b"\n]\n", empty=b"[]\n")
# As Python's json.dump writes a list, which is what LLaMA2-Accessory's tools do.
_REFERENCE = Layout(b"[", b", ", b"]", empty=b"[]", ascii=True)


def layout_of(path: Path, reference: bool = False) -> Layout:
    """How a file of that name is written: .jsonl or .json, perhaps with .gz or .zst behind.

    Raises:
        UserError: the name ends in something else.
    """
    suffix = data_suffix(path)
    if suffix not in (".jsonl", ".json") or path.suffix.lower() not in (suffix, ".gz", ".zst"):
        raise UserError(
            f"{path}: {path.suffix or 'no suffix'} is not a kind of file that is written",
            "--output takes a .jsonl or .json file, perhaps with .gz or .zst behind, or - for standard output",
        )
    return LINES if suffix == ".jsonl" else _REFERENCE if reference else _ARRAY


def encoded(record: dict[str, Any], layout: Layout) -> bytes:
    """An item as JSON.

    Raises:
        Malformed: it cannot be written.
    """
    try:
        line = _encode(record)  # refuses lone surrogates, which json writes as escapes
        return json.dumps(record).encode() if layout.ascii else line
    except UnicodeEncodeError as error:
        surrogate = ord(str(error.object)[error.start])
        raise Malformed(f"{_unwritable(record)} has a lone surrogate (U+{surrogate:04X})") from error
    except RecursionError as error:
        raise Malformed("is nested too deep") from error


def _unwritable(record: dict[str, Any]) -> str:
    """The field, or the turn, that has the lone surrogate."""
    for field, value in record.items():
        for number, part in enumerate(value if isinstance(value, list) else [value], start=1):
            try:
                _encode(part)
            except UnicodeEncodeError:
                return f"turn {number}" if isinstance(value, list) else repr(field)
    return "a field's name"


def write_lines(lines: Iterable[bytes], file: IO[bytes], layout: Layout) -> None:
    """Write items one at a time."""
    count = 0
    for count, line in enumerate(lines, start=1):
        file.write((layout.between if count > 1 else layout.begin) + line + layout.behind)
    file.write(layout.end if count else layout.empty)
    file.flush()


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, compressed if its name says so, which appears under its name when all is written.

    Where a symbolic link has the name, it stays, and what it leads to is written.

    Raises:
        UserError: it cannot be made, or another process is writing it.
        RunError: it cannot be written to its end.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder", "give --output a file's name")
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".writing-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = aside.open("ab", buffering=1 << 20)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        with file:  # and so the lock
            if not _is_alone(file, aside):
                raise UserError(f"another process is writing {path}", "wait for it, or give --output another name")
            try:
                if file.tell():
                    file.truncate(0)  # what a killed process left
                with _compressed(file, path) as content:
                    yield content
                file.flush()
                os.fsync(file.fileno())
                aside.replace(target)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
        sync(target.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _is_alone(file: IO[bytes], aside: Path) -> bool:
    """Lock a file until it is closed; False: another process has it, or has given it its name in between."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no locks on this file system
    return aside.exists() and os.path.samestat(aside.stat(), os.fstat(file.fileno()))


def _compressed(file: IO[bytes], path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        # Without name and time, so that the same items give the same file.
        return gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0)
    if suffix == ".zst":
        return ZstdFile(file, "wb", options={CompressionParameter.checksum_flag: True})
    return nullcontext(file)
