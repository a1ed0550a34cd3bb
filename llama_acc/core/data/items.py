"""Items: what one row of a data file has to be, and everything that may be wrong with it.

Two kinds: single-turn (`instruction`, `input`, `output`; or `caption` alone, an output without an instruction) and
dialogue (`conversations: [{from, value}, ...]`; or a single-turn item with a `history`). Each may have images and a
`system` text of its own, and a turn may say that it is not to be trained on. Of all other keys see `keys`.
"""

import difflib
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from llama_acc.core.data.findings import Finding, beginning
from llama_acc.core.data.keys import (
    IMAGES,
    INPUT,
    PREFERENCE,
    SYSTEM,
    TRAINED,
    as_list,
    count_unused,
    is_empty,
    is_trained,
    key_of,
    unusable,
)
from llama_acc.core.data.rows import type_name
from llama_acc.core.data.templates import Turn

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

_SYSTEM_ROLES = ("system", "developer")
ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    **dict.fromkeys(_SYSTEM_ROLES, "system"),
}
_KEYS = frozenset(("conversations", *IMAGES, *SYSTEM))
_SINGLE_TURN_KEYS = frozenset(("instruction", "output", "history", *INPUT, *IMAGES, *SYSTEM))
_IMAGE_KEYS = frozenset((*IMAGES, "url"))
_CAPTION_KEYS = frozenset(("caption", "url", *IMAGES, *SYSTEM))
_SAYING = ("output", "caption", "instruction", "history", *INPUT, *IMAGES)
"""What a single-turn item may say."""
_TURN_KEYS = frozenset(("from", "value", *TRAINED))


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
    history = as_list(value.get("history"))
    if "conversations" in value or (isinstance(history, list) and history):
        return "dialogue"
    return "single_turn" if any(key in value for key in ("instruction", "output", "caption")) else None


def item_of(
    value: Any, kind: str, where: str = "", unused: Counter[str] | None = None
) -> tuple[Item | None, list[Finding]]:
    """A row's value as an item, or all that keeps it from being one.

    Args:
        value: what was read.
        kind: "single_turn" or "dialogue".
        where: its place in the file, for the findings.
        unused: counts the keys that are not used.

    Returns:
        The item, and no findings; or None, and some.
    """
    problems = _Problems(where)
    if not isinstance(value, dict):
        problems.add("no_item", "", f"should be an object, but is {type_name(value)}", value)
        return None, problems.found
    for field in ("conversations", "history"):
        if isinstance(value.get(field), str):
            value = {**value, field: as_list(value[field])}
    if _is_blank(value):
        problems.add("blank", "", "no question and no answer", value)
        return None, problems.found
    is_dialogue = kind == "dialogue" and ("conversations" in value or "output" not in value)
    is_caption = not is_dialogue and "caption" in value and "output" not in value
    problems.look_for_unused(value, _KEYS if is_dialogue else _CAPTION_KEYS if is_caption else _SINGLE_TURN_KEYS)
    if problems.found:
        return None, problems.found
    if is_dialogue:
        item: Item | None = _dialogue(value, problems)
    else:
        item = _single_turn(value, problems, kind == "dialogue")
    if problems.found:
        return None, problems.found
    if unused is not None:
        count_unused(unused, problems.unused)
    return item, []


def first_exchange(value: Any) -> Any:
    """The first question and answer of a dialogue as a single-turn item, as they stand; anything else as it is.

    (LLaMA2-Accessory's preprocess `single_turn_llava`.)
    """
    turns = as_list(value.get("conversations")) if isinstance(value, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns[:3]):
        return value
    system = turns[0].get("value") if turns and str(turns[0].get("from")).lower() in _SYSTEM_ROLES else None
    if len(turns) < (2 if system is None else 3):
        return value
    question, answer = turns[:2] if system is None else turns[1:3]
    rest = {key: item for key, item in value.items() if key != "conversations"}
    if system is not None:
        rest["system"] = system
    if any(answer.get(key) not in (None, True, 1) for key in TRAINED):
        rest["train"] = False
    return {**rest, "instruction": question.get("value"), "output": answer.get("value")}


