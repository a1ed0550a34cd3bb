"""Items: what one row of a data file has to be, everything that may be wrong with it, and what its keys mean.

Two kinds: single-turn (`instruction`, `input`, `output`; or `caption` alone, an output without an instruction) and
dialogue (`conversations: [{from, value}, ...]`; or a single-turn item with a `history`). Each may have images and a
`system` text of its own, and a turn may say that it is not to be trained on. Other keys are counted, or refused where
they change the meaning of the item. Their names are those of OpenAI's fine-tuning format (`weight`, `tools`), axolotl
(`train`, `training`, `train_detail`), ms-swift (`loss`, `rejected_response`), LLaMA-Factory (`system`, `history`,
`tools`, `images`, `kto_tag`), trl (`chosen`, `rejected`), Dolly (`context`) and OpenOrca (`system_prompt`).
"""

import difflib
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from llama_acc.core.data.findings import Finding, beginning
from llama_acc.core.data.templates import Turn, as_dialogue
from llama_acc.core.text import count_text, escape_control_chars

SYSTEM = ("system", "system_prompt")
INPUT = ("input", "context")
IMAGES = ("image", "images")
TRAINED = ("train", "training", "trainable", "loss", "weight")
"""Of a turn: whether it is trained on, as true or false, 1 or 0."""
PREFERENCE = ("chosen", "rejected", "rejected_response", "preferred_output", "non_preferred_output")
UNUSABLE = {
    **dict.fromkeys(PREFERENCE, "pairs of a preferred and a rejected reply cannot be trained on as they are"),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), "calls of tools cannot be trained on"),
    **dict.fromkeys(("audio", "audios", "video", "videos"), "sound and video cannot be trained on"),
    "train_detail": "parts of a reply cannot be trained on alone",
    "history": "earlier turns have to be in the conversation itself",
}
UNDESIRABLE = ("kto_tag", "train", "label")
"""False: a reply is not to be trained on; `label` beside a `completion` only."""
PAIRS = (
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("query", "response"),
    ("input", "output"),
)
"""What the two sides are called in data sets of questions and answers."""
ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
_DIALOGUE_KEYS = frozenset(("conversations", *IMAGES, *SYSTEM))
_SINGLE_TURN_KEYS = frozenset(("instruction", "output", "history", *INPUT, *IMAGES, *SYSTEM))
_IMAGE_KEYS = frozenset((*IMAGES, "url"))
_CAPTION_KEYS = frozenset(("caption", "url", *IMAGES, *SYSTEM))
_TRAINED = frozenset(TRAINED)
_TURN_KEYS = _TRAINED | {"from", "value"}
_SAYING = ("output", "caption", "instruction", "history", *INPUT, *IMAGES)
"""What a single-turn item may say."""
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class Malformed(ValueError):
    """A row or a turn is not what it has to be; the message is what is wrong with it."""


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
    """Turns of a conversation, in the order of the file; the rest as that of `SingleTurn`."""

    turns: list[Turn]
    images: tuple[str, ...] = ()
    system: str | None = None


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
    turns = as_list(value.get("conversations")) if isinstance(value, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns[:3]):
        return value
    has_system = bool(turns) and _role(turns[0]) == "system" and turns[0].get("value") is not None
    system, exchange = turns[:has_system], turns[has_system : has_system + 2]
    if len(exchange) < 2:
        return value
    rest = {key: item for key, item in value.items() if key != "conversations"}
    if system:
        rest["system"] = system[0]["value"]
    if any(exchange[1].get(key) not in (None, True, 1) for key in TRAINED):
        rest["train"] = False
    return {**rest, "instruction": exchange[0].get("value"), "output": exchange[1].get("value")}


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
    for field in ("conversations", "history"):
        if isinstance(value.get(field), str):
            value = {**value, field: as_list(value[field])}
    if _is_blank(value):
        problems.add("blank", "", "no question and no answer", value)
        return None
    is_dialogue = kind == "dialogue" and ("conversations" in value or "output" not in value)
    is_caption = not is_dialogue and "caption" in value and "output" not in value
    problems.look_for_unused(
        value, _DIALOGUE_KEYS if is_dialogue else _CAPTION_KEYS if is_caption else _SINGLE_TURN_KEYS
    )
    if problems.found:
        return None
    if is_dialogue:
        return _dialogue(value, problems)
    if "conversations" in value and "output" not in value:
        message = "a dialogue (it has 'conversations') among single-turn items"
        problems.add("mixed_kinds", "conversations", message, value["conversations"])
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
    return is_empty(turn["value"]) or _role(turn) == "system"


def _role(turn: dict[str, Any]) -> str:
    return ROLES.get(str(turn.get("from")).lower(), "")


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


def _dialogue(value: dict[str, Any], problems: _Problems) -> Dialogue | None:
    turns = value.get("conversations")
    if turns is None:
        problems.missing(value, "conversations")
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
    late = next((place for place, turn in enumerate(turns) if place > begin and turn.role == "system"), None)
    if late is not None:
        place = f"turn {late + 1}"
        message = f"{place} is a system text behind the first turn (`llama-acc convert-data sharegpt` moves it)"
        problems.add("unsupported", place, message, turns[late].text)
    texts = [system, *(turn.text for turn in turns[:begin])]
    return "\n\n".join(text for text in texts if text and not text.isspace()) or None, turns[begin:]


