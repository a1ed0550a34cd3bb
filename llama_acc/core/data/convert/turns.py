"""Dialogues: roles by one name each, questions and replies in turn."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from llama_acc.core.data.convert.rules import Malformed, Record, Row, Skipped, about, text_of, with_system
from llama_acc.core.data.keys import is_trained
from llama_acc.core.data.rows import type_name


class Turn(NamedTuple):
    """One turn."""

    role: str
    """"human", "gpt" or "system"."""
    text: str
    trained: bool = True
    """False: a reply that is context only."""


class Exchanges(NamedTuple):
    """A dialogue in order: questions and replies in turn."""

    system: str
    """Empty: none of its own."""
    turns: list[Turn]


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


def turn_of(value: Any, role: str = "from", text: str = "value") -> Turn:
    """A turn by the keys of its role and text.

    Raises:
        Malformed: it is wrong.
        Skipped: it speaks of tools.
    """
    turn = object_of(value)
    name = role_of(text_of(turn, role))
    try:
        return Turn(name, text_of(turn, text), is_trained(turn, name == "gpt"))
    except ValueError as error:
        raise Malformed(str(error)) from error


def in_exchanges(turns: Iterable[Turn], notes: Counter[str], system: str = "") -> Exchanges:
    """Questions and replies in turn, beginning with a question and ending with a reply.

    A system text before the first question is the dialogue's; another goes in front of the question that follows it,
    with a blank line between. Turns of one role in a row become one. Replies without a question, questions without a
    reply and exchanges with a blank side are left out.

    Args:
        turns: in any order.
        notes: counts what was changed.
        system: a system text that the row has beside the turns.

    Raises:
        Skipped: nothing is left, or a reply is to be trained on in part.
    """
    before, turns = _split_system([text for text in (system,) if text.strip()], list(turns))
    joined: list[Turn] = []
    for turn in _with_system_in_front(turns, notes):
        if joined and joined[-1].role == turn.role:
            if joined[-1].trained != turn.trained:
                raise Skipped("replies in a row, of which only some are to be trained on")
            notes["turns of one role in a row were joined"] += 1
            joined[-1] = turn._replace(text=f"{joined[-1].text}\n\n{turn.text}")
        else:
            joined.append(turn)
    if joined and joined[0].role == "gpt":
        notes["replies without a question were left out"] += 1
        del joined[0]
    if len(joined) % 2:
        notes["questions without a reply were left out"] += 1
        del joined[-1]
    kept = []
    for question, reply in zip(joined[::2], joined[1::2], strict=True):
        if question.text.strip() and reply.text.strip():
            kept += [question, reply]
        else:
            notes["exchanges with nothing on one side were left out"] += 1
    if not kept:
        raise Skipped("no question with a reply")
    return Exchanges(before, kept)


def dialogue(row: Row, exchanges: Exchanges, part: int | None = None) -> Record:
    """A dialogue as it is written.

    Args:
        row: what it was made of, whose `id` and images it keeps.
        exchanges: the dialogue.
        part: which part of it this is; None: all of it.
    """
    turns = [
        {"from": role, "value": text} if trained else {"from": role, "value": text, "train": False}
        for role, text, trained in exchanges.turns
    ]
    return {**about(row, part), **with_system(exchanges.system), "conversations": turns}


def _split_system(texts: list[str], turns: list[Turn]) -> tuple[str, list[Turn]]:
    """The system text of the whole dialogue, and the turns without those of it that stand before a question."""
    first = next((place for place, turn in enumerate(turns) if turn.role == "human"), 0)
    texts += [turn.text for turn in turns[:first] if turn.role == "system" and turn.text.strip()]
    return "\n\n".join(texts), [turn for turn in turns[:first] if turn.role != "system"] + turns[first:]


def _with_system_in_front(turns: Iterable[Turn], notes: Counter[str]) -> Iterable[Turn]:
    system: list[str] = []
    for turn in turns:
        if turn.role == "system":
            if turn.text.strip():
                notes["system texts were put in front of the question that follows"] += 1
                system.append(turn.text)
        elif turn.role == "human" and system:
            yield turn._replace(text="\n\n".join([*system, turn.text]))
            system = []
        else:
            yield turn
    if system:
        notes["system texts without a question were left out"] += len(system)
