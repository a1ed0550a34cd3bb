"""Dialogues: roles by one name each, questions and replies in turn."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from llama_acc.core.data.convert.rules import Malformed, Record, Skipped
from llama_acc.core.data.rows import type_name

Turn = tuple[str, str]
"""(role, text); the role is "human", "gpt" or "system"."""

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "claude", "bot", "model"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_Made = TypeVar("_Made")
_TOOLS = ("tool", "function", "function_call", "tool_call", "observation")


def role_of(name: str) -> str:
    """A role by the name that it has here.

    Raises:
        Malformed: it is unknown.
        Skipped: it speaks of tools.
    """
    role = ROLES.get(name) or ROLES.get(name.strip().lower())
    if role is not None:
        return role
    if name.strip().lower() in _TOOLS:
        raise Skipped("has calls of tools")
    raise Malformed(f"unknown role {name!r}: it is one of {', '.join(ROLES)}")


def object_of(value: Any) -> dict[str, Any]:
    """A turn, which has to be an object.

    Raises:
        Malformed: it is something else.
    """
    if not isinstance(value, dict):
        raise Malformed(f"should be an object, but is {type_name(value)}")
    return value


def each_turn(values: Iterable[Any], turn_of: Callable[[Any], _Made]) -> list[_Made]:
    """All turns; what is wrong with one names its number.

    Args:
        values: the turns as the row has them.
        turn_of: makes a turn of one of them.
    """
    turns = []
    for number, value in enumerate(values, start=1):
        try:
            turns.append(turn_of(value))
        except Malformed as error:
            raise Malformed(f"turn {number}: {error}") from error
    return turns


def in_exchanges(turns: Iterable[Turn], notes: Counter[str]) -> list[Turn]:
    """Questions and replies in turn, beginning with a question and ending with a reply.

    A system text goes in front of the question that follows it, with a blank line between. Turns of one role in a row
    become one. Replies without a question, questions without a reply and exchanges with a blank side are left out.

    Args:
        turns: in any order.
        notes: counts what was changed.

    Raises:
        Skipped: nothing is left.
    """
    joined: list[Turn] = []
    for role, text in _with_system_in_front(turns, notes):
        if joined and joined[-1][0] == role:
            notes["turns of one role in a row were joined"] += 1
            joined[-1] = role, f"{joined[-1][1]}\n\n{text}"
        else:
            joined.append((role, text))
    if joined and joined[0][0] == "gpt":
        notes["replies without a question were left out"] += 1
        del joined[0]
    if len(joined) % 2:
        notes["questions without a reply were left out"] += 1
        del joined[-1]
    kept = []
    for question, reply in zip(joined[::2], joined[1::2], strict=True):
        if question[1].strip() and reply[1].strip():
            kept += [question, reply]
        else:
            notes["exchanges with nothing on one side were left out"] += 1
    if not kept:
        raise Skipped("no question with a reply")
    return kept


def conversations(turns: Iterable[Turn]) -> list[Record]:
    """Turns as they are written."""
    return [{"from": role, "value": text} for role, text in turns]


def _with_system_in_front(turns: Iterable[Turn], notes: Counter[str]) -> Iterable[Turn]:
    system: list[str] = []
    for role, text in turns:
        if role == "system":
            if text.strip():
                notes["system texts were put in front of the question that follows"] += 1
                system.append(text)
        elif role == "human" and system:
            yield role, "\n\n".join([*system, text])
            system = []
        else:
            yield role, text
    if system:
        notes["system texts without a question were left out"] += len(system)
