"""Items: what one row of a data file has to be, everything that may be wrong with it, and a file of them as a stream.

Two kinds: single-turn (`instruction`, `input`, `output`; or `caption` alone, an output without an instruction) and
dialogue (`conversations: [{from, value}, ...]`, or OpenAI's `messages: [{role, content}, ...]`; or a single-turn item
with a `history`). Each may have images and a `system` text of its own, and a turn may say that it is not to be trained
on. Other keys are counted, or refused where they change the meaning of the item (`keys.py`).
"""

import difflib
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from llama_acc.core.data.findings import Finding, beginning
from llama_acc.core.data.keys import (
    IMAGES,
    INPUT,
    PREFERENCE,
    SYSTEM,
    TRAINED,
    Malformed,
    as_list,
    count_unused,
    is_empty,
    key_of,
    type_name,
    unused_keys,
    weight_of,
)
from llama_acc.core.data.plain_text import PLAIN_SUFFIXES, TEXT_KEYS, Text, sections
from llama_acc.core.data.read import BytesRead, Row, data_suffix, looked_ahead, stream_rows
from llama_acc.core.data.templates import Turn, as_dialogue
from llama_acc.core.data.tools import (
    CALL_ROLES,
    MESSAGE_KEYS,
    RESULT_ROLES,
    TOOLS,
    called_in,
    message_fields,
    tools_of,
    without_thoughts,
)
from llama_acc.core.errors import UserError

FORMATS = ("auto", "single_turn", "dialogue", "single_turn_llava", "text")
ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    **dict.fromkeys(CALL_ROLES, "assistant"),
    **dict.fromkeys(RESULT_ROLES, "tool"),
}
_DIALOGUE_KEYS = frozenset((*TOOLS, *IMAGES, *SYSTEM))
_SINGLE_TURN_KEYS = frozenset(("instruction", "output", "history", *INPUT, *IMAGES, *SYSTEM))
_IMAGE_KEYS = frozenset((*IMAGES, "url"))
_CAPTION_KEYS = frozenset(("caption", "url", *IMAGES, *SYSTEM))
_TEXT_PARTS = ("text", "input_text", "output_text")
_SAYING = ("output", "caption", "instruction", "history", *INPUT, *IMAGES)
"""What a single-turn item may say."""
_LOOKED_AT = 1000  # rows that may say which kind of items a file has
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class SingleTurn(NamedTuple):
    """An instruction and the answer to it."""

    instruction: str
    input: str | None
    output: str
    images: tuple[str, ...] = ()  # references as they are written: relative paths begin at the data's image root
    system: str | None = None  # a system text of its own, in place of the prompt format's


class Dialogue(NamedTuple):
    """Turns of a conversation, in the order of the file; the rest as that of `SingleTurn`."""

    turns: list[Turn]
    images: tuple[str, ...] = ()
    system: str | None = None
    tools: tuple[dict[str, Any], ...] = ()  # the functions that the assistant may call, as chat templates take them

    @property
    def uses_tools(self) -> bool:
        """Whether only a format that knows of tools can write it."""
        return bool(self.tools) or any(turn.role == "tool" or "tool_calls" in turn.more for turn in self.turns)


Item = SingleTurn | Dialogue | Text


class _Names(NamedTuple):
    """By which keys a row has its turns, and a turn its role and its text."""

    turns: str
    role: str
    text: str

    def role_of(self, turn: dict[str, Any]) -> str:
        """The role of a turn by our name; none: it is not known."""
        return ROLES.get(str(turn.get(self.role)).lower(), "")


def _names_in(row: dict[str, Any]) -> _Names:
    """ShareGPT's names or OpenAI's. Some collections have the turns of one in the field of the other."""
    has_messages = row.get("messages") is not None and row.keys().isdisjoint(("conversations", "output"))
    field = "messages" if has_messages else "conversations"
    turns = as_list(row.get(field))
    first = turns[0] if isinstance(turns, list) and turns else None
    is_openais = isinstance(first, dict) and not first.keys().isdisjoint(("role", "content"))
    return _Names(field, "role", "content") if is_openais else _Names(field, "from", "value")


class Adapt(NamedTuple):
    """What a source's items are used without."""

    last_only: bool = False  # only the last reply of a dialogue is trained
    drop_reasoning: bool = False  # replies lose their reasoning


_AS_IT_IS = Adapt()


