"""Data files as streams of rows, in memory for one of them.

`.json` (an array; or JSON lines under that name, as APIBench has it), `.jsonl`, `.csv`, `.tsv`, `.parquet`, and `.txt`
and `.md`, a document each, all of them perhaps packed with gzip, Zstandard or zip; and `.tar`, shards of pictures with
texts. A row is whatever JSON value stands there, or a table's cells by their columns; `items` says what makes an item
of it.
"""

import codecs
import csv
import difflib
import gzip
import io
import json
import logging
import re
import shlex
import shutil
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, count, islice
from lzma import LZMAError
from pathlib import Path
from struct import error as StructError
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple, cast

import msgspec

from llama_acc.core.data.json_array import JSON, MAX_ITEM, array_items
from llama_acc.core.data.keys import mapping_of, mapping_words, type_name
from llama_acc.core.data.parquet import PARQUET_SUFFIX, parquet_rows
from llama_acc.core.data.plain_text import PLAIN_SUFFIXES
from llama_acc.core.errors import DataError, UserError, did_you_mean
from llama_acc.core.input_files import open_input
from llama_acc.core.text import count_text

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError, ZstdFile
else:
    from backports.zstd import ZstdError, ZstdFile

TAR_SUFFIX = ".tar"
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", PARQUET_SUFFIX, TAR_SUFFIX, *PLAIN_SUFFIXES)
COMPRESSIONS = (".gz", ".gzip", ".zst", ".zip")
BLOCK = 1 << 17
"""Bytes or characters read at a time; with four times as many, reading an array takes a quarter longer."""

_ARRAY = re.compile(rb'[ \t\r\n]*\[[ \t\r\n]*(\{[ \t\r\n]*"[^"\\]*")')  # of objects, and how the first begins
_BLOCK_OF_ROWS, _LONGEST_BLOCK = 1 << 20, 1 << 24  # bytes
_ROWS_BETWEEN_REPORTS = 100
_SHOWN = 200  # characters kept of a line that is not JSON
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# First bytes that no UTF-8 text can have. pzstd begins with a skippable frame (RFC 8878, 3.1.2).
_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"
# What may have come in place of a file.
_POINTER, _PAGE = b"version https://git-lfs", re.compile(rb"\s*<(!doctype )?html", re.IGNORECASE)
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
_DAMAGED = (EOFError, zlib.error, LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, ZstdError)
# What zipfile raises where an archive is damaged (or, RuntimeError, wants a password).
_ZIP_ERRORS = (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, LookupError, StructError)
_decode = msgspec.json.Decoder().decode
_logger = logging.getLogger("llama_acc")

BytesRead = Callable[[int], None]
"""Called with how many bytes of a file have been read, before decompression."""


class Row(NamedTuple):
    """One row of a file."""

    where: str  # its place: "item 17", or "item 17 (line 230)"
    value: Any
    problem: str | None = None
    """Why this row alone cannot be read; its value is then what stands there, or the beginning of it."""


def looked_ahead(
    rows: Iterator[Row], most: int, enough: Callable[[Row], bool] = lambda row: False
) -> tuple[list[Row], Iterator[Row]]:
    """The first rows, up to one that is enough, and all rows: where they break off stays the last that is reported.

    Raises:
        UserError: it cannot be read, and no row comes before that.
    """
    first: list[Row] = []
    broken_off: UserError | None = None
    try:
        for row in islice(rows, most):
            first.append(row)
            if enough(row):
                break
    except UserError as error:
        if not first:
            raise
        broken_off = error

    def all_rows() -> Iterator[Row]:
        yield from first
        if broken_off is not None:
            raise broken_off
        yield from rows

    return first, all_rows()


