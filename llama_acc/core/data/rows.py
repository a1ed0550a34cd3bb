"""The rows of data files, one at a time, in memory for one of them.

Read are `.json` (an array; or JSON lines under that name, as APIBench has it), `.jsonl`, `.csv` and `.tsv`, each of
them perhaps compressed (`.gz`, `.zst`, `.zip`), from a file or any stream of bytes; `.parquet`; and `.tar`, shards of
pictures with texts.
A row is whatever JSON value stands there, or the cells by their columns; what it should look like is for others to say.
"""

import codecs
import contextlib
import csv
import difflib
import io
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from llama_acc.core.data.files import BLOCK, BytesRead, DataStream, data_suffix, open_data
from llama_acc.core.data.items import mapping_of, mapping_words, type_name
from llama_acc.core.data.json_array import JSON, MAX_ITEM, array_items
from llama_acc.core.data.parquet import PARQUET_SUFFIX, parquet_rows
from llama_acc.core.data.tar_shards import TAR_SUFFIX, tar_rows
from llama_acc.core.errors import DataError, UserError
from llama_acc.core.units import count_text

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", PARQUET_SUFFIX, TAR_SUFFIX)

_SHOWN = 200
"""Characters of a line that is not JSON that are kept to show."""
_TRIED = 32
"""Blocks of a file that is no array of which it is said what they are instead."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # its byte order marks
_decode = msgspec.json.Decoder().decode
_logger = logging.getLogger("llama_acc")


class Row(NamedTuple):
    """One row of a file."""

    where: str
    """Its place: "item 17", or "item 17 (line 230)"."""
    value: Any
    problem: str | None = None
    """Why this row alone cannot be read; its value is then what stands there, or the beginning of it."""


def stream_rows(
    path: Path, *, required: Sequence[str] = (), progress: BytesRead | None = None, pipes: bool = True
) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: what it holds is found by its suffix.
        required: columns that a .csv or .tsv file must have.
        progress: called with how many bytes have been read.
        pipes: whether a pipe will do, which can be read only once.

    Raises:
        UserError: it cannot be read, or not further: it is damaged, not UTF-8, not JSON, not CSV.
        DataError: its header is wrong.
    """
    suffix = data_suffix(path)
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: {suffix or 'no suffix'} is not a kind of data file", f"use {', '.join(SUFFIXES)}")
    if suffix == TAR_SUFFIX:
        yield from (Row(*row) for row in tar_rows(path))
        return
    if suffix == PARQUET_SUFFIX:
        yield from (Row(*row) for row in parquet_rows(path))
        return
    quoted = suffix != ".tsv" or _is_quoted(path)
    with open_data(path, progress, pipes=pipes) as stream:
        yield from _rows(stream, suffix, required, quoted)


def stream_rows_from(
    stream: IO[bytes],
    name: str,
    suffix: str | None = None,
    *,
    required: Sequence[str] = (),
    progress: BytesRead | None = None,
) -> Iterator[Row]:
    """The rows in a stream of bytes, such as standard input; see `stream_rows`.

    Args:
        stream: open for reading.
        name: for messages.
        suffix: one of `SUFFIXES`, or None: JSON if it begins so, else CSV.
        required: columns that CSV must have.
        progress: called with how many bytes have been read.
    """
    yield from _rows(DataStream(stream, name, progress), suffix, required, quoted=suffix != ".tsv")


def looked_ahead(
    rows: Iterator[Row], most: int, enough: Callable[[Row], bool] = lambda row: False
) -> tuple[list[Row], Iterator[Row]]:
    """The first rows, up to one that is enough, and all rows: where they break off stays the last that is reported.

    Raises:
        UserError: it cannot be read, and no row comes before that.
    """
    first: list[Row] = []
    try:
        for row in islice(rows, most):
            first.append(row)
            if enough(row):
                break
    except UserError as error:
        if not first:
            raise
        rows = _broken_off(error)
    return first, chain(first, rows)


def _broken_off(error: UserError) -> Iterator[Row]:
    yield from ()
    raise error


def _rows(stream: DataStream, suffix: str | None, required: Sequence[str], quoted: bool = True) -> Iterator[Row]:
    if suffix is None:
        suffix = ".json" if stream.peek().removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"[", b"{") else ".csv"
    text = _text(stream, suffix)
    if suffix == ".json":
        return _json_rows(text, stream)
    lines = _lines(text, stream)
    if suffix == ".jsonl":
        return _jsonl_rows(stream.name, lines)
    return _csv_rows(stream.name, lines, "\t" if suffix == ".tsv" else None, required, quoted)