class Checked(NamedTuple):
    """A row as it was found: an item, or what is wrong with it."""

    where: str
    item: Item | None  # None: it cannot be trained on, or is blank
    problems: list[Finding]


class ItemStream:
    """The checked items of a file, in order; to be iterated once."""

    def __init__(self, kind: str, rows: Iterator[Row], adapt: Adapt, is_document: bool = False) -> None:
        """`is_document`: the rows are blocks of one text."""
        self.kind, self._rows, self._adapt, self._is_document = kind, rows, adapt, is_document
        self.unused: Counter[str] = Counter()  # keys and parts that are not used, and in how many of the items so far

    def __iter__(self) -> Iterator[Checked]:
        """Raises UserError where the file cannot be read further, if need be after items."""
        if self._is_document:
            yield from _sections("item 1", (row.value["text"] for row in self._rows))
            return
        for where, value, problem in self._rows:
            if problem is not None:
                yield Checked(where, None, [Finding("unreadable", where, "", problem, beginning(value))])
                continue
            item, problems = item_of(value, self.kind, where, self.unused)
            if isinstance(item, Text):
                yield from _sections(where, [item.text])
                continue
            if item is not None and any(self._adapt):
                item, unused = adapted(item, *self._adapt)
                count_unused(self.unused, unused)
            yield Checked(where, item, problems)


def _sections(where: str, blocks: Iterable[str]) -> Iterator[Checked]:
    for item in sections(blocks):
        if item.begins and item.ends and not item.text.strip():
            yield Checked(where, None, [Finding("blank", where, "", "a document without a word", beginning(item.text))])
        else:
            yield Checked(where, item, [])


def stream_items(
    path: Path, format: str = "auto", adapt: Adapt = _AS_IT_IS, *, progress: BytesRead | None = None
) -> ItemStream:
    """The items of one data file in constant memory.

    `format` is "single_turn", "dialogue", "single_turn_llava" (a dialogue's first exchange as a single-turn item),
    "text" (see `plain_text`), or "auto": by the keys of its items. The file is no pipe.
    """
    assert format in FORMATS
    is_document = data_suffix(path) in PLAIN_SUFFIXES
    format = "text" if is_document else format
    required = () if format == "text" else ("instruction", "output")
    rows = stream_rows(path, required=required, progress=progress, pipes=False)
    # Up to one that tells the kind of items: a broken first row does not make all others wrong, and single-turn items
    # with a `history` are dialogues if any of them has something in it.
    first, rows = looked_ahead(rows, _LOOKED_AT, _tells_kind)
    if not first:
        raise UserError(f"{path} holds no items")
    if format == "single_turn_llava":
        return ItemStream("single_turn", (row._replace(value=first_exchange(row.value)) for row in rows), adapt)
    kinds = (kind_of(row.value) for row in reversed(first))
    kind = format if format != "auto" else next(filter(None, kinds), "single_turn")
    return ItemStream(kind, rows, adapt, is_document)


def _tells_kind(row: Row) -> bool:
    kind = kind_of(row.value)
    return kind == "dialogue" or (kind is not None and "history" not in row.value)


def kind_of(value: Any) -> str | None:
    """The kind of items that a row's value is one of, going by its keys; None if it is not to be told."""
    if not isinstance(value, dict):
        return None
    history = as_list(value.get("history"))
    if _names_in(value).turns in value or (isinstance(history, list) and history):
        return "dialogue"
    if any(key in value for key in ("instruction", "output", "caption")):
        return "single_turn"
    return "text" if "text" in value else None


def item_of(
    value: Any, kind: str, where: str = "", unused: Counter[str] | None = None
) -> tuple[Item | None, list[Finding]]:
    """A row's value as an item, or all that keeps it from being one.

    `kind` is "single_turn", "dialogue" or "text", `where` the row's place in the file, for the findings. `unused`
    counts keys that are not used.
    """
    problems = _Problems(where)
    item = _item(value, kind, problems)
    if problems.found:
        return None, problems.found
    if unused is not None:
        count_unused(unused, problems.unused)
    return item, []


def first_exchange(value: Any) -> Any:
    """The first question and answer of a dialogue as a single-turn item, unchanged; anything else unchanged.

    (LLaMA2-Accessory's preprocess `single_turn_llava`.)
    """
    if not isinstance(value, dict):
        return value
    names = _names_in(value)
    turns = as_list(value.get(names.turns))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns[:3]):
        return value
    has_system = bool(turns) and names.role_of(turns[0]) == "system" and turns[0].get(names.text) is not None
    system, exchange = turns[:has_system], turns[has_system : has_system + 2]
    if len(exchange) < 2:
        return value
    rest = {key: item for key, item in value.items() if key != names.turns}
    if system:
        rest["system"] = system[0][names.text]
    if any(exchange[1].get(key) not in (None, True, 1) for key in TRAINED):
        rest["train"] = False
    return {**rest, "instruction": exchange[0].get(names.text), "output": exchange[1].get(names.text)}


