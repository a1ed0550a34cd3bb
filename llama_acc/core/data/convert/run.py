"""Rows in, items out: streamed, counted, and every row that gives no item reported with its place."""

import gzip
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from llama_acc.core.atomic import whole_file
from llama_acc.core.data.convert.formats import (
    AUTO,
    Format,
    Options,
    Record,
    Skipped,
    format_of,
    recognize,
    required_columns,
    role_of,
)
from llama_acc.core.data.findings import MOST_PROBLEMS
from llama_acc.core.data.keys import (
    IMAGES,
    PREFERENCE,
    SYSTEM,
    TRAINED,
    Malformed,
    as_list,
    count_unused,
    mapping_of,
    mapping_words,
    type_name,
    unusable,
    unused_keys,
)
from llama_acc.core.data.read import (
    SUFFIXES,
    Block,
    Row,
    data_suffix,
    json_blocks,
    looked_ahead,
    rows_in_block,
    stream_rows,
    stream_rows_from,
    unreadable,
)
from llama_acc.core.data.tools import MESSAGE_KEYS
from llama_acc.core.errors import DataError, RunError, UserError, listed
from llama_acc.core.input_files import open_input
from llama_acc.core.text import count_text
from llama_acc.core.workers import WorkerPool, cores

if sys.version_info >= (3, 14):
    from compression.zstd import CompressionParameter, ZstdFile
else:
    from backports.zstd import CompressionParameter, ZstdFile

STDIN = Path("-")
_LOOKED_AT = 100
"""How many of the first rows may be unreadable before a file's format is found."""
_LARGE = 32 << 20
"""Bytes of a file that is converted in worker processes: below, they take longer to start than they save."""
_GZIP_LEVEL = 5  # 6, the default, takes twice the time for 1 % less
_encode = msgspec.json.Encoder().encode

Progress = Callable[[str, int, int], None]
"""Called with (a file's name, bytes read of it, its size; 0 if it is a pipe)."""


def find_inputs(words: Sequence[str], format: str) -> tuple[list[Path], Path | None]:
    """The files to convert, and where `--data NAME` finds what one download becomes (None: it is something else).

    Words are files, folders, globs, names of downloads, or `-`; without any, it is the download of the format's name.

    Raises:
        UserError: something is not found.
    """
    name = words[0] if len(words) == 1 and _is_download(words[0]) else None
    name = name if words else _download_for(format)
    if name is not None:
        from llama_acc.core.catalogue import converted_file, raw_files

        inputs, output = raw_files(name), converted_file(name)
        # Beside its source it would be read a second time.
        return inputs, None if any(path.parent == output.parent for path in inputs) else output
    if list(words).count("-") > 1:
        raise UserError("standard input (-) can be read only once")
    return list(chain.from_iterable(map(_files, words))), None


def _files(word: str) -> list[Path]:
    path = Path(word).expanduser()
    if word == "-" or (path.exists() and not path.is_dir()):
        return [path]  # whatever its name ends in
    from llama_acc.core.catalogue import raw_files
    from llama_acc.core.data.sources import data_files

    return raw_files(word) if _is_download(word) else data_files(path)


def _is_download(word: str) -> bool:
    if word == "-" or Path(word).exists():
        return False
    from llama_acc.core.catalogue import catalogue  # most words are files, and need none of what it imports

    return word in catalogue()


def _download_for(format: str) -> str:
    """The download of a format: the one of its name, or the only one there is in it."""
    from llama_acc.core.catalogue import catalogue

    entries = catalogue()
    if format in entries:
        return format
    names = [name for name, entry in entries.items() if entry.convert == format and format != AUTO]
    here = [name for name in names if entries[name].is_here]
    if len(here) == 1:
        return here[0]
    if here:
        raise UserError(f"several downloads are in the format {format}: {', '.join(here)}", "name one of them")
    if names:
        orders = " or ".join(f"llama-acc download {name}" for name in names)
        hint = f"name the files to convert, or: {orders}"
        raise UserError(f"no data in the format {format} has been downloaded", hint)
    raise UserError("there is nothing to convert", "name files to convert, or - for standard input")


