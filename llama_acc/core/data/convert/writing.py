"""Items as they are written: JSON lines or a JSON array, perhaps compressed, whole or not at all."""

import fcntl
import gzip
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

import msgspec

from llama_acc.core.atomic import sync
from llama_acc.core.data.convert.rules import Malformed, Record
from llama_acc.core.data.files import data_suffix
from llama_acc.core.errors import RunError, UserError

if sys.version_info >= (3, 14):
    from compression.zstd import CompressionParameter, ZstdFile
else:
    from backports.zstd import CompressionParameter, ZstdFile

OUTPUTS = (".jsonl", ".json")
_COMPRESSIONS = (".gz", ".zst")
_GZIP_LEVEL = 5  # 6, the default, takes twice the time for 1 % less
_BUFFER = 1 << 20

_encode = msgspec.json.Encoder().encode


class Layout(NamedTuple):
    """What stands before, between and after all items, and of none; and behind each item."""

    begin: bytes
    between: bytes
    end: bytes
    empty: bytes
    behind: bytes = b""
    ascii: bool = False
    """Other characters are written as escapes."""


LINES = Layout(b"", b"", b"", b"", behind=b"\n")  # who reads a pipe has whole lines, however it ends
ARRAY = Layout(b"[\n", b",\n", b"\n]\n", b"[]\n")
REFERENCE = Layout(b"[", b", ", b"]", b"[]", ascii=True)
"""As Python's json.dump writes a list, which is what LLaMA2-Accessory's tools do."""


def layout_of(path: Path, reference: bool = False) -> Layout:
    """How a file of that name is written.

    Args:
        path: ends in .jsonl or .json, and perhaps in .gz or .zst.
        reference: write an array as LLaMA2-Accessory's tools do.

    Raises:
        UserError: the name ends in something else.
    """
    suffix = data_suffix(path)
    if suffix not in OUTPUTS or path.suffix.lower() not in (*OUTPUTS, *_COMPRESSIONS):
        raise UserError(
            f"{path}: {path.suffix or 'no suffix'} is not a kind of file that is written",
            "--output takes a .jsonl or .json file, perhaps with .gz or .zst behind, or - for standard output",
        )
    if suffix == ".jsonl":
        return LINES
    return REFERENCE if reference else ARRAY


def encoded(record: Record, layout: Layout) -> bytes:
    """An item as JSON.

    Raises:
        Malformed: it cannot be written.
    """
    try:
        if not layout.ascii:
            return _encode(record)
        _encode(record)  # refuses lone surrogates, which json writes as escapes
        return json.dumps(record).encode()
    except UnicodeEncodeError as error:
        surrogate = ord(str(error.object)[error.start])
        raise Malformed(f"{_place_of(record)} has a lone surrogate (U+{surrogate:04X})") from error
    except RecursionError as error:
        raise Malformed("is nested too deep") from error


class Items:
    """A file that items are written to."""

    def __init__(self, file: IO[bytes], layout: Layout) -> None:
        self._file = file
        self._layout = layout
        self._written = False

    def write(self, line: bytes) -> None:
        """One item more."""
        self._file.write(self._layout.between if self._written else self._layout.begin)
        self._file.write(line)
        self._file.write(self._layout.behind)
        self._written = True

    def end(self) -> None:
        """No more items."""
        self._file.write(self._layout.end if self._written else self._layout.empty)
        self._file.flush()


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
        file = _opened_alone(aside)
    except BlockingIOError as error:
        raise UserError(f"another process is writing {path}", "wait for it, or give --output another name") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        with file:  # and so the lock
            try:
                with _compressed(file, path) as content:
                    yield content
                aside.replace(target)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
        sync(target.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _opened_alone(aside: Path) -> IO[bytes]:
    """The file, empty, with a lock that goes with the process, however that ends.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """
    with ExitStack() as stack:
        file = stack.enter_context(aside.open("ab", buffering=_BUFFER))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # no locks on this file system
        if not aside.exists() or not os.path.samestat(aside.stat(), os.fstat(file.fileno())):
            raise BlockingIOError  # it came to its end, and had its name, in between
        if file.tell():
            file.truncate(0)
        stack.pop_all()
        return file


@contextmanager
def _compressed(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        # Without name and time, so that the same items give the same file.
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as content:
            yield cast(IO[bytes], content)
    elif suffix == ".zst":
        with ZstdFile(file, "wb", options={CompressionParameter.checksum_flag: True}) as content:
            yield cast(IO[bytes], content)
    else:
        yield file
    file.flush()
    os.fsync(file.fileno())


def _place_of(record: Record) -> str:
    """The field that cannot be written."""
    for field, value in record.items():
        if not _is_writable(value):
            if isinstance(value, list):
                return f"turn {next(number for number, turn in enumerate(value, 1) if not _is_writable(turn))}"
            return repr(field)
    return "a field's name"


def _is_writable(value: object) -> bool:
    try:
        _encode(value)
    except UnicodeEncodeError:
        return False
    return True