class _Problems:
    """Collects what is wrong with one item."""

    def __init__(self, where: str) -> None:
        self._where = where
        self.found: list[Finding] = []
        self.turn = ""  # the turn being looked at, such as "turn 2"
        self.unused: set[str] = set()  # keys that are not used, those of turns as `conversations[].key`

    def add(self, kind: str, field: str, message: str, value: Any) -> None:
        inside = f"{self.turn}: " if self.turn else ""
        field = ", ".join(part for part in (self.turn, field) if part)
        self.found.append(Finding(kind, self._where, field, inside + message, beginning(value)))

    def look_for_unused(self, row: dict[str, Any], used: frozenset[str], inside: str = "") -> None:
        """Note the keys of a row or turn that are not used, and refuse those that change its meaning."""
        keys, reason = unused_keys(row, used)
        if reason is not None:
            self.add("unsupported" if keys.isdisjoint(PREFERENCE) else "preference", "", reason, row)
        self.unused |= {inside + key for key in keys}

    def text(self, row: dict[str, Any], field: str) -> str:
        """A field that has to be text that can be written."""
        text = row.get(field)
        if isinstance(text, str):
            if text.isascii():
                return text
            try:
                text.encode("utf-8")
                return text
            except UnicodeEncodeError as error:
                place = f"(U+{ord(text[error.start]):04X}) at character {error.start + 1}"
                self.add("surrogate", field, f"{field!r} has a lone surrogate {place}", text)
        elif text is not None:
            self.add("wrong_type", field, f"{field!r} should be text, but is {type_name(text)}", text)
        else:
            self.missing(row, field)
        return ""

    def missing(self, row: dict[str, Any], field: str) -> None:
        keys = ", ".join(map(repr, list(row)[:6])) or "none"
        near = [key for key in list(row)[:20] if difflib.get_close_matches(str(key).lower(), [field], cutoff=0.6)]
        question = f"; did you mean {near[0]!r}?" if near else ""
        message = f"{field!r} is null" if field in row else f"no {field!r} (its keys: {keys}){question}"
        self.add("missing_field", field, message, row)

    def either(self, row: dict[str, Any], names: Sequence[str]) -> str | None:
        """The text of one field that goes by several names; None: there is none, or it is null."""
        try:
            field = key_of(row, names)
        except Malformed as error:
            self.add("unsupported", "", str(error), row)
            return None
        return None if field is None else self.text(row, field)


def _item(value: Any, kind: str, problems: _Problems) -> Item | None:
    if not isinstance(value, dict):
        problems.add("no_item", "", f"should be an object, but is {type_name(value)}", value)
        return None
    if kind == "text":
        return _plain_text(value, problems)
    for field in ("conversations", "messages", "history"):
        if isinstance(value.get(field), str):
            value = {**value, field: as_list(value[field])}
    names = _names_in(value)
    if _is_blank(value, names):
        problems.add("blank", "", "no question and no answer", value)
        return None
    is_dialogue = kind == "dialogue" and (names.turns in value or "output" not in value)
    is_caption = not is_dialogue and "caption" in value and "output" not in value
    dialogue_keys = _DIALOGUE_KEYS | {names.turns}
    problems.look_for_unused(
        value, dialogue_keys if is_dialogue else _CAPTION_KEYS if is_caption else _SINGLE_TURN_KEYS
    )
    if problems.found:
        return None
    if is_dialogue:
        return _dialogue(value, names, problems)
    if names.turns in value and "output" not in value:
        message = f"a dialogue (it has {names.turns!r}) among single-turn items"
        problems.add("mixed_kinds", names.turns, message, value[names.turns])
        return None
    system, images = _system(value, problems), _images(value, problems)
    if is_caption:
        return SingleTurn("", None, _caption(value, problems), images, system)
    instruction, output = problems.text(value, "instruction"), problems.text(value, "output")
    context = problems.either(value, INPUT)
    history = _history(value, problems)
    if kind == "dialogue":
        return Dialogue([*history, *as_dialogue(instruction, context, output)], images, system)
    if history:
        message = "turns before the instruction among single-turn items: use format: dialogue"
        problems.add("mixed_kinds", "history", message, value["history"])
    return SingleTurn(instruction, context, output, images, system)


