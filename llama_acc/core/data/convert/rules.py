"""What a converter is, and the words it has for rows that give no item."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llama_acc.core.data.rows import type_name
from llama_acc.core.tokenizer import Tokenizer

_Value = TypeVar("_Value")

Row = dict[str, Any]
Record = dict[str, Any]
"""An item as it is written: single-turn, or a dialogue."""


class Skipped(Exception):
    """The format's rule gives no item for this row; the message is the reason, the same for all such rows."""


class Malformed(Exception):
    """The row is not what the format says; the message is what is wrong with it."""


@dataclass(frozen=True)
class Options:
    """What can be asked of the formats. Each looks at its own."""

    all_forms: bool = False
    """gorilla: also rows in the form of a Python dictionary."""
    dialogues: bool = False
    """llava: whole dialogues, not one item for each question and answer."""
    reference: bool = False
    """llava: exactly what LLaMA2-Accessory's tool gives."""
    keep_html: bool = False
    """sharegpt: leave HTML as it is."""
    tokenizer: Tokenizer | None = None
    max_tokens: int | None = None
    """sharegpt: dialogues are split so that each has at most so many tokens."""
    languages: tuple[str, ...] = ()
    """sharegpt: only dialogues in these languages, by their ISO 639 codes."""
    mapping: dict[str, str] = field(default_factory=dict)
    """csv, jsonl: our field to the row's."""


class Rule:
    """One format's way from rows to items. Made anew for each conversion, as it counts."""

    may_give_nothing = False
    """That no row gives an item is a result of its own, of which the reference makes an empty array."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.notes: Counter[str] = Counter()
        """What was changed on the way without losing an item, and how often."""

    def records(self, row: Row) -> Iterable[Record]:
        """The items of a row.

        Raises:
            Skipped: it gives none.
            Malformed: it is wrong.
        """
        raise NotImplementedError


def text_of(row: Row, field: str) -> str:
    """A field that has to be text; see `_field`."""
    return _field(row, field, str, "text")


def optional_text(row: Row, field: str) -> str:
    """A field that is text, or missing, or null: then an empty text; see `_field`."""
    return "" if row.get(field) is None else text_of(row, field)


def list_of(row: Row, field: str) -> list[Any]:
    """A field that has to be a list; see `_field`."""
    return _field(row, field, list, "a list")


def object_in(row: Row, field: str) -> Row:
    """A field that has to be an object; see `_field`."""
    return _field(row, field, dict, "an object")


def _field(row: Row, field: str, kind: type[_Value], expected: str) -> _Value:
    """A field that has to be of a kind.

    Raises:
        Malformed: it is missing, or something else.
    """
    value = row.get(field)
    if not isinstance(value, kind):
        raise _other(row, field, expected)
    return value


def _other(row: Row, field: str, expected: str) -> Malformed:
    value = row.get(field)
    if value is not None:
        return Malformed(f"{field!r} should be {expected}, but is {type_name(value)}")
    if field in row:
        return Malformed(f"{field!r} is null")
    return Malformed(f"no {field!r} (its keys: {', '.join(repr(key) for key in list(row)[:6]) or 'none'})")


def single_turn(instruction: str, input: str, output: str) -> Record:
    """A single-turn item as it is written."""
    return {"instruction": instruction, "input": input, "output": output}


def named(row: Row, part: int | None = None) -> Record:
    """The beginning of a record that keeps its row's `id`, if that has one; `part` numbers those of one row."""
    if "id" not in row:
        return {}
    return {"id": row["id"] if part is None else f"{row['id']}_{part}"}
