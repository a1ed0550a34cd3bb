"""The rows of data files, one at a time, in memory for one of them.

Read are `.json` (an array; or JSON lines under that name, as APIBench has it), `.jsonl`, `.csv` and `.tsv`, each of
them perhaps compressed (`.gz`, `.zst`, `.zip`), from a file or any stream of bytes; `.parquet`; and `.tar`, shards of
pictures with texts.
A row is whatever JSON value stands there, or the cells by their columns; what it should look like is for others to say.
"""

import codecs
import csv
import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from llama_acc.core.data.files import BytesRead, DataStream, data_suffix, open_data
from llama_acc.core.data.json_array import JSON, MAX_ITEM, JsonBuffer
from llama_acc.core.data.keys import mapping_of, mapping_words
from llama_acc.core.data.parquet import PARQUET_SUFFIX, parquet_rows
from llama_acc.core.data.tar_shards import TAR_SUFFIX, tar_rows
from llama_acc.core.errors import DataError, UserError
from llama_acc.core.units import count_text

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", PARQUET_SUFFIX, TAR_SUFFIX)

_SHOWN = 200
"""Characters of a line that is not JSON that are kept to show."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # its byte order marks
_decode = msgspec.json.Decoder().decode
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r|\Z)")


class Row(NamedTuple):
    """One row of a file."""

    where: str
    """Its place: "item 17", or "item 17 (line 230)"."""
    value: Any
    problem: str | None = None
    """Why this row alone cannot be read; its value is then what stands there, or the beginning of it."""


def stream_rows(path: Path, *, required: Sequence[str] = (), progress: BytesRead | None = None) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: what it holds is found by its suffix.
        required: columns that a .csv or .tsv file must have.
        progress: told how many bytes have been read.

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
    with open_data(path, progress) as stream:
        yield from _rows(stream, suffix, required)


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
        progress: told how many bytes have been read.
    """
    yield from _rows(DataStream(stream, name, progress), suffix, required)


def looked_ahead(
    rows: Iterator[Row], most: int, enough: Callable[[Row], bool] = lambda row: False
) -> tuple[list[Row], Iterator[Row]]:
    """The first rows, up to one that is enough, and all rows: where they break off stays the last that is told.

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


def type_name(value: Any) -> str:
    """What a JSON value is, as people call it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def _rows(stream: DataStream, suffix: str | None, required: Sequence[str]) -> Iterator[Row]:
    begin, chunks = _begin(_decoded(stream), stream.name)
    if suffix is None:
        suffix = ".json" if begin in "[{" else ".csv"
    if suffix == ".json":
        return _json_rows(stream.name, chunks)
    if suffix == ".jsonl":
        return _jsonl_rows(stream.name, chunks)
    return _csv_rows(stream.name, chunks, "\t" if suffix == ".tsv" else None, required)


def _decoded(stream: DataStream) -> Iterator[str]:
    """The text, without a byte order mark."""
    offset, line, pending = 0, 1, b""
    while True:
        block = stream.read()
        data = pending + block
        try:
            text, used = codecs.utf_8_decode(data, "strict", not block)
        except UnicodeDecodeError as error:
            line += data.count(b"\n", 0, error.start)
            place = f"byte {offset + error.start} (line {line})"
            known = "UTF-16" if offset == 0 and data.startswith(_UTF16) else "ENCODING"
            hint = f"make it UTF-8: iconv -f {known} -t UTF-8 < FILE > NEW"
            raise UserError(f"{stream.name} is not UTF-8: {place} cannot be decoded", hint) from error
        yield text.removeprefix("\ufeff") if offset == 0 else text
        if not block:
            return
        offset, line, pending = offset + used, line + data.count(b"\n", 0, used), data[used:]


def _begin(chunks: Iterator[str], name: str) -> tuple[str, Iterator[str]]:
    """The first character that is no white space, and the whole text."""
    before: list[str] = []
    for chunk in chunks:
        before.append(chunk)
        if begin := chunk.lstrip()[:1]:
            return begin, chain(before, chunks)
    raise UserError(f"{name} is empty")