def _plain_text(value: dict[str, Any], problems: _Problems) -> Text:
    """A row of plain text, whose other keys say something about it."""
    field = next((name for name in TEXT_KEYS if value.get(name) is not None), TEXT_KEYS[0])
    problems.unused |= {key for key in value if key != field and not is_empty(value[key])}
    return Text(problems.text(value, field))


def _is_blank(value: dict[str, Any], names: _Names) -> bool:
    """Whether a row has the keys of an item, and nothing in them."""
    output = value.get("output")
    if isinstance(output, str) and output and not output.isspace():
        return False
    if isinstance(turns := value.get(names.turns), list):
        return all(
            isinstance(turn, dict)
            and names.text in turn
            and (is_empty(turn[names.text]) or names.role_of(turn) == "system")
            for turn in turns
        )
    is_item = ("instruction" in value and "output" in value) or "caption" in value
    return is_item and all(is_empty(value.get(key)) for key in _SAYING)


def _history(value: dict[str, Any], problems: _Problems) -> list[Turn]:
    """Earlier questions and answers, in pairs; the answers are trained too, as LLaMA-Factory does."""
    pairs = value.get("history")
    if is_empty(pairs):
        return []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        problems.add("wrong_type", "history", "'history' should be a list of pairs of texts", pairs)
        return []
    texts = [problems.text({"history": text}, "history") for pair in pairs for text in pair]
    return [Turn(("human", "assistant")[place % 2], text) for place, text in enumerate(texts)]


def _system(value: dict[str, Any], problems: _Problems) -> str | None:
    system = problems.either(value, SYSTEM)
    return system if system is not None and system.strip() else None


def _caption(value: dict[str, Any], problems: _Problems) -> str:
    """The caption, or one of a list: which one is chance, but follows from the list."""
    captions = value["caption"]
    if not isinstance(captions, list):
        return problems.text(value, "caption")
    texts = [problems.text({"caption": caption}, "caption") for caption in captions]
    if not texts:
        problems.add("missing_field", "caption", "'caption' is an empty list", captions)
        return ""
    return texts[zlib.crc32("\n".join(texts).encode()) % len(texts)]


def _images(value: dict[str, Any], problems: _Problems) -> tuple[str, ...]:
    """The references of an item's images, in order. LLaMA2-Accessory's captions call the path `url`."""
    if _IMAGE_KEYS.isdisjoint(value):
        return ()
    names = (*IMAGES, "url") if "caption" in value else IMAGES
    field = next((name for name in names if value.get(name)), None)
    if field is None:
        return ()
    references = value[field] if isinstance(value[field], list) else [value[field]]
    for reference in references:
        if not isinstance(reference, str) or not reference:
            message = f"{field!r} should be a path or a list of paths, but holds {type_name(reference)}"
            problems.add("image", field, message, reference)
        elif _ADDRESS.match(reference):
            message = f"{field!r} is an address: images are read from disk, download them first"
            problems.add("image", field, message, reference)
        else:
            problems.text({field: reference}, field)
    return tuple(references)


def _dialogue(value: dict[str, Any], names: _Names, problems: _Problems) -> Dialogue | None:
    turns = value.get(names.turns)
    if turns is None:
        problems.missing(value, names.turns)
        return None
    if not isinstance(turns, list):
        problems.add("wrong_type", names.turns, f"{names.turns!r} should be a list of turns", turns)
        return None
    images, checked = _images(value, problems), []
    for number, turn in enumerate(turns, start=1):
        problems.turn = f"turn {number}"
        checked.append(_turn(turn, names, bool(images), problems))
    problems.turn = ""
    system = _system(value, problems)
    if any(turn.role == "system" for turn in checked):
        system, checked = _split_system(system, checked, problems)
    tools: list[dict[str, Any]] = []
    try:
        tools = tools_of(value)
        if besides := [*tools, *filter(None, (turn.more for turn in checked))]:
            msgspec.json.encode(besides)
    except (Malformed, RecursionError) as error:
        problems.add("unsupported", "tools", str(error), value.get("tools"))
    except UnicodeEncodeError as error:
        message = f"tools or their calls have a lone surrogate (U+{ord(str(error.object)[error.start]):04X})"
        problems.add("surrogate", "tools", message, value.get("tools"))
    return Dialogue(checked, images, system, tuple(tools))