def _turn(turn: Any, problems: _Problems) -> Turn:
    if not isinstance(turn, dict):
        message = f"should be an object with 'from' and 'value', but is {type_name(turn)}"
        problems.add("no_item", "", message, turn)
        return Turn("", "")
    problems.look_for_unused(turn, _TURN_KEYS, "conversations[].")
    before = len(problems.found)
    said = problems.text(turn, "from")
    role = ROLES.get(said.lower(), "")
    if not role and len(problems.found) == before:
        message = f"unknown role {said!r} in 'from': it is one of {', '.join(ROLES)}"
        problems.add("unknown_role", "from", message, turn.get("value"))
    text, trained = problems.text(turn, "value"), True
    try:
        trained = is_trained(turn, role == "assistant")
    except Malformed as error:
        problems.add("unsupported", "", str(error), turn)
    return Turn(role, text, trained)


# Keys and values of rows and turns


def type_name(value: Any) -> str:
    """The kind of a JSON value in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, blank, or without elements."""
    return (not value or value.isspace()) if isinstance(value, str) else value is None or value == [] or value == {}


def as_list(value: Any) -> Any:
    """A list that is given as its JSON text, as columns of text have it; anything else unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] != "[":
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return value


def unused_keys(
    row: Mapping[str, Any], used: frozenset[str], allowed: Iterable[str] = ()
) -> tuple[set[str], str | None]:
    """The keys that are not used though something is in them, and why the row would mean something else without them;
    `allowed` ones may go."""
    if used.issuperset(row):
        return set(), None
    keys = {key for key in row.keys() - used if not is_empty(row[key])}
    return keys, unusable(row, sorted(keys.difference(allowed)))


def unusable(row: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """Why a row or a turn would mean something else without these of its keys; None: it would not."""
    for key in keys:
        value = row[key]
        if key in UNUSABLE and not is_empty(value) and value not in ("[]", "{}", "null"):
            return f"{UNUSABLE[key]} ({key!r})"
        if value is False and key in UNDESIRABLE and (key != "label" or "completion" in row):
            return f"a reply that is marked as not to be trained on ({key!r} is false)"
    return None


def key_of(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """By which of its names a row has a field; None: by none, or it is null.

    Raises:
        Malformed: by two, which differ.
    """
    given = [name for name in names if row.get(name) is not None]
    if len(given) < 2:
        return given[0] if given else None
    full = [name for name in given if not is_empty(row[name])]
    if any(row[name] != row[full[0]] for name in full):
        raise Malformed(f"{' and '.join(map(repr, full))} are names of one thing, and differ")
    return (full or given)[0]


def is_trained(turn: Mapping[str, Any], is_reply: bool) -> bool:
    """Whether a turn's own keys let it be trained on.

    Raises:
        Malformed: they say something else than yes or no, contradict each other, or ask for a turn that is no reply.
    """
    if _TRAINED.isdisjoint(turn):
        return True
    given = {key: turn[key] for key in TRAINED if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1) or isinstance(value, str):
            raise Malformed(f"{key!r} should be true or false, 1 or 0, but is {beginning(value)}")
        if value and not is_reply and key != "weight":
            raise Malformed(f"{key!r} asks to train on a turn that is no reply, which cannot be done")
    if len({bool(value) for value in given.values()}) > 1:
        raise Malformed(f"{' and '.join(map(repr, given))} contradict each other")
    return not is_reply or all(given.values())


def mapping_of(row: Mapping[str, Any]) -> dict[str, str]:
    """What `--map` may make of a row in no known format: our fields to the row's keys; empty: nothing.

    COLUMN stands for a key that only the user can name.
    """
    texts = [key for key, value in row.items() if isinstance(value, str) and not is_empty(value)]
    dialogues = [key for key, value in row.items() if _is_dialogue(value)]
    for question, answer in PAIRS:
        if question in texts and answer in texts:
            return {"instruction": question, "output": answer}
    if "chosen" in dialogues:
        return {"conversations": "chosen"}
    if "chosen" in row:
        questions = [key for key in texts if key in {question for question, _ in PAIRS}]
        return {"instruction": questions[0], "output": "chosen"} if questions and "chosen" in texts else {}
    if dialogues:
        return {"conversations": dialogues[0]}
    texts = [key for key in texts if not key.lower().endswith("id")]
    if len(texts) == 1 or "text" in texts:
        return {"output": "text" if "text" in texts else texts[0]}
    return {"instruction": "COLUMN", "output": "COLUMN"} if texts else {}


def _is_dialogue(value: Any) -> bool:
    turns = as_list(value)
    is_long = isinstance(turns, list) and len(turns) > 1
    return is_long and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def mapping_words(mapping: Mapping[str, str]) -> str:
    """The options that say so: "--map instruction=question --map output=answer"."""
    words = " ".join(f"--map {field}={shlex.quote(column)}" for field, column in mapping.items())
    plain = ", for text without questions; train it with template: none"
    return words + plain if mapping.keys() == {"output"} else words


def count_unused(unused: Counter[str], names: Iterable[str]) -> None:
    """Count an item's keys that are not used; those behind the first hundred together."""
    for name in names:
        unused[name if name in unused or len(unused) < 100 else "other keys"] += 1


def unused_text(unused: Mapping[str, int]) -> str:
    """Keys that are not used, most frequent first: "source (1,000 items), id (12 items)"."""
    ordered = sorted(unused.items(), key=lambda pair: (-pair[1], pair[0]))
    # A lone surrogate cannot be written anywhere.
    names = [escape_control_chars(key[:60].encode("utf-8", "backslashreplace").decode("utf-8")) for key, _ in ordered]
    return ", ".join(f"{name} ({count_text(count, 'item')})" for name, (_, count) in zip(names, ordered, strict=True))
