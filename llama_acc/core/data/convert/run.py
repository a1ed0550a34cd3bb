"""Rows in, items out: streamed, counted, and every row that gives no item told with its place."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, NamedTuple

from llama_acc.core.data.convert.formats import AUTO, FORMATS, Recognised, recognise
from llama_acc.core.data.convert.mapped import required_columns
from llama_acc.core.data.convert.rules import Malformed, Options, Record, Rule, Skipped
from llama_acc.core.data.convert.writing import LINES, Items, Layout, encoded, layout_of, whole_file
from llama_acc.core.data.files import data_suffix, nearest_names
from llama_acc.core.data.findings import MOST_PROBLEMS
from llama_acc.core.data.keys import PREFERENCE, as_list, count_unused, is_empty, mapping_of, mapping_words, unusable
from llama_acc.core.data.rows import SUFFIXES, Row, looked_ahead, stream_rows, stream_rows_from, type_name
from llama_acc.core.errors import DataError, UserError, listed
from llama_acc.core.input_files import open_input
from llama_acc.core.units import count_text

_LOOKED_AT = 100
"""How many of the first rows may be unreadable before a file's format is found."""

_TABLES = (".csv", ".tsv")

Progress = Callable[[str, int, int], None]
"""Called with (the file's name, bytes read of all files, bytes of all files)."""


@dataclass(frozen=True)
class Request:
    """What is to be converted, and how."""

    format: str
    """A key of `FORMATS`, or "auto"."""
    inputs: Sequence[Path]
    stdin: IO[bytes] | None = None
    """What the input `-` stands for."""
    options: Options = field(default_factory=Options)
    skip_problems: bool = False
    """Leave rows that are wrong out, and count them; else they are an error."""


class Found(NamedTuple):
    """The format of a file that was to be recognised."""

    file: str
    recognised: Recognised


class Converted(NamedTuple):
    """An item, and where it came from."""

    origin: str
    record: Record
    line: bytes