def _text(stream: DataStream, suffix: str) -> io.TextIOWrapper:
    # Not all that splitlines() breaks at: a JSON text may hold U+2028 and the like, or a lone CR between its tokens.
    return io.TextIOWrapper(stream, "utf-8-sig", newline="\n" if suffix in (".json", ".jsonl") else "")


def _pieces(text: io.TextIOWrapper, stream: DataStream) -> Iterator[str]:
    with _decoding(stream):
        yield from iter(lambda: text.read(BLOCK), "")


def _lines(text: io.TextIOWrapper, stream: DataStream) -> Iterator[str]:
    """Lines with their ends."""
    with _decoding(stream):
        while line := text.readline(MAX_ITEM + 1):
            if len(line) > MAX_ITEM:
                raise UserError(f"{stream.name}: a line is longer than {MAX_ITEM >> 20} Mi characters")
            yield line


@contextlib.contextmanager
def _decoding(stream: DataStream) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        # What was to be decoded ends where the stream stands.
        offset = stream.count - len(error.object) + error.start
        line = 1 + stream.line_ends - error.object.count(b"\n", error.start)
        known = "UTF-16" if error.object.startswith(_UTF16) and offset == 0 else "ENCODING"
        hint = f"make it UTF-8: iconv -f {known} -t UTF-8 < FILE > NEW"
        message = f"{stream.name} is not UTF-8: byte {offset} (line {line}) cannot be decoded"
        raise UserError(message, hint) from error


def _json_rows(text: io.TextIOWrapper, stream: DataStream) -> Iterator[Row]:
    head, lines = "", _lines(text, stream)
    with _decoding(stream):
        while not head.strip() and (piece := text.readline(BLOCK)):
            head += piece
    if not head.strip():
        raise _empty(stream.name)
    first = head.lstrip()
    if first.startswith("["):
        for number, value in enumerate(array_items(chain([head], _pieces(text, stream)), stream.name), start=1):
            yield Row(f"item {number}", value)
        return
    line_number = 1 + head.removesuffix(first).count("\n")
    if not first.endswith("\n"):
        first += next(lines, "")
    ahead = [first]
    for line in lines:
        ahead.append(line)
        if line.strip():
            # JSON lines under another name, or a value over several lines.
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(_value_of(first), dict):
                    yield from _jsonl_rows(stream.name, chain(ahead, lines), line_number)
                    return
            break
    begin = "\n" * (line_number - 1) + "".join(ahead) + "".join(islice(_pieces(text, stream), _TRIED))
    raise _no_array(stream.name, begin)


def _no_array(name: str, text: str) -> UserError:
    """Why a text is no array of items."""
    try:
        value = JSON.decode(text)
    except json.JSONDecodeError as error:
        return UserError(f"{name} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}")
    except (RecursionError, ValueError) as error:
        return UserError(f"{name} is not JSON that can be read: {error}")
    keys = f" with the keys {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) else ""
    hint = "one item per line is .jsonl" if isinstance(value, dict) else None
    return UserError(f"{name} should hold an array of items, but holds {type_name(value)}{keys}", hint)


def _jsonl_rows(name: str, lines: Iterator[str], first_line: int = 1) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(lines, start=first_line):
        line = line.removesuffix("\n")
        if not line.strip():
            continue
        number += 1
        where = f"item {number} (line {line_number})"
        try:
            yield Row(where, _value_of(line))
        except json.JSONDecodeError as error:
            hint = " (an array over several lines is .json)" if number == 1 and line.lstrip().startswith("[") else ""
            yield Row(f"{where}, column {error.colno}", line[:_SHOWN], f"not JSON: {error.msg}{hint}")
        except (RecursionError, ValueError) as error:
            yield Row(where, line[:_SHOWN], f"not JSON that can be read: {error}")
    if not number:
        raise _empty(name)


def _value_of(line: str) -> Any:
    """What `json.loads` gives, four times as fast where msgspec takes it; it refuses a little more, never less."""
    try:
        return _decode(line)
    except (msgspec.DecodeError, RecursionError):
        return JSON.decode(line)


def _empty(name: str) -> UserError:
    return UserError(f"{name} is empty")


def _csv_rows(
    name: str, lines: Iterator[str], delimiter: str | None, required: Sequence[str], quoted: bool
) -> Iterator[Row]:
    csv.field_size_limit(MAX_ITEM)
    begin, header = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (0, ""))
    if not header:
        raise _empty(name)
    # Where a comma stands in numbers, spreadsheets put semicolons between cells.
    delimiter = delimiter or next((mark for mark in "\t,;" if mark in header), ",")
    records = _records(chain([header], lines), delimiter, quoted, begin)
    _, cells, problem = next(records)
    if problem:
        raise UserError(f"{name}: line {begin}: {problem}")
    names = [cell.strip() for cell in cells]
    _check_header(name, names, required)
    for number, (line, cells, problem) in enumerate(records, start=1):
        where = f"item {number} (line {line})"
        if problem:
            yield Row(where, cells, problem)
        elif len(cells) != len(names):
            yield Row(where, cells, f"{count_text(len(cells), 'cell')}, but the header has {len(names)}")
        else:
            if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                _logger.warning(
                    "%s: %s: a cell in quotes holds tabs and line ends: is it more than one row?", name, where
                )
            yield Row(where, dict(zip(names, cells, strict=True)))


