"""Data files: reading, and checking every item, before anything is encoded.

Read are `.json` (an array), `.jsonl`, `.csv` (tab or comma separated), folders and globs of these, and
LLaMA2-Accessory's data YAML with `META`. Two kinds of items: single-turn (`instruction`, `input`, `output`) and
dialogue (`conversations: [{from, value}, ...]`). Every problem of every item is named, and they come together.
"""

import csv
import difflib
import glob
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama_acc.core.data.items import Item, item_of, kind_of, type_name
from llama_acc.core.errors import UserError, did_you_mean, listed

FORMATS = ("auto", "single_turn", "dialogue")
DATA_SUFFIXES = (".json", ".jsonl", ".csv")
YAML_SUFFIXES = (".yaml", ".yml")
_COLUMNS = ("instruction", "input", "output")
# Beside the data in a folder that was downloaded; not data itself.
_NOT_DATA = ("manifest.json", "data.json")


@dataclass(frozen=True)
class ItemFile:
    """The items of one file, all of one kind: "single_turn" or "dialogue"."""

    path: Path
    kind: str
    items: list[Item]


class DataError(UserError):
    """Problems in data files, one to a line. `problems` names each of them with its place."""

    def __init__(self, problems: list[str], hint: str | None = None) -> None:
        one = len(problems) == 1
        super().__init__(problems[0] if one else f"{len(problems)} problems in the data:\n{listed(problems)}", hint)
        self.problems = problems


def read_items(path: str | Path, format: str = "auto") -> list[Item]:
    """All items of a file, folder or glob.

    Raises:
        UserError: nothing is there, or something is wrong with it: all problems of all files together.
    """
    return [item for file in read_files(data_files(path), format) for item in file.items]


def read_files(paths: Iterable[Path], format: str = "auto") -> list[ItemFile]:
    """Read several files; the problems of all of them are raised together."""
    files, errors = [], []
    for path in paths:
        try:
            files.append(read_file(path, format))
        except UserError as error:
            errors.append(error)
    raise_together(errors)
    return files


def raise_together(errors: list[UserError]) -> None:
    """Raise one error for all of `errors`, if there are any."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [p for e in errors for p in (e.problems if isinstance(e, DataError) else [e.message])]
        raise DataError(problems, next((e.hint for e in errors if e.hint), None))


def read_file(path: Path, format: str = "auto", data: bytes | None = None) -> ItemFile:
    """The items of one data file.

    Args:
        path: a .json, .jsonl or .csv file.
        format: "single_turn", "dialogue", or "auto": by the keys of its first item.
        data: its content, if it has been read already.

    Raises:
        UserError: it cannot be read, or holds no items.
        DataError: items are wrong.
    """
    if format not in FORMATS:
        raise UserError(
            f"unknown data format {format!r}", did_you_mean(format, FORMATS) or "it is one of: " + ", ".join(FORMATS)
        )
    data = read_bytes(path) if data is None else data
    if (suffix := path.suffix.lower()) not in DATA_SUFFIXES:
        raise UserError(
            f"{path}: {suffix or 'no suffix'} is not a kind of data file", f"use {', '.join(DATA_SUFFIXES)}"
        )
    text = _decode(path, data)
    rows = _rows(path, text)
    if not rows:
        raise UserError(f"{path} holds no items")
    kind = format if format != "auto" else kind_of(rows[0].value)
    if path.suffix.lower() == ".csv" and kind == "dialogue":
        raise UserError(f"{path}: a .csv file holds single-turn items only", "give dialogues as .json or .jsonl")
    items, problems = _checked(path, rows, kind)
    if problems:
        raise DataError(problems)
    return ItemFile(path, kind, items)


def data_files(path: str | Path) -> list[Path]:
    """The data files that a file name, folder or glob stands for, sorted.

    Raises:
        UserError: there are none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = [f for f in sorted(path.iterdir()) if _is_data(f)]
        if not inside:
            raise UserError(f"no data files in {path}", f"it should hold {', '.join(DATA_SUFFIXES)} files")
        return inside
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        matches = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if Path(f).is_file()]
        if not matches:
            raise UserError(f"no file matches {path}")
        return matches
    raise UserError(f"there is no data file {path}", nearest_names(path))


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