class Conversion:
    """Reads all inputs once, and knows afterwards what became of their rows."""

    def __init__(
        self,
        request: Request,
        layout: Layout = LINES,
        progress: Progress | None = None,
        on_found: Callable[[Found], None] | None = None,
    ) -> None:
        """Args:
        request: see there.
        layout: how items are written.
        progress: told how far it is.
        on_found: told when a file's format has been recognised.

        Raises:
            UserError: an input is not there.
        """
        self.rows = 0
        self.items = 0
        self.skipped: Counter[str] = Counter()
        """Rows that the format has no item for, by reason."""
        self.notes: Counter[str] = Counter()
        """What was changed without losing an item."""
        self.unused: Counter[str] = Counter()
        """Keys that were not used, and in how many rows that gave items."""
        self.wrong = 0
        """Rows that were not what the format says."""
        self.problems: list[str] = []
        """What is wrong with them, each with its place: the first of them."""
        self._on_found = on_found
        self._looks_like: Recognised | None = None
        self._wrong_row: Record = {}
        self._request = request
        self._layout = layout
        self._progress = progress
        self._unusable: Record | None = None  # the first row whose keys ask for what cannot be done
        self._dialogues: bool | None = None
        self._may_give_nothing = False
        self._total = sum(_size(path) for path in request.inputs)
        self._before = 0

    def __iter__(self) -> Iterator[Converted]:
        """The items in order.

        Raises:
            UserError: a file cannot be read, not to its end, or its format is unknown.
            DataError: rows are wrong; all of them, once everything has been read.
        """
        stop = not self._request.skip_problems
        try:
            for path in self._request.inputs:
                yield from self._file(path)
                self._before += _size(path)
                if stop and self.wrong >= MOST_PROBLEMS:
                    break
        except UserError as error:
            if not self.problems or not stop:
                raise
            more = error.problems if isinstance(error, DataError) else [error.message]
            raise DataError([*self.problems, *more], error.hint) from error
        if self.problems and stop:
            raise DataError(self.problems, self._hint())

    def check_that_something_came(self) -> None:
        """To be called at the end.

        Raises:
            UserError: no row gave an item, and that is no result of the format.
        """
        if not self.items and not self._may_give_nothing:
            raise self._nothing()

    def _file(self, path: Path) -> Iterator[Converted]:
        name = _name(path)
        rule, rows = self._rule(name, self._opened(path, name))
        self._may_give_nothing |= rule.may_give_nothing
        try:
            for row in rows:
                if self.wrong >= MOST_PROBLEMS and not self._request.skip_problems:
                    return
                self.rows += 1
                for record, line in self._of_row(rule, name, row):
                    self.items += 1
                    yield Converted(f"{name}: {row.where}", record, line)
        finally:
            self.notes.update(rule.notes)

    def _of_row(self, rule: Rule, name: str, row: Row) -> list[tuple[Record, bytes]]:
        try:
            if row.problem is not None:
                raise Malformed(row.problem)
            if not isinstance(row.value, dict):
                raise Malformed(f"should be an object, but is {type_name(row.value)}")
            unused = self._unused_keys(rule, row.value)
            records = [self._of_one_kind(record) for record in rule.records(row.value)]
            count_unused(self.unused, unused)
            return [(record, encoded(record, self._layout)) for record in records]
        except Skipped as reason:
            self.skipped[str(reason)] += 1
        except Malformed as problem:
            self.wrong += 1
            if self.wrong == 1 and isinstance(row.value, dict):
                self._looks_like, self._wrong_row = recognise(row.value), row.value
            if self.wrong <= MOST_PROBLEMS:
                self.problems.append(f"{name}: {row.where}: {problem}")
        return []

    def _unused_keys(self, rule: Rule, row: Record) -> set[str]:
        """The keys of a row and its turns that are not used, though something is in them.

        Raises:
            Skipped: one of them changes the meaning of the rest.
        """
        if self._request.options.reference:
            return set()
        unused: set[str] = set()
        if not rule.used_keys.issuperset(row):
            unused = {key for key in row.keys() - rule.used_keys if not is_empty(row[key])}
            self._refuse(row, row, unused.difference(PREFERENCE) if rule.chosen else unused)
        for place in rule.turns_in:
            turns = as_list(row.get(place))
            for turn in turns.values() if isinstance(turns, dict) else turns if isinstance(turns, list) else ():
                if isinstance(turn, dict) and not rule.used_turn_keys.issuperset(turn):
                    keys = {key for key in turn.keys() - rule.used_turn_keys if not is_empty(turn[key])}
                    self._refuse(row, turn, keys)
                    unused |= {f"{place}[].{key}" for key in keys}
        return unused

    def _refuse(self, row: Record, part: Record, keys: set[str]) -> None:
        reason = unusable(part, sorted(keys)) if keys else None
        if reason is not None:
            self._unusable = self._unusable or row
            raise Skipped(reason)

    def _of_one_kind(self, record: Record) -> Record:
        dialogue = "conversations" in record
        if self._dialogues is None:
            self._dialogues = dialogue
        if dialogue != self._dialogues:
            one, others = ("a dialogue", "single-turn items") if dialogue else ("a single-turn item", "dialogues")
            raise Malformed(f"is {one} among {others}, which are read from one file each")
        return record

    def _nothing(self) -> UserError:
        names = ", ".join(map(_name, self._request.inputs))
        if not self.rows:
            return UserError(f"{names} has no rows")
        reasons = [f"{count:,}: {reason}" for reason, count in self.skipped.items()]
        if self.wrong:
            reasons.append(f"{self.wrong:,}: wrong; the first is {self.problems[0]}")
        none = f"nothing to train on: no item in {count_text(self.rows, 'row')} of {names}"
        mapping = _preferred(self._unusable or {})
        say = f"say what is to be trained on: llama-acc convert-data jsonl {names} {mapping_words(mapping)}"
        return UserError(f"{none}\n{listed(reasons)}", say if mapping else None)

    def _hint(self) -> str:
        looks_like, format = self._looks_like, self._request.format
        if format in ("csv", "jsonl") and not self.items:
            return self._map_hint()
        if looks_like is not None and looks_like.format != format and not self.items and format in FORMATS:
            return f"this looks like {looks_like.format}, as {looks_like.why}: convert-data {looks_like.format}"
        hint = "mend them, or leave these rows out with --on-error skip"
        return hint if self.wrong < MOST_PROBLEMS else f"reading ended after {MOST_PROBLEMS:,} problems; {hint}"

    def _map_hint(self) -> str:
        if not (mapping := mapping_of(self._wrong_row)):
            return "none of its columns holds text"
        return f"say which is which: {mapping_words(mapping)}"

    def _rule(self, name: str, rows: Iterator[Row]) -> tuple[Rule, Iterator[Row]]:
        """A file's rule, and its rows."""
        options = self._request.options
        if self._request.format != AUTO:
            return FORMATS[self._request.format](options), rows
        first, rows = looked_ahead(rows, _LOOKED_AT)
        objects = [row.value for row in first if isinstance(row.value, dict)]
        recognised = next(filter(None, map(recognise, objects)), None)
        if options.mapping:
            recognised = Recognised("jsonl", "of --map", options.mapping)
        if recognised is None:
            raise _unknown(name, objects)
        if recognised.format == "jsonl" and data_suffix(Path(name)) in _TABLES:
            recognised = recognised._replace(format="csv")  # the same rule by the name that the user knows
        if self._on_found is not None:
            self._on_found(Found(name, recognised))
        return FORMATS[recognised.format](replace(options, mapping=recognised.mapping)), rows

    def _opened(self, path: Path, name: str) -> Iterator[Row]:
        required = required_columns(self._request.options.mapping) if self._request.format == "csv" else ()

        def progress(read: int) -> None:
            if self._progress is not None:
                self._progress(name, self._before + read, self._total)

        suffix = ".csv" if self._request.format == "csv" else None
        if path == Path("-"):
            if self._request.stdin is None:
                raise UserError("there is no standard input")
            yield from stream_rows_from(self._request.stdin, name, suffix, required=required, progress=progress)
        elif data_suffix(path) in SUFFIXES:
            yield from stream_rows(path, required=required, progress=progress)
        else:
            with _raw(path) as file:
                yield from stream_rows_from(file, name, suffix, required=required, progress=progress)


