"""Keys of rows and turns: which are used, which change the meaning of an item, and which are only counted.

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
from llama_acc.core.units import count_text
from llama_acc.core.visible import visible

SYSTEM = ("system", "system_prompt")
INPUT = ("input", "context")
IMAGES = ("image", "images")
PREFERENCE = ("chosen", "rejected", "rejected_response", "preferred_output", "non_preferred_output")
TRAINED = ("train", "training", "trainable", "loss", "weight")
"""Of a turn: whether it is trained on, as true or false, 1 or 0."""

_TRAINED = frozenset(TRAINED)
_PAIR = "pairs of a preferred and a rejected reply cannot be trained on as they are"
_TOOLS = "calls of tools cannot be trained on"
_MEDIA = "sound and video cannot be trained on"
UNUSABLE = {
    **dict.fromkeys(PREFERENCE, _PAIR),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _TOOLS),
    **dict.fromkeys(("audio", "audios", "video", "videos"), _MEDIA),
    "train_detail": "parts of a reply cannot be trained on alone",
    "history": "earlier turns have to be in the conversation itself",
}
UNDESIRABLE = ("kto_tag", "train", "label")
"""False: a reply is not to be trained on; `label` beside a `completion` only."""
_EMPTY_JSON = ("[]", "{}", "null")
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
_QUESTIONS = ("instruction", "prompt", "question", "query", "input")
_MOST = 100
"""Different keys that are counted by name: where keys are data, there may be one for each item."""
_OTHERS = "other keys"
_MOST_CHARACTERS = 60


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


def unusable(row: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """Why a row or a turn with these keys would mean something else without them; None: it would not.

    Args:
        row: the row or turn.
        keys: those of its keys that are not used.
    """
    for key in keys:
        value = row[key]
        if key in UNUSABLE and not is_empty(value) and value not in _EMPTY_JSON:
            return f"{UNUSABLE[key]} ({key!r})"
        if value is False and key in UNDESIRABLE and (key != "label" or "completion" in row):
            return f"a reply that is marked as not to be trained on ({key!r} is false)"
    return None


def key_of(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """By which of its names a row has a field; None: by none, or it is null.

    Raises:
        ValueError: by two, which differ.
    """
    given = [name for name in names if row.get(name) is not None]
    if len(given) < 2:
        return given[0] if given else None
    full = [name for name in given if not is_empty(row[name])]
    if any(row[name] != row[full[0]] for name in full):
        raise ValueError(f"{' and '.join(map(repr, full))} are names of one thing, and differ")
    return (full or given)[0]


def is_trained(turn: Mapping[str, Any], is_reply: bool) -> bool:
    """Whether a turn's own keys let it be trained on.

    Raises:
        ValueError: they say something else than yes or no, contradict each other, or ask for a turn that is no reply.
    """
    if _TRAINED.isdisjoint(turn):
        return True
    given = {key: turn[key] for key in TRAINED if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1) or isinstance(value, str):
            raise ValueError(f"{key!r} should be true or false, 1 or 0, but is {beginning(value)}")
        if value and not is_reply and key != "weight":
            raise ValueError(f"{key!r} asks to train on a turn that is no reply, which cannot be done")
    if len({bool(value) for value in given.values()}) > 1:
        raise ValueError(f"{' and '.join(map(repr, given))} contradict each other")
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
        questions = [key for key in _QUESTIONS if key in texts]
        return {"instruction": questions[0], "output": "chosen"} if questions and "chosen" in texts else {}
    if dialogues:
        return {"conversations": dialogues[0]}
    texts = [key for key in texts if not key.lower().endswith("id")]
    if len(texts) == 1 or "text" in texts:
        return {"output": "text" if "text" in texts else texts[0]}
    return {"instruction": "COLUMN", "output": "COLUMN"} if texts else {}


def _is_dialogue(value: Any) -> bool:
    value = as_list(value)
    turns = value if isinstance(value, list) and len(value) > 1 else [None]
    return all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def mapping_words(mapping: Mapping[str, str]) -> str:
    """The options that say so: "--map instruction=question --map output=answer"."""
    words = " ".join(f"--map {field}={shlex.quote(column)}" for field, column in mapping.items())
    return (
        words if mapping.keys() != {"output"} else f"{words}, for text without questions; train it with template: none"
    )


def count_unused(unused: Counter[str], names: Iterable[str]) -> None:
    """Count an item's keys that are not used."""
    for name in names:
        unused[name if name in unused or len(unused) < _MOST else _OTHERS] += 1


def unused_text(unused: Mapping[str, int]) -> str:
    """Keys that are not used, most frequent first: "source (1,000 items), id (12 items)"."""
    ordered = sorted(unused.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{_name(key)} ({count_text(count, 'item')})" for key, count in ordered)


def _name(key: str) -> str:
    # A lone surrogate cannot be written anywhere.
    return visible(key[:_MOST_CHARACTERS].encode("utf-8", "backslashreplace").decode("utf-8"))