class Framing(NamedTuple):
    """What stands before, between, behind each and after all of the items; and what is written of none."""

    begin: bytes = b""
    between: bytes = b""
    behind: bytes = b""
    end: bytes = b""
    empty: bytes = b""


_LINES = Framing(behind=b"\n")  # who reads a pipe has whole lines, however it ends
_ARRAY = Framing(b"[\n", b",\n", b"", b"\n]\n", b"[]\n")
# As Python's json.dump writes a list, which is what LLaMA2-Accessory's tools do.
_REFERENCE = Framing(b"[", b", ", b"", b"]", b"[]")


class ConvertedItem(NamedTuple):
    """An item, where it came from, and its JSON."""

    origin: str
    record: Record
    line: bytes


@dataclass
class Conversion:
    """What is converted, and how; it reads all inputs once, and knows afterwards what became of their rows."""

    format: str  # a key of `FORMATS`, or "auto"
    inputs: Sequence[Path]
    options: Options = field(default_factory=Options)
    skip_problems: bool = False  # leave rows that are wrong out, and count them; else they are an error
    progress: Progress | None = None
    note: Callable[[str], None] | None = None  # called with which format a file is in, where that is recognized

    def __post_init__(self) -> None:
        self.rows = self.items = 0
        self.wrong = 0  # rows that were not what the format says
        self.problems: list[str] = []  # what is wrong with them, each with its place: the first of them
        self.skipped: Counter[str] = Counter()  # rows that the format has no item for, by reason
        self.notes: Counter[str] = Counter()  # what was changed without losing an item
        self.unused: Counter[str] = Counter()  # keys that were not used, and in how many rows that gave items
        self._first_wrong: Record = {}
        self._first_unusable: Record = {}
        self._dialogues: bool | None = None
        self._may_be_empty = False

    def __iter__(self) -> Iterator[ConvertedItem]:
        """The items in order.

        Raises:
            UserError: a file cannot be read, not to its end, or its format is unknown.
            DataError: rows are wrong; all of them, once everything has been read.
        """
        with self._all_problems():
            for path in self.inputs:
                yield from self._of_rows(_name(path), *self._opened(path))

    def pieces(self, layout: Framing) -> Iterator[bytes]:
        """The items' JSON in order, one or many in a layout, of large files made by worker processes; raises as
        iterating does."""
        with self._all_problems(), WorkerPool(cores(), "converts data", "the machine may be short of memory") as pool:
            for path in self.inputs:
                format, options, rows = self._opened(path)
                before, is_file = self.rows, path != STDIN and path.is_file()
                if is_file and data_suffix(path) in (".json", ".jsonl"):
                    if (yield from self._by_blocks(pool, path, format, options, layout)):
                        continue
                    rows = islice(rows, self.rows - before, None)
                items = self._of_rows(_name(path), format, options, rows)
                yield from (item.line + layout.behind for item in items)

    def _by_blocks(
        self, pool: WorkerPool, path: Path, format: str, options: Options, layout: Framing
    ) -> Generator[bytes, None, bool]:
        """The items of a file, or of its first rows, up to where something is wrong: blocks do not know the places."""
        is_large = path.stat().st_size >= _LARGE and cores() > 1
        tokenizer = options.tokenizer.path if is_large and options.tokenizer else None
        options = replace(options, tokenizer=None) if tokenizer else options
        convert = partial(_of_block, path, layout, format, options, tokenizer)
        blocks = json_blocks(path, self._reporting(path))
        with suppress(UserError):  # which comes again when the rest is read
            ahead = pool.map_ahead(convert, ([block] for block in blocks), 2 * cores() - 1)
            for part, piece in chain.from_iterable(ahead) if is_large else map(convert, blocks):
                if part.wrong or (self._dialogues is not None and part._dialogues is (not self._dialogues)):
                    return False
                self._add(part)
                if piece:
                    yield piece
            return True
        return False

    def _add(self, part: "Conversion") -> None:
        """Count what became of rows that were converted elsewhere."""
        self.rows += part.rows
        self.items += part.items
        self.skipped.update(part.skipped)
        self.notes.update(part.notes)
        count_unused(self.unused, part.unused.elements())
        self._first_unusable = self._first_unusable or part._first_unusable
        self._dialogues = part._dialogues if self._dialogues is None else self._dialogues
        self._may_be_empty |= part._may_be_empty

    @contextmanager
    def _all_problems(self) -> Iterator[None]:
        """Raises at the end for rows that are wrong, unless they may be left out; together with what ends it before."""
        try:
            yield
        except UserError as error:
            if not self.problems or self.skip_problems:
                raise
            more = error.problems if isinstance(error, DataError) else [error.message]
            raise DataError([*self.problems, *more], error.hint) from error
        if self.problems and not self.skip_problems:
            raise DataError(self.problems, self._hint())

    def _of_rows(self, name: str, format: str, options: Options, rows: Iterable[Row]) -> Iterator[ConvertedItem]:
        about = format_of(format, options.mapping)
        self._may_be_empty |= about.may_be_empty
        used = frozenset(("id", *about.keys, *IMAGES, *SYSTEM)), frozenset((*about.turn_keys, *TRAINED))
        for row in rows:
            if self.wrong >= MOST_PROBLEMS and not self.skip_problems:
                break
            self.rows += 1
            for record, line in self._of_row(row, name, about, options, used):
                self.items += 1
                yield ConvertedItem(f"{name}: {row.where}", record, line)

    def _of_row(
        self, row: Row, name: str, format: Format, options: Options, used: tuple[frozenset[str], frozenset[str]]
    ) -> list[tuple[Record, bytes]]:
        try:
            if row.problem is not None:
                raise Malformed(row.problem)
            if not isinstance(row.value, dict):
                raise Malformed(f"should be an object, but is {type_name(row.value)}")
            unused = set() if options.reference else self._unused_keys(row.value, format, *used)
            records = list(format.items(row.value, options, self.notes))
            for record in records:
                self._check_kind("conversations" in record)
            count_unused(self.unused, unused)
            return [(record, _encoded(record, options.reference)) for record in records]
        except Skipped as reason:
            self.skipped[str(reason)] += 1
        except Malformed as problem:
            self.wrong += 1
            if self.wrong == 1 and isinstance(row.value, dict):
                self._first_wrong = row.value
            if self.wrong <= MOST_PROBLEMS:
                self.problems.append(f"{name}: {row.where}: {problem}")
        return []

    def _unused_keys(self, row: Record, format: Format, used: frozenset[str], in_turns: frozenset[str]) -> set[str]:
        """The keys of a row and its turns that are not used, though something is in them.

        Raises:
            Skipped: one of them changes the meaning of the rest.
        """
        unused, reason = unused_keys(row, used, PREFERENCE if format.is_choice else ())
        for place in format.turns_in:
            turns = as_list(row.get(place))
            for turn in turns.values() if isinstance(turns, dict) else turns if isinstance(turns, list) else ():
                if not isinstance(turn, dict) or in_turns.issuperset(turn):
                    continue
                keys, wrong = unused_keys(turn, in_turns.union(MESSAGE_KEYS.get(role_of(turn) or "", ())))
                unused |= {f"{place}[].{key}" for key in keys}
                reason = reason or wrong
        if reason is not None:
            self._first_unusable = self._first_unusable or row
            raise Skipped(reason)
        return unused

    def _check_kind(self, is_dialogue: bool) -> None:
        if self._dialogues is None:
            self._dialogues = is_dialogue
        if is_dialogue is not self._dialogues:
            one, others = ("a dialogue", "single-turn items") if is_dialogue else ("a single-turn item", "dialogues")
            raise Malformed(f"is {one} among {others}, which are read from one file each")

    def require_items(self) -> None:
        """To be called at the end.

        Raises:
            UserError: no row gave an item, and that is no result of the format.
        """
        if self.items or self._may_be_empty:
            return
        names = ", ".join(map(_name, self.inputs))
        if not self.rows:
            raise UserError(f"{names} has no rows")
        reasons = [f"{count:,}: {reason}" for reason, count in self.skipped.items()]
        if self.wrong:
            reasons.append(f"{self.wrong:,}: wrong; the first is {self.problems[0]}")
        none = f"nothing to train on: no item in {count_text(self.rows, 'row')} of {names}"
        mapping = mapping_of(self._first_unusable) if "chosen" in self._first_unusable else {}
        command = f"{self._command('jsonl')} {mapping_words(mapping)} --output NEW.jsonl"
        raise UserError(f"{none}\n{listed(reasons)}", f"say what is to be trained on: {command}" if mapping else None)

    def _command(self, format: str) -> str:
        return f"llama-acc convert-data {format} {shlex.join(map(str, self.inputs))}"

    def _hint(self) -> str:
        """What to do about rows that are wrong."""
        found = recognize(self._first_wrong)
        if self.format in ("csv", "jsonl") and not self.items:
            mapping = mapping_of(self._first_wrong)
            return f"say which is which: {mapping_words(mapping)}" if mapping else "none of its columns holds text"
        if found is not None and found[0] != self.format and not self.items and self.format != AUTO:
            return f"this looks like {found[0]}, as {found[1]}: {self._command(found[0])} --output NEW.jsonl"
        hint = "mend them, or leave these rows out with --on-error skip"
        return hint if self.wrong < MOST_PROBLEMS else f"reading ended after {MOST_PROBLEMS:,} problems; {hint}"

    def _opened(self, path: Path) -> tuple[str, Options, Iterator[Row]]:
        """A file's format, what is asked of it, and its rows."""
        name = _name(path)
        options, format, rows = self.options, self.format, self._rows(path, name)
        if format == AUTO:
            first, rows = looked_ahead(rows, _LOOKED_AT)
            objects = [row.value for row in first if isinstance(row.value, dict)]
            found = next(filter(None, map(recognize, objects)), None)
            if options.mapping:
                found = "jsonl", "of --map", options.mapping
            if found is None:
                raise _unknown(name, objects)
            format, why, mapping = found
            if format == "jsonl" and data_suffix(Path(name)) in (".csv", ".tsv"):
                format = "csv"  # the same by the name that the user knows
            options = replace(options, mapping=mapping)
            if self.note is not None:
                self.note(f"{name}: {format}, as {why}")
        return format, options, rows

    def _reporting(self, path: Path) -> Callable[[int], None]:
        size = path.stat().st_size if path != STDIN else 0
        return lambda read: None if self.progress is None else self.progress(_name(path), read, size)

    def _rows(self, path: Path, name: str) -> Iterator[Row]:
        progress = self._reporting(path)
        suffix = ".csv" if self.format == "csv" else None
        required = required_columns(self.options.mapping) if suffix else ()
        if path != STDIN and data_suffix(path) in SUFFIXES:
            yield from stream_rows(path, required=required, progress=progress)
            return
        try:
            file: IO[bytes] = sys.stdin.buffer if path == STDIN else open_input(path)
        except OSError as error:
            raise unreadable(path, error) from error
        with nullcontext() if path == STDIN else file:
            yield from stream_rows_from(file, name, suffix, required=required, progress=progress)