def stream_rows(
    path: Path, *, required: Sequence[str] = (), progress: BytesRead | None = None, pipes: bool = True
) -> Iterator[Row]:
    """The rows of a file, whose suffix says what it holds.

    A .csv or .tsv file must have the columns `required`. `pipes`: a pipe will do, which can be read only once.

    Raises:
        UserError: it cannot be read, or not further: it is damaged, not UTF-8, not JSON, not CSV.
        DataError: its header is wrong.
    """
    suffix = data_suffix(path)
    if suffix not in SUFFIXES:
        found = suffix or f"no suffix{f' before {path.suffix}' if path.suffix else ''}"
        hint = f"use {', '.join(SUFFIXES)}, perhaps with {', '.join(COMPRESSIONS)} behind"
        raise UserError(f"{path}: {found} is not a kind of data file", hint)
    if suffix == TAR_SUFFIX:
        from llama_acc.core.data.tar_shards import tar_rows  # imports Pillow

        with _opened(path, pipes=False):  # that it is there, and no pipe
            yield from map(Row._make, tar_rows(path))
    elif suffix == PARQUET_SUFFIX:
        with _opened(path, pipes=False) as (stream, _), _seekable(stream, str(path)) as content:
            yield from map(Row._make, parquet_rows(path, content, JSON.decode))
    else:
        quoted = suffix != ".tsv" or _is_quoted(path)
        with _opened(path, pipes) as (stream, file):
            yield from _rows(stream, str(path), suffix, required, quoted, _reporting(progress, file))


def stream_rows_from(
    stream: IO[bytes],
    name: str,
    suffix: str | None = None,
    *,
    required: Sequence[str] = (),
    progress: BytesRead | None = None,
) -> Iterator[Row]:
    """The rows in a stream of bytes, such as standard input, called `name`; see `stream_rows`. It is closed at the end.

    `suffix` is one of `SUFFIXES`, or None: JSON if it begins so, else CSV.
    """
    yield from _rows(stream, name, suffix, required, suffix != ".tsv", _reporting(progress, stream))


def _reporting(progress: BytesRead | None, file: IO[bytes]) -> Callable[[], None]:
    return (lambda: progress(file.tell())) if progress is not None and file.seekable() else lambda: None


def data_suffix(path: Path) -> str:
    """What the name says of the content, in lower case: ".json" for a.json and a.JSON.gz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()


def unreadable(path: Path, error: OSError) -> UserError:
    """Why a data file cannot be read, and what is there instead."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"there is no data file {path}", nearest_names(path))
    return UserError(f"cannot read {path}: {error.strerror or error}")


def nearest_names(path: Path) -> str | None:
    """What is there under a name like `path`'s, or under that name with another ending, as a hint."""
    try:
        names = [file.name for file in path.parent.iterdir() if not file.name.startswith(".")]
    except OSError:
        return f"there is no folder {path.parent}"
    stems = {Path(name).stem: name for name in reversed(names)}
    near = difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.8)
    return did_you_mean(path.name, names) or (f"did you mean {stems[near[0]]!r}?" if near else None)


@contextmanager
def _opened(path: Path, pipes: bool = True) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of a file, that of a zip archive's only member, and the file itself."""
    with ExitStack() as stack:
        try:
            file: Any = stack.enter_context(open_input(path, pipes=pipes))
            begin = file.read(50) if file.seekable() else b""
            if file.seekable():
                file.seek(0)
        except OSError as error:
            raise unreadable(path, error) from error
        if begin.startswith(_POINTER):
            raise UserError(f"{path} is a Git LFS pointer, not the file itself", "run git lfs pull, or download it")
        if _PAGE.match(begin) and data_suffix(path) not in PLAIN_SUFFIXES:
            raise UserError(f"{path} is a web page, not data", "download the file that the page shows")
        yield _only_member(file, path, stack) if begin.startswith(_ZIP) else file, file


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


def _rows(
    stream: Any, name: str, suffix: str | None, required: Sequence[str], quoted: bool, report: Callable[[], None]
) -> Iterator[Row]:
    content: Any = None
    try:
        content = _unpacked(stream)
        if suffix in (None, ".jsonl"):
            begin = content.peek(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
            is_json = _ARRAY.match(begin) if suffix else begin.startswith((b"[", b"{"))
            suffix = ".json" if is_json else suffix or ".csv"
        text = _text(content, suffix)
        if suffix == ".json":
            rows = _json_rows(text, name)
        elif suffix == ".jsonl":
            rows = _jsonl_rows(_lines(text, name), name)
        elif suffix in PLAIN_SUFFIXES:
            rows = _blocks(text)
        else:
            rows = _table_rows(_lines(text, name), name, "\t" if suffix == ".tsv" else None, required, quoted)
        for number, row in enumerate(rows):
            if number % _ROWS_BETWEEN_REPORTS == 0:
                report()
            yield row
        report()
    except UnicodeDecodeError as error:
        known, place = "UTF-16" if error.object.startswith(_UTF16) else "ENCODING", ""
        if stream.seekable():
            # What was to be decoded ends where the content stands.
            offset = content.tell() - len(error.object) + error.start
            stream.seek(0)
            place = f": byte {offset} (line {_line_at(_unpacked(stream), offset)}) cannot be decoded"
        hint = f"make it UTF-8: iconv -f {known} -t UTF-8 < FILE > NEW"
        raise UserError(f"{name} is not UTF-8{place}", hint) from error
    except (OSError, *_DAMAGED) as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> UserError:
    if isinstance(error, _DAMAGED):
        hint = "it may not have been copied or downloaded to its end"
        return UserError(f"{name} is damaged: {error}", hint)
    return UserError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}")


