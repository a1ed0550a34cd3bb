"""MOSS 003: `chat` of `turn_1`, `turn_2`, ..., each text between marks of its own."""

import re
from collections.abc import Iterable
from typing import Any

from llama_acc.core.data.convert.rules import Malformed, Record, Row, Rule, Skipped, object_in, text_of
from llama_acc.core.data.convert.turns import Turn, dialogue, each_turn, in_exchanges, object_of

_MARKS = re.compile(r"\A<\|[\w ]+\|>:[ ]?|<eo[a-z]>\s*\Z")
_NOTHING = ("", "None")


class Moss(Rule):
    """MOSS's dialogues, without the description of MOSS that all of them begin with."""

    keys = ("chat", "meta_instruction", "conversation_id")
    turn_keys = ("Human", "MOSS", "Commands", "Tool Responses")
    turns_in = ("chat",)

    def records(self, row: Row) -> Iterable[Record]:
        chat = object_in(row, "chat")
        exchanges = [chat[name] for name in sorted(chat, key=_number)]
        turns = [turn for exchange in each_turn(exchanges, _exchange) for turn in exchange]
        if row.get("meta_instruction"):
            self.notes["descriptions of MOSS were left out"] += 1
        return [dialogue({"id": row.get("conversation_id")}, in_exchanges(turns, self.notes))]


def _exchange(value: Any) -> list[Turn]:
    turn = object_of(value)
    if any(_without_marks(turn.get(field)) not in _NOTHING for field in ("Commands", "Tool Responses")):
        raise Skipped("has calls of tools")
    question, reply = (_without_marks(text_of(turn, field)) for field in ("Human", "MOSS"))
    return [Turn("human", question), Turn("gpt", reply)]


def _without_marks(text: Any) -> str:
    return _MARKS.sub("", text) if isinstance(text, str) else ""


def _number(name: str) -> int:
    digits = name.removeprefix("turn_")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 9):
        raise Malformed(f"'chat' should have the keys turn_1, turn_2, ..., but has {name!r}")
    return int(digits)
