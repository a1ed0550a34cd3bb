"""The elements of a JSON text one at a time, in memory for one of them.

`json`'s own scanner takes a value off a buffer, which is filled up where it ends within one. So a streamed text means
exactly what `json.loads` says it means, and is refused with the same words.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from llama_acc.core.errors import UserError

MAX_ITEM = 1 << 28
"""Characters of the longest item that is read; more than that is a file of another kind."""

_SPACE = re.compile(r"[ \t\n\r]*")
JSON = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))
"""As `json.loads`, but for NaN: pandas writes it for an empty cell, and it is null."""
# An error so near to the buffer's end may be of a word or an escape that goes on: "-Infinity", "\ud83d\ude00".
_NEAR = 16
# As many characters of a number may be missing although what is there is one, too: "1" of "1.5", "1e" of "1e+5".
_OPEN_NUMBER = 3


def array_items(chunks: Iterator[str], name: str) -> Iterator[Any]:
    """The elements of the array that a JSON text is.

    Args:
        chunks: the text, in pieces.
        name: of the file, for messages.

    Raises:
        UserError: it is not JSON, or an element is too long.
    """
    text = _Text(chunks, name)
    text.take("[")
    if text.next_character() != "]":
        yield text.value()
        while text.next_character() == ",":
            text.take(",")
            text.next_character()
            yield text.value()
        if text.next_character() != "]":
            raise text.wrong("Expecting ',' delimiter")
    text.take("]")
    if text.next_character():
        raise text.wrong("Extra data")


class _Text:
    """The part of a JSON text that is being read."""

    def __init__(self, chunks: Iterator[str], name: str) -> None:
        self._chunks, self._name = chunks, name
        self._text, self._at = "", 0
        # Where the buffer begins in the file.
        self._line, self._column = 1, 0

    def next_character(self) -> str:
        """The next one that is no white space, which stays; an empty text at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = self._at if match is None else match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def take(self, character: str) -> None:
        """Goes on behind this character, which is the next one."""
        assert self.next_character() == character
        self._at += 1

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = JSON.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR
                if cut_off and self._fill():
                    continue
                raise self.wrong(error.msg, error.pos) from error
            except (RecursionError, ValueError) as error:
                raise UserError(f"{self._name} is not JSON that can be read: {error}") from error
            if len(self._text) - end >= _OPEN_NUMBER or not self._fill():
                self._at = end
                return value

    def _fill(self) -> bool:
        """Forget what was read and read on, at least as much as is left, so that a long item costs no more than
        twice its length. False: there is no more."""
        kept = len(self._text) - self._at
        if kept > MAX_ITEM:
            line, _ = self._place(self._at)
            raise UserError(f"{self._name}: the item in line {line} is longer than {MAX_ITEM >> 20} Mi characters")
        pieces, wanted = [], max(kept, 1)
        while wanted > 0 and (piece := next(self._chunks, None)) is not None:
            pieces.append(piece)
            wanted -= len(piece)
        if not pieces:
            return False
        self._line, self._column = self._place(self._at)
        self._column -= 1
        self._text = "".join([self._text[self._at :], *pieces])
        self._at = 0
        return True

    def _place(self, position: int) -> tuple[int, int]:
        """Line and column, from 1, of a place in the buffer."""
        breaks = self._text.count("\n", 0, position)
        if not breaks:
            return self._line, self._column + position + 1
        return self._line + breaks, position - self._text.rfind("\n", 0, position)

    def wrong(self, message: str, position: int | None = None) -> UserError:
        """Says what is wrong at a place of the buffer, or here."""
        line, column = self._place(self._at if position is None else position)
        return UserError(f"{self._name} is not JSON: line {line}, column {column}: {message}")