@contextmanager
def _seekable(stream: Any, name: str) -> Iterator[IO[bytes]]:
    """The content of a stream, unpacked into a temporary file if it is packed.

    What is called `.parquet.gz` may also be a Parquet file that is packed inside, as pandas' examples are.
    """
    content = _unpacked(stream)
    if isinstance(content, io.BufferedReader) and not isinstance(stream, zipfile.ZipExtFile):
        yield content
        return
    with TemporaryFile() as file:
        try:
            shutil.copyfileobj(content, file, BLOCK)
            file.seek(0)
        except (OSError, *_DAMAGED) as error:
            raise _damaged(name, error) from error
        yield file


def _line_at(content: Any, offset: int) -> int:
    """The number of the line, from 1, that the byte at an offset is in."""
    line = 1
    while offset and (block := content.read(min(offset, BLOCK))):
        line += block.count(b"\n")
        offset -= len(block)
    return line


def _unpacked(stream: Any) -> Any:
    """The content of a stream that may be gzip or Zstandard, whatever its name says."""
    buffered = io.BufferedReader(stream, BLOCK)
    begin = buffered.peek(4)
    if begin.startswith(_GZIP):
        return gzip.GzipFile(fileobj=buffered)
    return ZstdFile(buffered) if _ZSTD.match(begin) else buffered


def _text(content: Any, suffix: str) -> io.TextIOWrapper:
    # Not all that splitlines() breaks at: a JSON text may hold U+2028 and the like, or a lone CR between its tokens.
    return io.TextIOWrapper(content, "utf-8-sig", newline="\n" if suffix in (".json", ".jsonl") else "")


