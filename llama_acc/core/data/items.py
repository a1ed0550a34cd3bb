"""Items: what one row of a data file has to be, and everything that may be wrong with it.

Two kinds: single-turn (`instruction`, `input`, `output`) and dialogue (`conversations: [{from, value}, ...]`).
"""

import difflib
from typing import Any, NamedTuple

from llama_acc.core.data.findings import Finding, beginning
from llama_acc.core.data.rows import type_name
from llama_acc.core.data.templates import Turn

ROLES = {"human": "human", "user": "human", "gpt": "assistant", "assistant": "assistant"}


class SingleTurn(NamedTuple):
    """An instruction and the answer to it."""

    instruction: str
    input: str | None
    output: str


class Dialogue(NamedTuple):
    """Turns of a conversation, in the order of the file."""

    turns: list[Turn]


Item = SingleTurn | Dialogue


def kind_of(value: Any) -> str | None:
    """The kind of items that a row's value is one of, going by its keys; None if it is not to be told."""
    if not isinstance(value, dict):
        return None
    if "conversations" in value:
        return "dialogue"
    return "single_turn" if "instruction" in value or "output" in value else None


def item_of(value: Any, kind: str, where: str = "") -> tuple[Item | None, list[Finding]]:
    """A row's value as an item, or all that keeps it from being one.

    Args:
        value: what was read.
        kind: "single_turn" or "dialogue".
        where: its place in the file, for the findings.

    Returns:
        The item, and no findings; or None, and some.
    """
    problems = _Problems(where)
    if not isinstance(value, dict):
        problems.add("no_item", "", f"should be an object, but is {type_name(value)}", value)
        return None, problems.found
    if value.get("image"):
        problems.add("image", "image", "has an 'image': images are not supported yet", value["image"])
    item = _dialogue(value, problems) if kind == "dialogue" else _single_turn(value, problems)
    return (None if problems.found else item), problems.found


class _Problems:
    """Collects what is wrong with one item."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.found: list[Finding] = []
        self.turn = ""
        """The turn being looked at, such as "turn 2"."""

    def add(self, kind: str, field: str, message: str, value: Any) -> None:
        inside = f"{self.turn}: " if self.turn else ""
        field = ", ".join(part for part in (self.turn, field) if part)
        self.found.append(Finding(kind, self._where, field, inside + message, beginning(value)))


def _single_turn(value: dict[str, Any], problems: _Problems) -> SingleTurn | None:
    if "conversations" in value and "output" not in value:
        message = "a dialogue (it has 'conversations') among single-turn items"
        problems.add("mixed_kinds", "conversations", message, value["conversations"])
        return None
    instruction = _text(value, "instruction", problems)
    output = _text(value, "output", problems)
    context = None if value.get("input") is None else _text(value, "input", problems)
    return SingleTurn(instruction, context, output)


def _dialogue(value: dict[str, Any], problems: _Problems) -> Dialogue | None:
    turns = value.get("conversations")
    if turns is None:
        _missing(value, "conversations", problems)
        return None
    if not isinstance(turns, list) or not turns:
        problems.add("wrong_type", "conversations", "'conversations' should be a list of turns", turns)
        return None
    checked = []
    for number, turn in enumerate(turns, start=1):
        problems.turn = f"turn {number}"
        checked.append(_turn(turn, problems))
    return Dialogue(checked)


def _turn(turn: Any, problems: _Problems) -> Turn:
    if not isinstance(turn, dict):
        message = f"should be an object with 'from' and 'value', but is {type_name(turn)}"
        problems.add("no_item", "", message, turn)
        return "", ""
    before = len(problems.found)
    role = _text(turn, "from", problems)
    if len(problems.found) == before and role.lower() not in ROLES:
        message = f"unknown role {role!r} in 'from': it is one of {', '.join(ROLES)}"
        problems.add("unknown_role", "from", message, turn.get("value"))
    return ROLES.get(role.lower(), ""), _text(turn, "value", problems)


def _text(value: dict[str, Any], field: str, problems: _Problems) -> str:
    text = value.get(field)
    if text is None:
        _missing(value, field, problems)
    elif not isinstance(text, str):
        problems.add("wrong_type", field, f"{field!r} should be text, but is {type_name(text)}", text)
    elif not text.isascii() and (place := _surrogate(text)) is not None:
        message = f"{field!r} has a lone surrogate (U+{ord(text[place]):04X}) at character {place + 1}"
        problems.add("surrogate", field, message, text)
    else:
        return text
    return ""


def _missing(value: dict[str, Any], field: str, problems: _Problems) -> None:
    keys = ", ".join(repr(key) for key in list(value)[:6]) or "none"
    near = [key for key in list(value)[:20] if difflib.get_close_matches(str(key).lower(), [field], cutoff=0.6)]
    message = f"{field!r} is null" if field in value else f"no {field!r} (its keys: {keys})"
    if near and field not in value:
        message += f"; did you mean {near[0]!r}?"
    problems.add("missing_field", field, message, value)


def _surrogate(text: str) -> int | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None
