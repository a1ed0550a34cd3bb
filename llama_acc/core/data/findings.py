"""What is wrong, or may be, with an item of a data file: which kind of thing, where, and how the text there begins."""

import json
from collections.abc import Collection
from typing import Any, NamedTuple

_BEGINNING = 60
"""Characters of a value that are shown."""
MOST_PROBLEMS = 1000
"""Of a file that is not to be used with problems: with so many of them, reading on helps nobody."""


class Kind(NamedTuple):
    """One kind of finding."""

    title: str
    """What is counted, in the plural."""
    fatal: bool
    """The item cannot be trained on: it stops a run, or is left out (`data.on_error`)."""


KINDS: dict[str, Kind] = {
    "unreadable": Kind("rows that cannot be read", True),
    "no_item": Kind("values that are not items", True),
    "missing_field": Kind("missing fields", True),
    "wrong_type": Kind("fields that are not text", True),
    "unknown_role": Kind("unknown roles", True),
    "mixed_kinds": Kind("dialogues among single-turn items", True),
    "surrogate": Kind("lone surrogates", True),
    "preference": Kind("pairs of a preferred and a rejected reply", True),
    "unsupported": Kind("items whose keys ask for what cannot be done", True),
    "image": Kind("images that are not given by a path", True),
    "image_file": Kind("images that cannot be opened", True),
    "blank": Kind("blank rows, left out", False),
    "empty_reply": Kind("empty replies", False),
    "role_order": Kind("roles out of order", False),
    "echo": Kind("replies that repeat the question", False),
    "mojibake": Kind("texts decoded wrongly", False),
    "duplicate": Kind("exact duplicates", False),
    "language": Kind("items in another language than the rest", False),
    "stop_in_reply": Kind("replies that hold the format's stop string", False),
    "format_mark": Kind("texts that hold a mark of the format", False),
    "merged": Kind("answers whose first token begins in the prompt", False),
    "no_label": Kind("items without a trained token: dropped", False),
    "cut": Kind("items that are cut", False),
}


class Finding(NamedTuple):
    """One thing found in one item."""

    kind: str
    """A key of `KINDS`."""
    where: str
    """Such as "item 3 (line 7)"."""
    field: str
    """Such as "output", or "turn 2, value"; empty: the item itself."""
    message: str
    value: str = ""
    """How the value there begins, as JSON."""

    def __str__(self) -> str:
        # What is wrong with a field is said by its name; what is doubtful about it is not.
        place = ", ".join(part for part in (self.where, "" if self.fatal else self.field) if part)
        return f"{f'{place}: ' if place else ''}{self.message}{f': {self.value}' if self.value else ''}"

    @property
    def fatal(self) -> bool:
        """The item cannot be trained on."""
        return KINDS[self.kind].fatal


def other_form(kinds: Collection[str], file: str) -> str:
    """What to try with a file of which no row is an item.

    Args:
        kinds: of all findings in it.
        file: its name, as it is typed.
    """
    if set(kinds) == {"mixed_kinds"}:
        whole = "use format: dialogue and template: dialogue"
        first = "format: single_turn_llava for the first question and answer of each"
        return f"they are dialogues: {whole}, or {first}, or for all of them llama-acc convert-data llava {file}"
    if set(kinds) == {"preference"}:
        return f"llama-acc convert-data auto {file} says how to take the preferred reply of each"
    if set(kinds) == {"unsupported"}:
        return "such items can only be left out: data.on_error=skip"
    return f"if it is in a form of its own: llama-acc convert-data auto {file}"


def beginning(value: Any) -> str:
    """How a value begins, in one line: a text in quotes, anything else as JSON."""
    if isinstance(value, str):
        short = json.dumps(value[:_BEGINNING], ensure_ascii=False)
        text = short if len(value) <= _BEGINNING else f"{short} ..."
    else:
        text = _json(value)
        text = text if len(text) <= _BEGINNING else f"{text[:_BEGINNING]} ..."
    # A lone surrogate cannot be written anywhere.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _json(value: Any) -> str:
    try:
        # Of a huge value the beginning only is made into text.
        return "".join(_until(json.JSONEncoder(ensure_ascii=False).iterencode(value), _BEGINNING + 1))
    except (RecursionError, TypeError, ValueError):
        return ""


def _until(parts: Any, characters: int) -> Any:
    for part in parts:
        yield part
        characters -= len(part)
        if characters < 0:
            return