def _lines(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    """Lines with their ends."""
    while line := text.readline(MAX_ITEM + 1):
        if len(line) > MAX_ITEM:
            raise UserError(f"{name}: a line is longer than {MAX_ITEM >> 20} Mi characters")
        yield line


def _blocks(text: io.TextIOWrapper) -> Iterator[Row]:
    block = text.read(BLOCK)
    while True:
        yield Row("item 1", {"text": block})
        if not (block := text.read(BLOCK)):
            return


def _json_rows(text: io.TextIOWrapper, name: str) -> Iterator[Row]:
    ahead: list[str] = []
    while not (ahead and ahead[-1].strip()):
        if not (piece := text.readline(BLOCK)):
            raise UserError(f"{name} is empty")
        ahead.append(piece)
    if ahead[-1].lstrip().startswith("["):
        pieces = chain(ahead, iter(lambda: text.read(BLOCK), ""))
        for number, value in enumerate(array_items(pieces, name), start=1):
            yield Row(f"item {number}", value)
        return
    lines = _lines(text, name)
    if not ahead[-1].endswith("\n"):
        ahead[-1] += next(lines, "")
    try:
        first = _value_of(ahead[-1])
    except (RecursionError, ValueError):
        found = "not a whole value"
    else:
        found = type_name(first)
    if found != "an object":
        message = f"{name} should hold an array of items, or an object in each line, but line {len(ahead)} is {found}"
        raise UserError(message)
    yield from _jsonl_rows(chain(ahead, lines), name)


Block = tuple[bytes, bytes | range]
"""Some rows of a JSON file, and what stands around them in `%`: which bytes of the file they are, or, of one that is
packed, the bytes themselves."""


def json_blocks(path: Path, progress: BytesRead | None = None) -> Iterator[Block]:
    """A JSON file in blocks for `rows_in_block`.

    Nothing is parsed. An array is cut where an object begins as its first one does. If that object was within an item,
    no JSON is on either side of the cut: the block is wrong.
    """
    try:
        with _opened(path, pipes=False) as (stream, file):
            content, report = _unpacked(stream), _reporting(progress, file)
            is_packed = stream is not file or not isinstance(content, io.BufferedReader)
            buffer = content.read(_BLOCK_OF_ROWS).removeprefix(codecs.BOM_UTF8)
            array = _ARRAY.match(buffer)
            buffer = buffer[array.start(1) :] if array else buffer
            begin, cut = 0 if is_packed else content.tell() - len(buffer), 0
            while more := content.read(_BLOCK_OF_ROWS):
                report()
                buffer += more
                cut = buffer.rfind(array[1] if array else b"\n")
                block = buffer[:cut].rstrip(b" \t\r\n")
                if cut > 0 and (not array or block.endswith(b",")):
                    block = block[:-1] if array else block
                    rows = block if is_packed else range(begin, begin + len(block))
                    buffer, block, begin = buffer[cut:], b"", begin + cut  # in memory once
                    yield b"[%b]" if array else b"%b", rows
                elif len(buffer) > _LONGEST_BLOCK:
                    yield b"%b", b""  # wrong: to be read row by row
                    return
            report()
            if buffer.strip() or not cut:  # of an empty file, too, which is wrong
                yield b"[%b" if array else b"%b", buffer if is_packed else range(begin, begin + len(buffer))
    except (OSError, *_DAMAGED) as error:
        raise _damaged(str(path), error) from error


def rows_in_block(path: Path, around: bytes, block: bytes | range) -> Iterable[Row]:
    """The rows of a block, without their places in the file; raises UserError where it is wrong."""
    if isinstance(block, range):
        with _opened(path) as (_, file), io.BufferedReader(cast(io.FileIO, file)) as content:
            content.seek(block.start)
            block = content.read(len(block))
    text = around % block
    if around != b"%b":
        try:
            return [Row("", value) for value in _decode(text)]
        except (msgspec.DecodeError, RecursionError):
            pass
    return stream_rows_from(io.BytesIO(text), "", ".jsonl" if around == b"%b" else ".json")


def _jsonl_rows(lines: Iterator[str], name: str) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(lines, start=1):
        line = line.removesuffix("\n")
        if not line.strip():
            continue
        number += 1
        where = f"item {number} (line {line_number})"
        try:
            yield Row(where, _value_of(line))
        except json.JSONDecodeError as error:
            yield Row(f"{where}, column {error.colno}", line[:_SHOWN], f"not JSON: {error.msg}")
        except (RecursionError, ValueError) as error:
            yield Row(where, line[:_SHOWN], f"not JSON that can be read: {error}")
    if not number:
        raise UserError(f"{name} is empty")


def _value_of(line: str) -> Any:
    """What `json.loads` gives, four times as fast where msgspec takes it; it refuses a little more, never less."""
    try:
        return _decode(line)
    except (msgspec.DecodeError, RecursionError):
        return JSON.decode(line)


def _table_rows(
    lines: Iterator[str], name: str, delimiter: str | None, required: Sequence[str], quoted: bool
) -> Iterator[Row]:
    csv.field_size_limit(MAX_ITEM)
    begin, header = next(((number, line) for number, line in enumerate(lines, 1) if line.strip()), (0, ""))
    if not header:
        raise UserError(f"{name} is empty")
    # Where a comma stands in numbers, spreadsheets put semicolons between cells.
    delimiter = delimiter or next((mark for mark in "\t,;" if mark in header), ",")
    records = _records(chain([header], lines), delimiter, quoted, begin)
    _, cells, problem, _ = next(records)
    if problem:
        raise UserError(f"{name}: line {begin}: {problem}")
    names = [cell.strip() for cell in cells]
    _check_header(name, names, required)
    for number, (line, cells, problem, _) in enumerate(records, start=1):
        where = f"item {number} (line {line})"
        if not problem and len(cells) != len(names):
            problem = f"{count_text(len(cells), 'cell')}, but the header has {len(names)}"
        if problem:
            yield Row(where, cells, problem)
            continue
        if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
            _logger.warning("%s: %s: a cell in quotes holds tabs and line ends: is it more than one row?", name, where)
        yield Row(where, dict(zip(names, cells, strict=True)))


_Record = tuple[int, list[str], str, list[str]]
"""A row of a table: the number of its first line, its cells, why it cannot be read, or "", and its lines."""


def _records(lines: Iterator[str], delimiter: str, quoted: bool, begin: int = 1) -> Iterator[_Record]:
    """The rows of a table that are not blank.

    A row with a quote out of place is read with \\" for "" where that makes it whole. Otherwise it ends before the
    next line that is a row by itself, so that it costs no others.
    """
    width = 0
    ahead: deque[str] = deque()
    taken: list[str] = []  # the lines that the row in question may take

    def feed(escaped: bool) -> Iterator[str]:
        for number in count():
            if number == len(taken):
                if not (line := ahead.popleft() if ahead else next(lines, "")):
                    return
                taken.append(line)
            yield taken[number].replace('\\"', '""') if escaped else taken[number]

    def parse(escaped: bool) -> tuple[list[str] | None, int, str]:
        """The row's cells, how many lines it takes, and what is wrong; None at the end."""
        reader = _reader(feed(escaped), delimiter, quoted)
        try:
            return next(reader, None), reader.line_num, ""
        except csv.Error as error:
            return [], reader.line_num, str(error)

    while True:
        cells, used, problem = parse(escaped=False)
        if cells is None:
            return
        if (problem or len(cells) != width) and any('\\"' in line for line in taken):
            again, used_again, wrong = parse(escaped=True)
            if again and not wrong and len(again) == (width or len(again)):
                cells, used, problem = again, used_again, ""
        if problem:
            rest = enumerate(islice(feed(escaped=False), 1, None), start=1)
            used = next((number for number, line in rest if _is_row(line, delimiter, width)), len(taken))
            others = f"; up to line {begin + used - 1} no line is a row" if used > 1 else ""
            yield begin, [taken[0][:_SHOWN]], f"not CSV: {problem}{others}", taken[:used]
        elif cells and (len(cells) > 1 or width <= 1 or cells[0].strip()):  # no line of spaces
            width = width or len(cells)
            yield begin, cells, "", taken[:used]
        begin += used
        ahead.extendleft(reversed(taken[used:]))
        taken.clear()


def _reader(lines: Iterator[str], delimiter: str, quoted: bool = True) -> Any:
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)


