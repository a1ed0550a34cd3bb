"""Keys of rows and turns, by the names that data sets have for them: which are used, and which change what a row means.

The names are those of OpenAI's fine-tuning format (`weight`, `tools`), axolotl (`train`, `training`, `train_detail`),
ms-swift (`loss`, `rejected_response`), LLaMA-Factory (`system`, `history`, `tools`, `images`, `kto_tag`), trl
(`chosen`, `rejected`), Dolly (`context`) and OpenOrca (`system_prompt`).
"""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from llama_acc.core.data.findings import beginning
from llama_acc.core.text import count_text, escape_control_chars

SYSTEM = ("system", "system_prompt")
INPUT = ("input", "context")
IMAGES = ("image", "images")
TRAINED = ("train", "training", "trainable", "loss", "weight")
"""Of a turn: whether it is trained on, as true or false, 1 or 0; `weight` also how much, between these."""
PREFERENCE = ("chosen", "rejected", "rejected_response", "preferred_output", "non_preferred_output")
UNUSABLE = {
    **dict.fromkeys(PREFERENCE, "pairs of a preferred and a rejected reply cannot be trained on as they are"),
    **dict.fromkeys(("tools", "functions"), "tools go with dialogues (conversations)"),
    **dict.fromkeys(("tool_calls", "function_call"), "calls of tools are a turn of the assistant"),
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
_TRAINED = frozenset(TRAINED)


class Malformed(ValueError):
    """A row or a turn is not what it has to be; the message is what is wrong with it."""


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


def weight_of(turn: Mapping[str, Any], is_reply: bool) -> float:
    """How much a turn's tokens count in the loss, going by its own keys: from 0 to 1.

    Raises:
        Malformed: they say something else, contradict each other, or ask for a turn that is no reply.
    """
    if _TRAINED.isdisjoint(turn):
        return 1.0
    given = {key: turn[key] for key in TRAINED if turn.get(key) is not None}
    for key, value in given.items():
        if key == "weight" and isinstance(value, float) and 0 <= value <= 1:
            continue
        if value not in (0, 1) or isinstance(value, str):
            wanted = "from 0 to 1" if key == "weight" else "true or false, 1 or 0"
            raise Malformed(f"{key!r} should be {wanted}, but is {beginning(value)}")
        if value and not is_reply and key != "weight":
            raise Malformed(f"{key!r} asks to train on a turn that is no reply, which cannot be done")
    if len({bool(value) for value in given.values()}) > 1:
        raise Malformed(f"{' and '.join(map(repr, given))} contradict each other")
    return float(min(given.values(), default=1.0)) if is_reply else 1.0


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
    replies = [key for key, value in row.items() if isinstance(value, list) and all(isinstance(v, str) for v in value)]
    if replies and not texts:
        return {"conversations": replies[0]}
    if len(texts) == 1 or "text" in texts:
        return {"output": "text" if "text" in texts else texts[0]}
    return {"instruction": "COLUMN", "output": "COLUMN"} if texts else {}


def _is_dialogue(value: Any) -> bool:
    turns = as_list(value)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return False
    is_long = len(turns) > 1 and all("role" in turn or "from" in turn for turn in turns)
    return is_long or all({"input", "output"} <= turn.keys() for turn in turns)


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
    ordered = sorted(((key or "''", count) for key, count in unused.items()), key=lambda pair: (-pair[1], pair[0]))
    # A lone surrogate cannot be written anywhere.
    names = [escape_control_chars(key[:60].encode("utf-8", "backslashreplace").decode("utf-8")) for key, _ in ordered]
    return ", ".join(f"{name} ({count_text(count, 'item')})" for name, (_, count) in zip(names, ordered, strict=True))
