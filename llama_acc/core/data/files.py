"""Data files as streams of bytes: opened, decompressed, counted. Nothing is ever read whole.

Compression is recognized by the first bytes, which no UTF-8 text can have, so a name need not say it.
"""

import difflib
import gzip
import io
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from lzma import LZMAError
from pathlib import Path
from struct import error as StructError
from typing import IO, Any

from llama_acc.core.errors import UserError, did_you_mean
from llama_acc.core.input_files import open_input

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError, ZstdFile
else:
    from backports.zstd import ZstdError, ZstdFile

COMPRESSIONS = (".gz", ".zst", ".zip")
BLOCK = 1 << 19
"""Bytes read at a time."""

_GZIP, _ZSTD, _ZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
# Zstandard's skippable frames (RFC 8878, 3.1.2), with which pzstd begins.
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")

# What zipfile raises where an archive is damaged (or, RuntimeError, wants a password).
_ZIP_ERRORS = (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, LookupError, StructError)

BytesRead = Callable[[int], None]
"""Called with how many bytes of a file have been read, before decompression."""


def data_suffix(path: Path) -> str:
    """What the name says of the content, in lower case: ".json" for a.json and a.JSON.gz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()


class DataStream(io.BufferedIOBase):
    """The content of a stream of bytes that may be compressed with gzip or Zstandard.

    Attributes:
        name: of the stream, for messages.
        count: bytes that have been read.
        line_ends: LF among them.
    """

    def __init__(self, stream: IO[bytes], name: str, progress: BytesRead | None = None) -> None:
        """Args:
        stream: open for reading; whoever opened it closes it.
        name: of the stream, for messages.
        progress: see `BytesRead`.
        """
        self.name = name
        self.count = self.line_ends = 0
        counted: Any = io.BufferedReader(_Counted(stream, progress), BLOCK)
        with self._errors_named():
            begin = counted.peek(4)
        if begin.startswith(_GZIP):
            self._stream: Any = gzip.GzipFile(fileobj=counted)
        elif begin.startswith(_ZSTD) or _SKIPPABLE.match(begin):
            self._stream = ZstdFile(counted)
        else:
            self._stream = counted

    def readable(self) -> bool:
        """True."""
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes, none at the end.

        Raises:
            UserError: it cannot be read, or is damaged.
        """
        with self._errors_named():
            content: bytes = self._stream.read(size)
        self.count += len(content)
        self.line_ends += content.count(b"\n")
        return content

    def read1(self, size: int = -1, /) -> bytes:
        """The next block, for io.TextIOWrapper, which asks for small ones."""
        return self.read(BLOCK)

    def peek(self) -> bytes:
        """What comes next, which stays; nothing at the end.

        Raises:
            UserError: as `read`.
        """
        with self._errors_named():
            begin: bytes = self._stream.peek(BLOCK)
        return begin

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, ZstdError) as error:
            hint = "it may not have been copied or downloaded to its end"
            raise UserError(f"{self.name} is damaged: {error}", hint) from error
        except OSError as error:
            raise UserError(f"cannot read {self.name}: {error.strerror or error}") from error


@contextmanager
def open_data(path: Path, progress: BytesRead | None = None, *, pipes: bool = True) -> Iterator[DataStream]:
    """A file's content, decompressed; of a pipe only where it is read once.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        file = open_input(path, pipes=pipes)
    except FileNotFoundError as error:
        raise UserError(f"there is no data file {path}", nearest_names(path)) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with file, ExitStack() as stack:
        if not _is_zip(file):
            yield DataStream(file, str(path), progress)
            return
        member = _only_member(file, path, stack)
        yield DataStream(member, str(path), progress and (lambda _: progress(file.tell())))


def _is_zip(file: Any) -> bool:
    if not file.seekable():
        return False
    begin = file.read(len(_ZIP))
    file.seek(0)
    return bool(begin == _ZIP)


def _only_member(file: Any, path: Path, stack: ExitStack) -> IO[bytes]:
    """The one file in a zip archive, as data sets are sometimes given out; what a Mac adds does not count."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
        names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
        if len(names) == 1:
            return stack.enter_context(archive.open(names[0]))
    except _ZIP_ERRORS as error:
        raise UserError(f"{path} cannot be unpacked: {error}", "unpack it, and give the file") from error
    raise UserError(f"{path} holds {len(names)} files, and should hold one", "unpack it, and give the files")


def nearest_names(path: Path) -> str | None:
    """What is there under a name like `path`'s, as a hint."""
    try:
        names = [f.name for f in path.parent.iterdir() if not f.name.startswith(".")]
    except OSError:
        return f"there is no folder {path.parent}"
    if close := did_you_mean(path.name, names):
        return close
    # The same name with another ending is near too.
    stems = difflib.get_close_matches(path.stem, [Path(n).stem for n in names], n=1, cutoff=0.8)
    same = [n for n in names if stems and Path(n).stem == stems[0]]
    return f"did you mean {same[0]!r}?" if same else None


class _Counted(io.RawIOBase):
    """A stream that reports how much of it has been read."""

    def __init__(self, stream: IO[bytes], progress: BytesRead | None) -> None:
        self._stream: Any = stream
        self._progress = progress
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._read += count
        if self._progress is not None:
            self._progress(self._read)
        return count