def _is_row(line: str, delimiter: str, width: int) -> bool:
    """Whether a line is a row by itself, and so none of the inside of a cell."""
    try:
        cells: list[str] = next(_reader(iter([line]), delimiter), [])
    except csv.Error:
        return False
    return len(cells) == width and not any('"' in cell for cell in cells)


def _is_quoted(path: Path) -> bool:
    """Whether quotes in a .tsv file stand around cells, as in a .csv file, and are none of the text.

    They do if the whole file can be read so without making one row of several. A pipe can be read only once: no.
    """
    if not path.is_file():
        return False
    tabs = 0
    with _opened(path) as (stream, _):
        try:
            for _, cells, problem, taken in _records(_lines(_text(_unpacked(stream), ".tsv"), str(path)), "\t", True):
                tabs = tabs or len(cells) - 1
                if problem or (len(taken) > 1 and all(line.count("\t") == tabs for line in taken)):
                    return False
        except (UnicodeDecodeError, OSError, *_DAMAGED):
            pass  # which is reported when its rows are read
    return True


def _check_header(name: str, names: list[str], required: Sequence[str]) -> None:
    if "caption" in names or "text" in names:  # LLaMA2-Accessory's captions, url and caption; plain text
        required = ()
    problems = []
    for column in required:
        if column not in names:
            near = [n for n in names if difflib.get_close_matches(n.lower(), [column.lower()], cutoff=0.6)]
            problems.append(f"{name}: line 1: no column {column!r}" + (f" ({near[0]!r}?)" if near else ""))
    problems += [f"{name}: line 1: column {n!r} twice" for n in sorted(set(names)) if names.count(n) > 1]
    if problems:
        hint = f"found: {', '.join(names)}"
        if required:
            hint = f"it should have {', '.join(required)}; {hint}"
            if mapping := mapping_of(dict.fromkeys(names, "text")):
                command = f"llama-acc convert-data csv {shlex.quote(name)} {mapping_words(mapping)} --output NEW.jsonl"
                hint += f"; others have to be mapped: {command}"
        raise DataError(problems, hint)