def convert(
    request: Request,
    output: Path,
    progress: Progress | None = None,
    on_found: Callable[[Found], None] | None = None,
) -> Conversion:
    """Convert files into one, which appears when all of it is there.

    Args:
        request: what is converted.
        output: a .jsonl or .json file, perhaps with .gz or .zst behind.
        progress: told how far it is.
        on_found: told when a file's format has been recognised.

    Returns:
        What became of the rows.

    Raises:
        UserError: an input cannot be read, or the output not be made.
        DataError: rows are wrong.
        RunError: the output cannot be written.
    """
    layout = layout_of(output, request.options.reference)
    if any(path.exists() and output.exists() and path.samefile(output) for path in request.inputs):
        raise UserError(f"{output} is read from and cannot be written to", "give --output another name")
    conversion = Conversion(request, layout, progress, on_found)
    with whole_file(output) as file:
        write_items(conversion, Items(file, layout))
    return conversion


def write_items(conversion: Conversion, items: Items) -> None:
    """Convert everything.

    Raises:
        UserError: something is wrong with the input, or nothing comes of it.
    """
    for converted in conversion:
        items.write(converted.line)
    conversion.check_that_something_came()
    items.end()


def _name(path: Path) -> str:
    return "standard input" if path == Path("-") else str(path)


def _size(path: Path) -> int:
    """Bytes of an input that has as many; 0 of a pipe.

    Raises:
        UserError: it is not there.
    """
    if path == Path("-"):
        return 0
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"there is no data file {path}", nearest_names(path)) from error


def _raw(path: Path) -> IO[bytes]:
    try:
        return open_input(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _preferred(row: Record) -> dict[str, str]:
    """How to take the preferred of two replies; empty: there is none, or it cannot be taken."""
    return mapping_of(row) if "chosen" in row else {}


def _unknown(name: str, objects: list[Record]) -> UserError:
    if not objects:
        return UserError(f"{name} holds no rows, or its first ones are no objects: its format cannot be told")
    first = objects[0]
    keys = ", ".join(map(repr, list(first)[:8]))
    if (reason := unusable(first, first)) is not None:
        mapping = _preferred(first)
        hint = f"say what is to be trained on: {mapping_words(mapping)}" if mapping else None
        return UserError(f"{name}: {reason}; its first item has the keys {keys}", hint)
    mapping = mapping_of(first)
    return UserError(
        f"{name} is in none of the known formats: its first item has the keys {keys}",
        f"name the format, or say which column is which: {mapping_words(mapping)}" if mapping else None,
    )