def _json_rows(name: str, chunks: Iterator[str]) -> Iterator[Row]:
    buffer = JsonBuffer(chunks, name)
    if buffer.next_character() == "[":
        for number, value in enumerate(buffer.array(), start=1):
            yield Row(f"item {number}", value)
        return
    value, follows = buffer.whole_value()
    if follows is not None and isinstance(value, dict):
        line, text = buffer.rest()
        yield from _jsonl_rows(name, text, line)  # JSON lines under another name
        return
    if follows is not None:
        raise buffer.extra_data(follows)
    keys = f" with the keys {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) else ""
    hint = "one item per line is .jsonl" if isinstance(value, dict) else None
    raise UserError(f"{name} should hold an array of items, but holds {type_name(value)}{keys}", hint)


def _jsonl_rows(name: str, chunks: Iterator[str], first_line: int = 1) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(_lines(chunks, name), start=first_line):
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


def _value_of(line: str) -> Any:
    """What `json.loads` gives, four times as fast where msgspec takes it; it refuses a little more, never less."""
    try:
        return _decode(line)
    except (msgspec.DecodeError, RecursionError):
        return JSON.decode(line)


def _lines(chunks: Iterator[str], name: str) -> Iterator[str]:
    # Not splitlines(): a JSON text may hold U+2028 and the like unescaped.
    unfinished: list[str] = []
    length = 0
    for chunk in chunks:
        first, *others = chunk.split("\n")
        unfinished.append(first)
        length += len(first)
        if length > MAX_ITEM:
            raise UserError(f"{name}: a line is longer than {MAX_ITEM >> 20} Mi characters", "an array is .json")
        if others:
            yield "".join(unfinished)
            yield from others[:-1]
            unfinished, length = [others[-1]], len(others[-1])
    yield "".join(unfinished)


def _csv_rows(name: str, chunks: Iterator[str], delimiter: str | None, required: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(MAX_ITEM)
    lines = _csv_lines(chunks, name)
    header = next(lines)
    # Where a comma stands in numbers, spreadsheets put semicolons between cells.
    delimiter = delimiter or next((mark for mark in "\t,;" if mark in header), ",")
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader)]
        _check_header(name, names, required)
        yield from _csv_items(reader, names)
    except csv.Error as error:
        raise UserError(f"{name}: line {reader.line_num}: not CSV: {error}") from error


def _csv_lines(chunks: Iterator[str], name: str) -> Iterator[str]:
    """Lines with their ends, which are LF, CR LF or CR; csv.reader puts those of a quoted cell together again."""
    unfinished: list[str] = []
    length = 0
    for chunk in chunks:
        unfinished.append(chunk)
        length += len(chunk)
        if length - len(chunk) > MAX_ITEM:
            raise UserError(f"{name}: a line is longer than {MAX_ITEM >> 20} Mi characters")
        if "\n" not in chunk and "\r" not in chunk and not unfinished[0].endswith("\r"):
            continue  # the line goes on: put together once, when its end has come
        # A CR at the end may be half of a CR LF, so the last line always waits for more.
        *whole, rest = _split_keeping_ends("".join(unfinished))
        yield from whole
        unfinished, length = [rest], len(rest)
    yield "".join(unfinished)


def _split_keeping_ends(text: str) -> list[str]:
    if "\r" not in text:
        *whole, last = text.split("\n")
        return [line + "\n" for line in whole] + [last]
    pieces = _LINE.findall(text)  # and an empty one for the end
    return pieces if text.endswith("\n") else pieces[:-1]


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


def _csv_items(reader: Any, names: list[str]) -> Iterator[Row]:
    number = 0
    begin = reader.line_num + 1
    for cells in reader:
        line, begin = begin, reader.line_num + 1  # a quoted cell may span lines
        if not cells or (len(cells) == 1 < len(names) and not cells[0].strip()):
            continue
        number += 1
        where = f"item {number} (line {line})"
        if len(cells) != len(names):
            yield Row(where, cells, f"{count_text(len(cells), 'cell')}, but the header has {len(names)}")
        else:
            yield Row(where, dict(zip(names, cells, strict=True)))
