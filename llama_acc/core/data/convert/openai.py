"""OpenAI's fine-tuning format: `messages` of `role` and `content`."""

from collections.abc import Iterable
from typing import Any

from llama_acc.core.data.convert.rules import Malformed, Record, Row, Rule, Skipped, list_of, named, text_of
from llama_acc.core.data.convert.turns import Turn, conversations, each_turn, in_exchanges, object_of, role_of


class OpenAi(Rule):
    """Messages to dialogues."""

    def records(self, row: Row) -> Iterable[Record]:
        # Some data sets call the same thing so.
        field = "conversations" if "conversations" in row and "messages" not in row else "messages"
        turns = in_exchanges(each_turn(list_of(row, field), _turn), self.notes)
        return [{**named(row), "conversations": conversations(turns)}]


def _turn(value: Any) -> Turn:
    message = object_of(value)
    role = role_of(text_of(message, "role"))
    if message.get("tool_calls") or message.get("function_call"):
        raise Skipped("has calls of tools")
    content = message.get("content")
    return role, _joined(content) if isinstance(content, list) else text_of(message, "content")


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
