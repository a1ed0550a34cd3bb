"""Data files: reading, and checking every item, before anything is encoded.

Read are the files that `rows` reads, folders and globs of these, and LLaMA2-Accessory's data YAML with `META`. Two
kinds of items: single-turn (`instruction`, `input`, `output`) and dialogue (`conversations: [{from, value}, ...]`).
Every problem of every item is named, and they come together.
"""

import glob
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llama_acc.core.data.files import BytesRead, data_suffix, nearest_names
from llama_acc.core.data.findings import Finding, beginning
from llama_acc.core.data.items import Item, first_exchange, item_of, kind_of
from llama_acc.core.data.rows import SUFFIXES, Row, looked_ahead, stream_rows
from llama_acc.core.errors import DataError, UserError, did_you_mean
from llama_acc.core.input_files import open_input

FORMATS = ("auto", "single_turn", "dialogue", "single_turn_llava")
YAML_SUFFIXES = (".yaml", ".yml")
_TRIED = 1000
# Beside the data in a folder that was written by us; not data itself.
_NOT_DATA = ("manifest.json",)


class Checked(NamedTuple):
    """A row of a file as it was found: an item, or what is wrong with it."""

    where: str
    item: Item | None
    """None: it cannot be trained on, or is blank."""
    problems: list[Finding]


def raise_together(errors: list[UserError]) -> None:
    """Raise one error for all of `errors`, if there are any."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [p for e in errors for p in (e.problems if isinstance(e, DataError) else [e.message])]
        raise DataError(problems, next((e.hint for e in errors if e.hint), None))


class ItemStream:
    """The checked items of a file, in order, one at a time; to be iterated once."""

    def __init__(self, path: Path, kind: str, rows: Iterator[Row]) -> None:
        self.path = path
        self.kind = kind
        """"single_turn" or "dialogue"."""
        self.unused: Counter[str] = Counter()
        """Keys that are not used, and in how many of the items so far."""
        self._rows = rows

    def __iter__(self) -> Iterator[Checked]:
        """Raises UserError where the file as a whole cannot be read further, if need be after items."""
        for row in self._rows:
            if row.problem is None:
                yield Checked(row.where, *item_of(row.value, self.kind, row.where, self.unused))
            else:
                yield Checked(
                    row.where, None, [Finding("unreadable", row.where, "", row.problem, beginning(row.value))]
                )


def stream_items(path: Path, format: str = "auto", *, progress: BytesRead | None = None) -> ItemStream:
    """The items of one data file in constant memory.

    Args:
        path: a .json, .jsonl, .csv or .tsv file, perhaps compressed, or a .tar shard.
        format: "single_turn", "dialogue", "single_turn_llava" (a dialogue's first exchange as a single-turn item), or
            "auto": by the keys of its items.
        progress: called with how many bytes of the file have been read.

    Raises:
        UserError: it cannot be read, or holds no items.
    """
    if format not in FORMATS:
        raise UserError(
            f"unknown data format {format!r}", did_you_mean(format, FORMATS) or "it is one of: " + ", ".join(FORMATS)
        )
    rows = stream_rows(path, required=("instruction", "output"), progress=progress, pipes=False)
    # Up to one that tells the kind of items: a broken first row does not make all others wrong, and single-turn items
    # with a `history` are dialogues if any of them has something in it.
    first, rows = looked_ahead(rows, _TRIED, _tells_kind)
    if not first:
        raise UserError(f"{path} holds no items")
    kind = format if format != "auto" else _kind(first)
    if format == "single_turn_llava":
        kind, rows = "single_turn", map(_first_exchange, rows)
    return ItemStream(path, kind, rows)


def _tells_kind(row: Row) -> bool:
    kind = kind_of(row.value)
    return kind == "dialogue" or (kind is not None and "history" not in row.value)


def _kind(first: list[Row]) -> str:
    return next((kind for row in reversed(first) if (kind := kind_of(row.value)) is not None), "single_turn")


def _first_exchange(row: Row) -> Row:
    return row._replace(value=first_exchange(row.value))


def data_files(path: str | Path) -> list[Path]:
    """The data files that a file name, folder or glob stands for, sorted.

    Raises:
        UserError: there are none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = [f for f in sorted(path.iterdir()) if is_data(f)]
        if not inside:
            raise UserError(f"no data files in {path}", f"it should hold {', '.join(SUFFIXES)} files")
        return inside
    if path.exists():
        if not path.is_file() and not path.is_fifo():
            raise UserError(f"cannot read {path}: it is a device or a socket, not a file")
        return [path]
    if glob.has_magic(str(path)):
        matches = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if Path(f).is_file()]
        if not matches:
            raise UserError(f"no file matches {path}")
        return matches
    raise UserError(f"there is no data file {path}", nearest_names(path))


def read_bytes(path: Path) -> bytes:
    """A data file's bytes.

    Raises:
        UserError: it is missing or cannot be read.
    """
    try:
        with open_input(path, buffered=True) as file:
            return file.read()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    """Why a data file cannot be read, and what is there instead."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"there is no data file {path}", nearest_names(path))
    return UserError(f"cannot read {path}: {error.strerror}")


def is_data(file: Path) -> bool:
    """Whether a file that nobody named is data, going by its name."""
    hidden = file.name.startswith(".")
    return data_suffix(file) in SUFFIXES and file.name not in _NOT_DATA and not hidden and file.is_file()
