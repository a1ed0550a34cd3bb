"""What a converter is, and the words it has for rows that give no item."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from llama_acc.core.data.keys import IMAGES, INPUT, SYSTEM, TRAINED, as_list, is_empty, key_of
from llama_acc.core.data.rows import type_name
from llama_acc.core.tokenizer import Tokenizer

_Value = TypeVar("_Value")

Row = dict[str, Any]
Record = dict[str, Any]
"""An item as it is written: single-turn, or a dialogue."""
BLANK = "blank: no question and no answer"


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

    keys: Collection[str] = ("instruction", "output", "history", *INPUT)
    """Of a row: those that are used, besides `id`, images and the system text."""
    turn_keys: Collection[str] = ("from", "value")
    """Of a turn: those that are used, besides whether it is trained on."""
    turns_in: Collection[str] = ("conversations",)
    """Where a row has its turns."""
    chosen = False
    """Which of a preferred and a rejected reply is trained on was said."""
    may_give_nothing = False
    """That no row gives an item is a result of its own, of which the reference makes an empty array."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.notes: Counter[str] = Counter()
        """What was changed on the way without losing an item, and how often."""

    @cached_property
    def used_keys(self) -> frozenset[str]:
        """All keys of a row that are used."""
        return frozenset(("id", *self.keys, *IMAGES, *SYSTEM))

    @cached_property
    def used_turn_keys(self) -> frozenset[str]:
        """All keys of a turn that are used."""
        return frozenset((*self.turn_keys, *TRAINED))

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
    """A field that has to be a list, perhaps as its JSON text; see `_field`."""
    if isinstance(text := row.get(field), str):
        row = {**row, field: as_list(text)}
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


def single_turn(row: Row, instruction: str = "instruction", output: str = "output", **names: str) -> Record:
    """A row with an instruction and an output as a single-turn item.

    Args:
        row: what is read.
        instruction: the key of that.
        output: the key of that.
        names: keys of `input` and `system`, where they go by a name of their own.

    Raises:
        Skipped: there is nothing in it.
        Malformed: it is wrong.
    """
    context = _named(row, "input", [key for key in INPUT if key not in (instruction, output)], names)
    system = _named(row, "system", SYSTEM, names)
    if (
        is_empty(row.get(output))
        and is_empty(row.get(instruction))
        and {instruction, output} <= row.keys()
        and not context.strip()
    ):
        raise Skipped(BLANK)
    record = {"instruction": text_of(row, instruction), "input": context, "output": text_of(row, output)}
    history = {} if is_empty(as_list(row.get("history"))) else {"history": list_of(row, "history")}
    return {**about(row), **with_system(system), **record, **history}


def _named(row: Row, field: str, usual: Sequence[str], names: Mapping[str, str]) -> str:
    """The text of a field that may be missing, by the key that was named for it, or by its usual ones."""
    if field in names:
        # What was named has to be there, though a row may have nothing in it.
        return optional_text(row, names[field]) if names[field] in row else text_of(row, names[field])
    try:
        key = key_of(row, usual)
    except ValueError as error:
        raise Malformed(str(error)) from error
    return "" if key is None else text_of(row, key)


def system_of(row: Row) -> str:
    """The system text that a row has beside its turns; empty: none."""
    return _named(row, "system", SYSTEM, {})


def with_system(system: str) -> Record:
    """The part of a record with its system text, if there is one."""
    return {"system": system} if system.strip() else {}


def about(row: Row, part: int | None = None) -> Record:
    """The beginning of a record that keeps its row's `id` and images; `part` numbers those of one row.

    Raises:
        Skipped: the images are not given by paths.
    """
    named = {} if row.get("id") is None else {"id": row["id"] if part is None else f"{row['id']}_{part}"}
    images = {key: row[key] for key in IMAGES if not is_empty(row.get(key))}
    for given in images.values():
        if not all(isinstance(path, str) for path in (given if isinstance(given, list) else [given])):
            raise Skipped("has images that are not given by a path")
    return {**named, **images}
