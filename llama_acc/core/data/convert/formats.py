"""The formats by their names, and which of them a file is in."""

from typing import Any, NamedTuple

from llama_acc.core.data.convert.alpaca import Alpaca
from llama_acc.core.data.convert.gorilla import Gorilla
from llama_acc.core.data.convert.lima import Lima
from llama_acc.core.data.convert.llava import Llava
from llama_acc.core.data.convert.mapped import Mapped
from llama_acc.core.data.convert.moss import Moss
from llama_acc.core.data.convert.openai import OpenAi
from llama_acc.core.data.convert.rules import Rule
from llama_acc.core.data.convert.sharegpt import ShareGpt
from llama_acc.core.data.convert.wizardlm import WizardLm
from llama_acc.core.data.keys import PAIRS, as_list

AUTO = "auto"
FORMATS: dict[str, type[Rule]] = {
    "gorilla": Gorilla,
    "llava": Llava,
    "sharegpt": ShareGpt,
    "wizardlm": WizardLm,
    "lima": Lima,
    "alpaca": Alpaca,
    "openai": OpenAi,
    "moss": Moss,
    "csv": Mapped,
    "jsonl": Mapped,
}


class Recognised(NamedTuple):
    """A format, and how it was known."""

    format: str
    why: str
    mapping: dict[str, str]
    """For columns by other names: our field to the row's."""


def recognise(row: dict[str, Any]) -> Recognised | None:
    """The format of a file by one of its rows; None if it is none of those known."""
    for field in ("conversations", "items", "messages"):
        if isinstance(turns := as_list(row.get(field)), list):
            return _dialogue(row, field, turns)
    if isinstance(chat := row.get("chat"), dict) and "turn_1" in chat:
        return Recognised("moss", "its 'chat' has 'turn_1'", {})
    if isinstance(code := row.get("code"), str) and "Instruction" in code:
        return Recognised("gorilla", "it has 'code' with an 'Instruction' in it", {})
    if "Instruction" in row and "Skill" in row:
        return Recognised("wizardlm", "it has 'Instruction' and 'Skill', as WizardLM's test set", {})
    if "instruction" in row and "output" in row:
        return Recognised("alpaca", "it has 'instruction' and 'output'", {})
    for question, answer in PAIRS:
        if question in row and answer in row:
            why = f"it has {question!r} and {answer!r}"
            return Recognised("jsonl", why, {"instruction": question, "output": answer})
    return None


def _dialogue(row: dict[str, Any], field: str, turns: list[Any]) -> Recognised:
    first = turns[0] if turns else None
    if isinstance(first, str):
        return Recognised("lima", f"its {field!r} are a list of texts", {})
    if isinstance(first, dict) and "role" in first and field != "items":
        return Recognised("openai", f"its {field!r} have 'role' and 'content'", {})
    if row.get("image"):
        return Recognised("llava", f"it has an 'image' and {field!r}", {})
    if str(row.get("id", "")).startswith("lima"):
        return Recognised("lima", "its 'id' begins with 'lima'", {})
    if "idx" in row:
        return Recognised("wizardlm", f"it has 'idx' and {field!r}", {})
    if field == "messages":
        return Recognised("openai", "it has 'messages'", {})
    return Recognised("sharegpt", f"its {field!r} have 'from' and 'value'", {})
