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


class JsonBuffer:
    """The part of a JSON text that is being read."""

    def __init__(self, chunks: Iterator[str], name: str) -> None:
        """Args:
        chunks: the text, in pieces.
        name: of the file, for messages.
        """
        self._chunks = chunks
        self._name = name
        self._text = ""
        self._at = 0
        self._ended = False
        # Where the buffer begins in the file.
        self._line, self._column = 1, 0

    def next_character(self) -> str:
        """The next one that is no white space, which stays; an empty text at the end."""
        while True:
            self._at = self._space_end(self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill():
                return ""

    def array(self) -> Iterator[Any]:
        """The elements of the array that begins here, up to the end of the text."""
        self._at += 1
        if self.next_character() == "]":
            self._at += 1
        else:
            yield self._taken()
            while self._goes_on():
                self.next_character()
                yield self._taken()
        if self.next_character():
            raise self.extra_data(self._at)

    def whole_value(self) -> tuple[Any, int | None]:
        """The value that begins here, which is not taken off, and the place of what follows it, if anything does."""
        value, end = self._value()
        while (follows := self._space_end(end)) == len(self._text):
            begin = self._at
            if not self._fill():
                return value, None
            end -= begin  # the buffer now begins at the value
        return value, follows

    def rest(self) -> tuple[int, Iterator[str]]:
        """The number of the line that is being read, and the text from here on."""

        def text() -> Iterator[str]:
            yield self._text[self._at :]
            yield from self._chunks

        return self._place(self._at)[0], text()

    def extra_data(self, place: int) -> UserError:
        """Says that nothing should stand at that place of the buffer."""
        return self._wrong("Extra data", place)

    def _goes_on(self) -> bool:
        mark = self.next_character()
        if mark not in (",", "]"):
            raise self._wrong("Expecting ',' delimiter", self._at)
        self._at += 1
        return mark == ","

    def _taken(self) -> Any:
        value, self._at = self._value()
        return value

    def _value(self) -> tuple[Any, int]:
        """The value that begins here, and where it ends."""
        while True:
            try:
                value, end = JSON.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._may_be_cut_off(error) and self._fill():
                    continue
                raise self._wrong(error.msg, error.pos) from error
            except (RecursionError, ValueError) as error:
                raise UserError(f"{self._name} is not JSON that can be read: {error}") from error
            if len(self._text) - end >= _OPEN_NUMBER or not self._fill():
                return value, end

    def _may_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR

    def _fill(self) -> bool:
        """Forget what was read and read on, at least as much as is left, so that a long item costs no more than
        twice its length. False: there is no more."""
        kept = len(self._text) - self._at
        if kept > MAX_ITEM:
            line, _ = self._place(self._at)
            raise UserError(f"{self._name}: the item in line {line} is longer than {MAX_ITEM >> 20} Mi characters")
        pieces, wanted = [], max(kept, 1)
        while wanted > 0 and not self._ended:
            piece = next(self._chunks, None)
            if piece is None:
                self._ended = True
            else:
                pieces.append(piece)
                wanted -= len(piece)
        if not pieces:
            return False
        self._line, self._column = self._place(self._at)
        self._column -= 1
        self._text = "".join([self._text[self._at :], *pieces])
        self._at = 0
        return True

    def _space_end(self, begin: int) -> int:
        match = _SPACE.match(self._text, begin)
        return begin if match is None else match.end()

    def _place(self, position: int) -> tuple[int, int]:
        """Line and column, from 1, of a place in the buffer."""
        breaks = self._text.count("\n", 0, position)
        if not breaks:
            return self._line, self._column + position + 1
        return self._line + breaks, position - self._text.rfind("\n", 0, position)

    def _wrong(self, message: str, position: int) -> UserError:
        line, column = self._place(position)
        return UserError(f"{self._name} is not JSON: line {line}, column {column}: {message}")