def _records(lines: Iterator[str], delimiter: str, quoted: bool, begin: int) -> Iterator[tuple[int, list[str], str]]:
    """The rows of a table that are not blank: the number of the line, the cells, and why they cannot be read, or "".

    A row with a quote out of place is read with \\" for "" where that makes it whole. Otherwise it ends before the
    next line that is a row by itself, so that it costs no others.
    """
    width = 0
    ahead: deque[str] = deque()

    def rest() -> Iterator[str]:
        while line := ahead.popleft() if ahead else next(lines, ""):
            yield line

    def next_row(escaped: bool = False) -> tuple[list[str] | None, list[str], str]:
        """Its cells, the lines it takes, and what is wrong; None at the end."""
        taken: list[str] = []

        def feed() -> Iterator[str]:
            for line in rest():
                taken.append(line)
                yield line.replace('\\"', '""') if escaped else line

        try:
            return next(_reader(feed(), delimiter, quoted), None), taken, ""
        except csv.Error as error:
            return [], taken, str(error)

    while True:
        cells, taken, problem = next_row()
        if cells is None:
            return
        if (problem or len(cells) != width) and any('\\"' in line for line in taken):
            ahead.extendleft(reversed(taken))
            escaped, taken_escaped, wrong = next_row(escaped=True)
            if escaped and not wrong and len(escaped) == (width or len(escaped)):
                cells, taken, problem = escaped, taken_escaped, ""
            else:
                ahead.extendleft(reversed(taken_escaped))
                for _ in taken:
                    ahead.popleft()
        line, begin = begin, begin + len(taken)
        if problem:
            ahead.extendleft(reversed(taken[1:]))
            begin = line + 1
            for following in rest():
                if _is_row(following, delimiter, width):
                    ahead.appendleft(following)
                    break
                begin += 1
            others = f"; up to line {begin - 1} no line is a row" if begin > line + 1 else ""
            yield line, [taken[0][:_SHOWN]], f"not CSV: {problem}{others}"
        elif cells and (len(cells) > 1 or width <= 1 or cells[0].strip()):  # no line of spaces
            width = width or len(cells)
            yield line, cells, ""


def _reader(lines: Iterable[str], delimiter: str, quoted: bool = True) -> Any:
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)


def _is_row(line: str, delimiter: str, width: int) -> bool:
    """Whether a line is a row by itself, and so none of the inside of a cell."""
    try:
        cells: list[str] = next(_reader([line], delimiter), [])
    except csv.Error:
        return False
    return len(cells) == width and not any('"' in cell for cell in cells)


def _is_quoted(path: Path) -> bool:
    """Whether quotes in a .tsv file stand around cells, as in a .csv file, and are none of the text.

    They do if the whole file can be read so without making one row of several. A pipe can be read only once: no.
    """
    if not path.is_file():
        return False
    with open_data(path) as stream:
        taken: list[str] = []

        def feed() -> Iterator[str]:
            for line in _lines(_text(stream, ".tsv"), stream):
                taken.append(line)
                yield line

        width = 0
        try:
            for cells in _reader(feed(), "\t"):
                width = width or len(cells)
                if len(taken) > 1 and all(line.count("\t") == width - 1 for line in taken):
                    return False
                taken.clear()
        except csv.Error:
            return False
    return True


def _check_header(name: str, names: list[str], required: Sequence[str]) -> None:
    problems = []
    if "caption" in names:  # LLaMA2-Accessory's captions: url and caption
        required = ()
    for column in required:
        if column not in names:
            near = [n for n in names if difflib.get_close_matches(n.lower(), [column.lower()], cutoff=0.6)]
            problems.append(f"{name}: line 1: no column {column!r}" + (f" ({near[0]!r}?)" if near else ""))
    problems += [f"{name}: line 1: column {n!r} twice" for n in sorted(set(names)) if names.count(n) > 1]
    if problems:
        needed = f"it should have {', '.join(required)}; " if required else ""
        mapping = mapping_of(dict.fromkeys(names, "text")) if required else {}
        others = (
            f"; others have to be mapped: llama-acc convert-data csv FILE {mapping_words(mapping)}" if mapping else ""
        )
        raise DataError(problems, f"{needed}found: {', '.join(names)}{others}")