def _of_block(
    path: Path, layout: Framing, format: str, options: Options, tokenizer: Path | None, block: Block
) -> tuple[Conversion, bytes]:
    """What becomes of a block of rows by itself: counts, and the items' JSON. `tokenizer`: in a worker process."""
    if tokenizer is not None:
        from llama_acc.core.data.encode import tokenizer_of_worker

        options = replace(options, tokenizer=tokenizer_of_worker(tokenizer))
    part, lines = Conversion(format, ()), []
    try:
        rows = rows_in_block(path, *block)
        lines = [item.line + layout.behind for item in part._of_rows("", format, options, rows)]
    except (UserError, OSError):
        part.wrong += 1
    return part, layout.between.join(lines)


def _name(path: Path) -> str:
    return "standard input" if path == STDIN else str(path)


def _unknown(name: str, objects: list[Record]) -> UserError:
    if not objects:
        return UserError(f"{name} holds no rows, or its first ones are no objects: its format cannot be told")
    first = objects[0]
    reason = unusable(first, first)
    mapping = mapping_of(first) if reason is None or "chosen" in first else {}
    keys = ", ".join(map(repr, list(first)[:8]))
    return UserError(
        f"{name}: {reason or 'it is in none of the known formats'}; its first item has the keys {keys}",
        f"say what is to be trained on: {mapping_words(mapping)}" if mapping else None,
    )


