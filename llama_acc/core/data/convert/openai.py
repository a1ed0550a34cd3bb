"""OpenAI's fine-tuning format: `messages` of `role` and `content`."""

from collections.abc import Iterable
from typing import Any

from llama_acc.core.data.convert.rules import Malformed, Record, Row, Rule, Skipped, list_of, system_of, text_of
from llama_acc.core.data.convert.turns import Turn, dialogue, each_turn, in_exchanges, object_of, turn_of


class OpenAi(Rule):
    """Messages to dialogues."""

    keys = turns_in = ("messages", "conversations")
    turn_keys = ("role", "content")

    def records(self, row: Row) -> Iterable[Record]:
        # Some data sets call the same thing so.
        field = "conversations" if "conversations" in row and "messages" not in row else "messages"
        turns = each_turn(list_of(row, field), message_of)
        return [dialogue(row, in_exchanges(turns, self.notes, system_of(row)))]


def message_of(value: Any) -> Turn:
    """A turn that has `role` and `content`, which may be in parts."""
    message = object_of(value)
    content = message.get("content")
    joined = {"content": _joined(content)} if isinstance(content, list) else {}
    return turn_of({**message, **joined}, "role", "content")


def any_turn(value: Any) -> Turn:
    """A turn in this form, or one that has `from` and `value`."""
    return message_of(value) if "role" in object_of(value) else turn_of(value)


def _joined(parts: list[Any]) -> str:
    """Content may be given in parts, each of a type."""
    texts = []
    for part in map(object_of, parts):
        kind = part.get("type")
        if kind in ("image_url", "input_audio", "file", "image", "audio"):
            raise Skipped("has images, sound or files")
        if kind not in ("text", "input_text", "output_text"):
            raise Malformed(f"unknown type of content {kind!r}")
        texts.append(text_of(part, "text"))
    return "\n\n".join(texts)