def read_bytes(path: Path) -> bytes:
    """A data file's bytes.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no data file {path}", nearest_names(path)) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _is_data(file: Path) -> bool:
    hidden = file.name.startswith(".")
    return file.suffix.lower() in DATA_SUFFIXES and file.name not in _NOT_DATA and not hidden and file.is_file()


class _Row(NamedTuple):
    where: str
    value: Any


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8: byte {error.start} (line {line}) cannot be decoded") from error


def _rows(path: Path, text: str) -> list[_Row]:
    if not text.strip():
        raise UserError(f"{path} is empty")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _json_rows(path, text)
    if suffix == ".jsonl":
        return _jsonl_rows(path, text)
    return _csv_rows(path, text)


def _json_rows(path: Path, text: str) -> list[_Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _jsonl_rows(path, text)  # JSON lines under another name, as APIBench has it
        raise UserError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(value, list):
        keys = f" with the keys {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) else ""
        hint = "one item per line is .jsonl" if isinstance(value, dict) else None
        raise UserError(f"{path} should hold an array of items, but holds {type_name(value)}{keys}", hint)
    return [_Row(f"item {i}", item) for i, item in enumerate(value, start=1)]


def _jsonl_rows(path: Path, text: str) -> list[_Row]:
    rows: list[_Row] = []
    problems: list[str] = []
    # Not splitlines(): a JSON text may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"item {len(rows) + len(problems) + 1} (line {number})"
        try:
            rows.append(_Row(where, json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append(f"{path}: {where}, column {error.colno}: not JSON: {error.msg}")
        except (RecursionError, ValueError) as error:
            problems.append(f"{path}: {where}: not JSON that can be read: {error}")
    if problems:
        hint = "an array over several lines is .json" if text.lstrip().startswith("[") else None
        raise DataError(problems, hint)
    return rows


def _csv_rows(path: Path, text: str) -> list[_Row]:
    csv.field_size_limit(2**31 - 1)
    header, _, _ = text.partition("\n")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",", strict=True)
    try:
        names = [name.strip() for name in next(reader)]
        _check_header(path, names)
        return list(_csv_items(path, reader, names))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not CSV: {error}") from error


def _check_header(path: Path, names: list[str]) -> None:
    problems = []
    for column in ("instruction", "output"):
        if column not in names:
            near = [n for n in names if difflib.get_close_matches(n.lower(), [column], cutoff=0.6)]
            problems.append(f"{path}: line 1: no column {column!r}" + (f" ({near[0]!r}?)" if near else ""))
    problems += [f"{path}: line 1: column {n!r} twice" for n in sorted(set(names)) if names.count(n) > 1]
    if problems:
        raise DataError(problems, f"the columns are {', '.join(_COLUMNS)}; found: {', '.join(names)}")


def _csv_items(path: Path, reader: Any, names: list[str]) -> Iterator[_Row]:
    problems = []
    number = 0
    begin = reader.line_num + 1
    for cells in reader:
        line, begin = begin, reader.line_num + 1  # a quoted cell may span lines
        if not cells:
            continue
        number += 1
        where = f"item {number} (line {line})"
        if len(cells) != len(names):
            problems.append(f"{path}: {where}: {len(cells)} cells, but the header has {len(names)}")
        yield _Row(where, dict(zip(names, cells, strict=False)))
    if problems:
        raise DataError(problems)


def _checked(path: Path, rows: list[_Row], kind: str) -> tuple[list[Item], list[str]]:
    items: list[Item] = []
    problems: list[str] = []
    for row in rows:
        item, found = item_of(row.value, kind)
        problems += [f"{path}: {row.where}: {finding}" for finding in found]
        if item is not None:
            items.append(item)
    return items, problems