def _encoded(record: Record, as_reference: bool) -> bytes:
    try:
        line = _encode(record)  # refuses lone surrogates, which json writes as escapes
        return json.dumps(record).encode() if as_reference else line
    except UnicodeEncodeError as error:
        surrogate = ord(str(error.object)[error.start])
        raise Malformed(f"{_unwritable(record)} has a lone surrogate (U+{surrogate:04X})") from error
    except RecursionError as error:
        raise Malformed("is nested too deep") from error


def _unwritable(record: Record) -> str:
    """The field, or the turn, that has the lone surrogate."""
    for name, value in record.items():
        for number, part in enumerate(value if isinstance(value, list) else [value], start=1):
            try:
                _encode(part)
            except UnicodeEncodeError:
                return f"turn {number}" if isinstance(value, list) else repr(name)
    return "a field's name"


def convert(conversion: Conversion, output: Path) -> None:
    """Convert files into a .jsonl or .json file, perhaps with .gz or .zst behind, which appears when all is there.

    Raises:
        UserError: an input cannot be read, the output not be made, or nothing comes of it.
        DataError: rows are wrong.
        RunError: the output cannot be written.
    """
    suffix = data_suffix(output)
    if suffix not in (".jsonl", ".json") or output.suffix.lower() not in (suffix, ".gz", ".zst"):
        raise UserError(
            f"{output}: {output.suffix or 'no suffix'} is not a kind of file that is written",
            "--output takes a .jsonl or .json file, perhaps with .gz or .zst behind, or - for standard output",
        )
    if any(path.exists() and output.exists() and path.samefile(output) for path in conversion.inputs):
        raise UserError(f"{output} is read from and cannot be written to", "give --output another name")
    if output.is_dir():
        raise UserError(f"{output} is a folder", "give --output a file's name")
    layout = _LINES if suffix == ".jsonl" else _REFERENCE if conversion.options.reference else _ARRAY
    target = Path(os.path.realpath(output))  # where a symbolic link has the name, it stays
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    try:
        with whole_file(target) as file, _compressed(file, output.suffix.lower()) as content:
            write_items(conversion, content, layout)
    except OSError as error:
        raise RunError(f"cannot write {output}: {error.strerror or error}") from error


def write_items(conversion: Conversion, file: IO[bytes], layout: Framing = _LINES) -> None:
    """Convert everything into an open file; raises as `convert`."""
    count = 0
    for count, piece in enumerate(conversion.pieces(layout), start=1):
        file.write(layout.between if count > 1 else layout.begin)
        file.write(piece)
    conversion.require_items()
    file.write(layout.end if count else layout.empty)
    file.flush()


def _compressed(file: IO[bytes], suffix: str) -> Any:
    if suffix == ".gz":  # without name and time, so that the same items give the same file
        return gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0)
    if suffix == ".zst":
        return ZstdFile(file, "wb", options={CompressionParameter.checksum_flag: True})
    return nullcontext(file)
