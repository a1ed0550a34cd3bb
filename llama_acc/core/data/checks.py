"""What may be wrong with an item that can be trained on: seen from the item alone, without a tokenizer.

None of these stops a run. Each is something that people who looked at their data have been sorry for.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from llama_acc.core.data.findings import Finding, beginning
from llama_acc.core.data.items import Dialogue, Item
from llama_acc.core.data.templates import PromptFormat

_ECHO_CHARACTERS = 20
"""A reply that begins with a question shorter than this may do so by chance ("Hi.", "Thank you")."""
_AROUND = 8
_NOT_ASCII = re.compile(rf"[^\x00-\x7f](?:[\x00-\x7f]{{0,{_AROUND}}}[^\x00-\x7f])*")
_BEFORE = 20
"""Characters that are shown before a place within a text."""


def checked_item(item: Item, where: str) -> list[Finding]:
    """Everything found in one item."""
    found = [*_roles(item, where), *_replies(item, where)] if isinstance(item, Dialogue) else _output(item, where)
    return [*found, *_mojibake(item, where)]


def format_findings(item: Item, where: str, stops: Sequence[str], marks: Sequence[str]) -> Iterator[Finding]:
    """Texts of an item that look like a part of the prompt format.

    Args:
        item: that can be trained on.
        where: its place.
        stops: the format's `text_stops`.
        marks: the format's `marks`.
    """
    for field, text in replies_of(item):
        if stop := next((stop for stop in stops if stop in text), None):
            message = f"{stop!r}, with which a reply ends, at character {text.index(stop) + 1}"
            yield Finding("stop_in_reply", where, field, message, beginning(_from(text, stop)))
    for field, text in fields_of(item):
        if mark := next((mark for mark in marks if mark in text), None):
            message = f"{mark!r} looks like a part of the prompt format; the model cannot tell them apart"
            yield Finding("format_mark", where, field, message, beginning(_from(text, mark)))


def merged_finding(item: Item, where: str, template: PromptFormat) -> Finding:
    """What is said of an item whose prompt and answer merge into one token (`encode.Document.merged`)."""
    trained = ", and is not trained, as in LLaMA2-Accessory" if template.prefix_labels else ""
    field, text = next(replies_of(item), ("", ""))
    return Finding("merged", where, field, f"the first token begins in the prompt{trained}", beginning(text))


def _from(text: str, mark: str) -> str:
    return text[max(text.index(mark) - _BEFORE, 0) :]


def fields_of(item: Item) -> Iterator[tuple[str, str]]:
    """Names and texts of an item, in order; a dialogue's as "turn 2, value"."""
    if isinstance(item, Dialogue):
        for number, turn in enumerate(item.turns, start=1):
            yield f"turn {number}, value", turn.text
    else:
        yield "instruction", item.instruction
        if item.input is not None:
            yield "input", item.input
        yield "output", item.output
    if item.system is not None:
        yield "system", item.system


def replies_of(item: Item) -> Iterator[tuple[str, str]]:
    """Names and texts of what an item teaches."""
    if not isinstance(item, Dialogue):
        yield "output", item.output
        return
    for number, turn in enumerate(item.turns, start=1):
        if turn.role == "assistant" and turn.trained:
            yield f"turn {number}, value", turn.text


def normalised(text: str) -> str:
    """Without what makes a trivial difference: case and white space."""
    return " ".join(text.split()).casefold()


def _output(item: Any, where: str) -> list[Finding]:
    question = f"{item.instruction}\n{item.input}" if item.input else item.instruction
    return _reply("output", question, item.output, where)


def _replies(item: Dialogue, where: str) -> Iterator[Finding]:
    question = None
    for number, (role, text, trained) in enumerate(item.turns, start=1):
        if role == "assistant" and trained:
            yield from _reply(f"turn {number}, value", question, text, where)
        question = text if role == "human" else None


def _reply(field: str, question: str | None, reply: str, where: str) -> list[Finding]:
    if not reply.strip():
        return [Finding("empty_reply", where, field, "an empty reply", beginning(reply))]
    # The beginnings first: that most replies do not begin with the question is seen there.
    if question is None or not _alike(question, reply):
        return []
    asked, answered = normalised(question), normalised(reply)
    if asked == answered:
        return [Finding("echo", where, field, "the reply is the question", beginning(reply))]
    if len(asked) >= _ECHO_CHARACTERS and answered.startswith(asked):
        return [Finding("echo", where, field, "the reply begins with the whole question", beginning(reply))]
    return []


def _alike(question: str, reply: str) -> bool:
    asked, answered = (normalised(text.lstrip()[:_ECHO_CHARACTERS]) for text in (question, reply))
    return bool(asked) and (asked.startswith(answered) or answered.startswith(asked))


def _roles(item: Dialogue, where: str) -> list[Finding]:
    roles = [turn.role for turn in item.turns]
    wrong = []
    if roles[0] != "human":
        wrong.append((1, "the assistant begins"))
    wrong += [
        (number, f"a second {'reply' if role == 'assistant' else 'human turn'} in a row")
        for number, (before, role) in enumerate(pairwise(roles), start=2)
        if before == role
    ]
    if roles[-1] == "human":
        wrong.append((len(roles), "the last turn is human: nothing answers it"))
    return [
        Finding("role_order", where, f"turn {number}", what, beginning(item.turns[number - 1].text))
        for number, what in wrong
    ]


def _mojibake(item: Item, where: str) -> Iterator[Finding]:
    for field, text in fields_of(item):
        if text.isascii():
            continue
        lost, garbled = text.find("\ufffd"), _garbled(text)
        if lost >= 0:
            message = f"U+FFFD stands for bytes that were lost, at character {lost + 1}"
            yield Finding("mojibake", where, field, message, beginning(text[max(lost - _BEFORE, 0) :]))
        elif garbled is not None:
            message = f"UTF-8 read as another encoding, near character {garbled + 1}"
            yield Finding("mojibake", where, field, message, beginning(text[max(garbled - _BEFORE, 0) :]))


def _garbled(text: str) -> int | None:
    """Where UTF-8 was read as Latin-1 or the like, so that ftfy would change it."""
    looked_at = 0
    for group in _NOT_ASCII.finditer(text):
        # Looking around the characters in question only is many times faster than looking through the whole text.
        begin, end = group.start() - _AROUND, group.end() + _AROUND
        while (match := _badness().search(text, max(begin, looked_at), end)) is not None:
            # Such characters may be meant, as in »Über«: then they are not bytes of UTF-8.
            line_begin, line_end = text.rfind("\n", 0, match.start()) + 1, text.find("\n", match.end())
            line = text[line_begin : line_end if line_end >= 0 else None]
            if _fixed(line) != line:
                return int(match.start())
            looked_at = line_begin + len(line)
    return None


def _fixed(line: str) -> str:
    from ftfy import fix_encoding

    return fix_encoding(line)


@cache
def _badness() -> Any:
    from ftfy.badness import BADNESS_RE

    return BADNESS_RE