class _Problems:
    """Collects what is wrong with one item."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.found: list[Finding] = []
        self.turn = ""
        """The turn being looked at, such as "turn 2"."""
        self.unused: set[str] = set()
        """Keys that are not used, those of turns as `conversations[].key`."""

    def add(self, kind: str, field: str, message: str, value: Any) -> None:
        inside = f"{self.turn}: " if self.turn else ""
        field = ", ".join(part for part in (self.turn, field) if part)
        self.found.append(Finding(kind, self._where, field, inside + message, beginning(value)))

    def look_for_unused(self, row: dict[str, Any], used: frozenset[str], inside: str = "") -> None:
        """Note the keys of a row or turn that are not used, and refuse those that change its meaning."""
        if used.issuperset(row):
            return
        keys = row.keys() - used
        if (reason := unusable(row, sorted(keys))) is not None:
            self.add("unsupported" if keys.isdisjoint(PREFERENCE) else "preference", "", reason, row)
        self.unused |= {inside + key for key in keys if not is_empty(row[key])}


def _is_blank(value: dict[str, Any]) -> bool:
    """Whether a row has the keys of an item, and nothing in them."""
    output = value.get("output")
    if isinstance(output, str) and output and not output.isspace():
        return False
    if isinstance(turns := value.get("conversations"), list):
        return all(isinstance(turn, dict) and "value" in turn and _says_nothing(turn) for turn in turns)
    is_item = ("instruction" in value and "output" in value) or "caption" in value
    return is_item and all(is_empty(value.get(key)) for key in _SAYING)


def _says_nothing(turn: dict[str, Any]) -> bool:
    return is_empty(turn["value"]) or str(turn.get("from")).lower() in _SYSTEM_ROLES


def _single_turn(value: dict[str, Any], problems: _Problems, as_dialogue: bool) -> Item | None:
    """A single-turn item, with the turns before it as a dialogue."""
    if "conversations" in value and "output" not in value:
        message = "a dialogue (it has 'conversations') among single-turn items"
        problems.add("mixed_kinds", "conversations", message, value["conversations"])
        return None
    system, images = _system(value, problems), _images(value, problems)
    if "caption" in value and "output" not in value:
        return SingleTurn("", None, _caption(value, problems), images, system)
    instruction = _text(value, "instruction", problems)
    output = _text(value, "output", problems)
    context = _either(value, INPUT, problems)
    history = _history(value, problems)
    if not as_dialogue:
        if history:
            message = "turns before the instruction among single-turn items: use format: dialogue"
            problems.add("mixed_kinds", "history", message, value["history"])
        return SingleTurn(instruction, context, output, images, system)
    question = f"{instruction}\n\n{context}" if context and context.strip() else instruction
    return Dialogue([*history, Turn("human", question), Turn("assistant", output)], images, system)


def _history(value: dict[str, Any], problems: _Problems) -> list[Turn]:
    """Earlier questions and answers, in pairs; the answers are trained too, as LLaMA-Factory does."""
    pairs = value.get("history")
    if pairs is None or is_empty(pairs):
        return []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        problems.add("wrong_type", "history", "'history' should be a list of pairs of texts", pairs)
        return []
    for text in (text for pair in pairs for text in pair):
        _text({"history": text}, "history", problems)
    return [turn for question, answer in pairs for turn in (Turn("human", question), Turn("assistant", answer))]


def _system(value: dict[str, Any], problems: _Problems) -> str | None:
    system = _either(value, SYSTEM, problems)
    return system if system is not None and system.strip() else None


def _either(value: dict[str, Any], fields: Sequence[str], problems: _Problems) -> str | None:
    """The text of one field that goes by several names; None: there is none, or it is null."""
    try:
        field = key_of(value, fields)
    except ValueError as error:
        problems.add("unsupported", "", str(error), value)
        return None
    return None if field is None else _text(value, field, problems)


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
    if _IMAGE_KEYS.isdisjoint(value):
        return ()
    names = (*IMAGES, "url") if "caption" in value else IMAGES
    field = next((name for name in names if value.get(name)), "image")
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
    if not isinstance(turns, list):
        problems.add("wrong_type", "conversations", "'conversations' should be a list of turns", turns)
        return None
    checked = []
    for number, turn in enumerate(turns, start=1):
        problems.turn = f"turn {number}"
        checked.append(_turn(turn, problems))
    problems.turn = ""
    system = _system(value, problems)
    if any(turn.role == "system" for turn in checked):
        system, checked = _split_system(system, checked, problems)
    return Dialogue(checked, _images(value, problems), system)


def _split_system(system: str | None, turns: list[Turn], problems: _Problems) -> tuple[str | None, list[Turn]]:
    """The system text of a row together with that of its first turns, and the turns behind those."""
    begin = next((place for place, turn in enumerate(turns) if turn.role != "system"), len(turns))
    late = [number for number, turn in enumerate(turns[begin:], start=begin + 1) if turn.role == "system"]
    if late:
        message = f"turn {late[0]} is a system text behind the first turn (llama-acc convert-data sharegpt moves it)"
        problems.add("unsupported", f"turn {late[0]}", message, turns[late[0] - 1].text)
    texts = [system, *(turn.text for turn in turns[:begin])]
    return "\n\n".join(text for text in texts if text and not text.isspace()) or None, turns[begin:]


def _turn(turn: Any, problems: _Problems) -> Turn:
    if not isinstance(turn, dict):
        message = f"should be an object with 'from' and 'value', but is {type_name(turn)}"
        problems.add("no_item", "", message, turn)
        return Turn("", "")
    problems.look_for_unused(turn, _TURN_KEYS, "conversations[].")
    before = len(problems.found)
    role = _text(turn, "from", problems)
    if len(problems.found) == before and role.lower() not in ROLES:
        message = f"unknown role {role!r} in 'from': it is one of {', '.join(ROLES)}"
        problems.add("unknown_role", "from", message, turn.get("value"))
    role = ROLES.get(role.lower(), "")
    return Turn(role, _text(turn, "value", problems), _trained(turn, role, problems))


def _trained(turn: dict[str, Any], role: str, problems: _Problems) -> bool:
    try:
        return is_trained(turn, role == "assistant")
    except ValueError as error:
        problems.add("unsupported", "", str(error), turn)
        return True


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
