"""Items: what one row of a data file has to be, and everything that may be wrong with it.

Two kinds: single-turn (`instruction`, `input`, `output`; or `caption` alone, an output without an instruction) and
dialogue (`conversations: [{from, value}, ...]`). Each may have an `image`, or a list of them.
"""

import difflib
import re
import zlib
from typing import Any, NamedTuple

from llama_acc.core.data.findings import Finding, beginning
from llama_acc.core.data.rows import type_name
from llama_acc.core.data.templates import Turn

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

ROLES = {"human": "human", "user": "human", "gpt": "assistant", "assistant": "assistant"}


class SingleTurn(NamedTuple):
    """An instruction and the answer to it."""

    instruction: str
    input: str | None
    output: str
    images: tuple[str, ...] = ()
    """References as they are written: relative paths begin at the data's image root."""
    system: str | None = None
    """A system text of its own, in place of the prompt format's."""


class Dialogue(NamedTuple):
    """Turns of a conversation, in the order of the file."""

    turns: list[Turn]
    images: tuple[str, ...] = ()
    """As those of `SingleTurn`."""
    system: str | None = None
    """As that of `SingleTurn`."""


Item = SingleTurn | Dialogue


def kind_of(value: Any) -> str | None:
    """The kind of items that a row's value is one of, going by its keys; None if it is not to be told."""
    if not isinstance(value, dict):
        return None
    if "conversations" in value:
        return "dialogue"
    return "single_turn" if any(key in value for key in ("instruction", "output", "caption")) else None


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
    item = _dialogue(value, problems) if kind == "dialogue" else _single_turn(value, problems)
    return (None if problems.found else item), problems.found


def first_exchange(value: Any) -> Any:
    """The first question and answer of a dialogue as a single-turn item, as they stand; anything else as it is.

    (LLaMA2-Accessory's preprocess `single_turn_llava`.)
    """
    turns = value.get("conversations") if isinstance(value, dict) else None
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return value
    question, answer = turns[:2]
    image = {"image": value["image"]} if "image" in value else {}
    return {"instruction": question.get("value"), "output": answer.get("value"), **image}


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
    if "caption" in value and "output" not in value:
        return SingleTurn("", None, _caption(value, problems), _images(value, problems))
    instruction = _text(value, "instruction", problems)
    output = _text(value, "output", problems)
    context = None if value.get("input") is None else _text(value, "input", problems)
    return SingleTurn(instruction, context, output, _images(value, problems))


def _caption(value: dict[str, Any], problems: _Problems) -> str:
    """The caption, or one of a list: which one is chance, but follows from the list."""
    captions = value["caption"]
    if not isinstance(captions, list):
        return _text(value, "caption", problems)
    texts = [_text({"caption": caption}, "caption", problems) for caption in captions]
    if not texts:
        problems.add("missing_field", "caption", "'caption' is an empty list", captions)
        return ""
    return texts[zlib.crc32("\n".join(texts).encode(errors="surrogatepass")) % len(texts)]


def _images(value: dict[str, Any], problems: _Problems) -> tuple[str, ...]:
    """The references of an item's images, in order. LLaMA2-Accessory's captions call the path `url`."""
    field = "url" if "caption" in value and not value.get("image") else "image"
    given = value.get(field) or []
    references = given if isinstance(given, list) else [given]
    for reference in references:
        if not isinstance(reference, str) or not reference:
            message = f"{field!r} should be a path or a list of paths, but holds {type_name(reference)}"
            problems.add("image", field, message, reference)
        elif _ADDRESS.match(reference):
            message = f"{field!r} is an address: images are read from disk, download them first"
            problems.add("image", field, message, reference)
        else:
            _text({field: reference}, field, problems)
    return tuple(references)


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
    problems.turn = ""
    return Dialogue(checked, _images(value, problems))


def _turn(turn: Any, problems: _Problems) -> Turn:
    if not isinstance(turn, dict):
        message = f"should be an object with 'from' and 'value', but is {type_name(turn)}"
        problems.add("no_item", "", message, turn)
        return Turn("", "")
    before = len(problems.found)
    role = _text(turn, "from", problems)
    if len(problems.found) == before and role.lower() not in ROLES:
        message = f"unknown role {role!r} in 'from': it is one of {', '.join(ROLES)}"
        problems.add("unknown_role", "from", message, turn.get("value"))
    return Turn(ROLES.get(role.lower(), ""), _text(turn, "value", problems))


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