def _split_system(system: str | None, turns: list[Turn], problems: _Problems) -> tuple[str | None, list[Turn]]:
    """The system text of a row together with that of its first turns, and the turns behind those.

    A blank column says nothing, but a blank turn is a system text: the prompt format's own does not take its place.
    """
    begin = next((place for place, turn in enumerate(turns) if turn.role != "system"), len(turns))
    late = next((place for place, turn in enumerate(turns) if place > begin and turn.role == "system"), None)
    if late is not None:
        place = f"turn {late + 1}"
        message = f"{place} is a system text behind the first turn (`llama-acc convert-data sharegpt` moves it)"
        problems.add("unsupported", place, message, turns[late].text)
    # Some collections have the same text in a column and in a turn.
    texts = dict.fromkeys(text for text in (system, *(turn.text for turn in turns[:begin])) if not is_empty(text))
    blank = turns[0].text if begin else None
    return "\n\n".join(filter(None, texts)) if texts else blank, turns[begin:]


def _turn(turn: Any, names: _Names, has_images: bool, problems: _Problems) -> Turn:
    field, role_key, text_key = names
    if not isinstance(turn, dict):
        message = f"should be an object with {role_key!r} and {text_key!r}, but is {type_name(turn)}"
        problems.add("no_item", "", message, turn)
        return Turn("", "")
    keys = frozenset((role_key, text_key, *TRAINED, *MESSAGE_KEYS.get(names.role_of(turn), ())))
    problems.look_for_unused(turn, keys, f"{field}[].")
    before = len(problems.found)
    said = problems.text(turn, role_key)
    role = ROLES.get(said.lower(), "")
    if not role and len(problems.found) == before:
        known = f"it is one of {', '.join(ROLES)} (`llama-acc convert-data` has more)"
        message = f"unknown role {said!r} in {role_key!r}: {known}"
        problems.add("unknown_role", role_key, message, turn.get(text_key))
    if isinstance(parts := turn.get(text_key), list) and all(isinstance(part, dict) for part in parts):
        turn = {**turn, text_key: _joined(parts, text_key, has_images, problems)}
    may_be_silent = turn.get(text_key) is None and not is_empty(turn.get("tool_calls") or turn.get("function_call"))
    text, weight, more = "" if may_be_silent else problems.text(turn, text_key), 1.0, dict[str, Any]()
    try:
        weight, more = weight_of(turn, role == "assistant"), message_fields(turn, role)
        if said.lower() in CALL_ROLES:
            text, more = "", more | called_in(text)
    except Malformed as error:
        problems.add("unsupported", "", str(error), turn)
    return Turn(role, text, weight, more)


def _joined(parts: list[dict[str, Any]], field: str, has_images: bool, problems: _Problems) -> str:
    """The text of a message in parts, some of which may say where the item's images are."""
    texts = []
    for part in parts:
        if (kind := part.get("type")) in _TEXT_PARTS:
            texts.append(problems.text(part, "text"))
        elif kind != "image" or not has_images:
            message = f"{field!r} has a part that is no text: pictures are named in the item's 'images'"
            problems.add("unsupported", field, message, part)
    return "\n\n".join(texts)


def adapted(item: Item, last_only: bool, drop_reasoning: bool) -> tuple[Item, list[str]]:
    """An item without what an `Adapt` leaves out, and what that was."""
    unused = []
    if drop_reasoning:
        kept = _without_reasoning(item)
        unused += ["reasoning"] * (kept != item)
        item = kept
    if last_only and isinstance(item, Dialogue):
        earlier = [place for place, turn in enumerate(item.turns) if turn.role == "assistant"][:-1]
        turns = [turn._replace(weight=0.0) if place in earlier else turn for place, turn in enumerate(item.turns)]
        unused += ["replies before the last"] * (turns != item.turns)
        item = item._replace(turns=turns)
    return item, unused


def _without_reasoning(item: Item) -> Item:
    assert not isinstance(item, Text)
    if isinstance(item, SingleTurn):
        return item._replace(output=without_thoughts(item.output))
    turns = [
        turn._replace(
            text=without_thoughts(turn.text),
            more={field: value for field, value in turn.more.items() if field != "reasoning_content"},
        )
        if turn.role == "assistant"
        else turn
        for turn in item.turns
    ]
    return item._replace(turns=turns)
