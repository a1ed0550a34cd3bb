"""The elements of a JSON array, read as a stream: no more of it is in memory than the longest of them, twice."""

import json
import re
from collections.abc import Iterator
from typing import Any

from llama_acc.core.errors import UserError

MAX_ITEM = 1 << 28
"""Characters of the longest item that is read; more than that is a file of another kind."""
JSON = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))
"""As `json.loads`, but for NaN: pandas writes it for an empty cell, and it is null."""


def array_items(pieces: Iterator[str], name: str) -> Iterator[Any]:
    """The elements of the array that a JSON text is, which comes in pieces from the file `name`; what `json` refuses is
    refused at the same place, in its words.
    """
    array = _Array(pieces, name)
    array.next_character()
    array.at += 1  # [
    if array.next_character() != "]":
        yield array.value()
        while array.next_character() == ",":
            array.at += 1
            array.next_character()
            yield array.value()
        if array.next_character() != "]":
            raise array.error("Expecting ',' delimiter", array.at)
    array.at += 1
    if array.next_character():
        raise array.error("Extra data", array.at)


class _Array:
    """The part of a JSON text that is being read: `json`'s own scanner takes values off a buffer, which is filled up
    where one ends within it."""

    _SPACE = re.compile(r"[ \t\n\r]*")
    # An error so near to the buffer's end may be of a word or an escape that goes on: "-Infinity", "\ud83d\ude00".
    _NEAR = 16
    # As many characters may be missing of a number that is one already: "1" of "1.5", "1e" of "1e+5".
    _OPEN_NUMBER = 3

    def __init__(self, pieces: Iterator[str], name: str) -> None:
        self._pieces, self._name = pieces, name
        self._buffer, self.at = "", 0
        self._line = self._column = 1  # where the buffer begins in the file

    def next_character(self) -> str:
        """The next one that is no white space, which stays; an empty text at the end."""
        while True:
            if (match := self._SPACE.match(self._buffer, self.at)) is not None:
                self.at = match.end()
            if self.at < len(self._buffer):
                return self._buffer[self.at]
            if not self._fill():
                return ""

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = JSON.raw_decode(self._buffer, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - self._NEAR
                if not (cut_off and self._fill()):
                    raise self.error(error.msg, error.pos) from error
            except (RecursionError, ValueError) as error:
                raise UserError(f"{self._name} is not JSON that can be read: {error}") from error
            else:
                if len(self._buffer) - end >= self._OPEN_NUMBER or not self._fill():
                    self.at = end
                    return value

    def error(self, message: str, position: int) -> UserError:
        """Says what is wrong at a place of the buffer."""
        line, column = self._place(position)
        return UserError(f"{self._name} is not JSON: line {line}, column {column}: {message}")

    def _fill(self) -> bool:
        """Forget what was read and read on, at least as much as is left: a long item costs at most twice its length.
        False: there is no more."""
        kept, (line, column) = self._buffer[self.at :], self._place(self.at)
        if len(kept) > MAX_ITEM:
            raise UserError(f"{self._name}: the item in line {line} is longer than {MAX_ITEM >> 20} Mi characters")
        more = next(self._pieces, "")
        while more and len(more) < len(kept) and (piece := next(self._pieces, "")):
            more += piece
        if more:
            self._buffer, self.at, self._line, self._column = kept + more, 0, line, column
        return bool(more)

    def _place(self, position: int) -> tuple[int, int]:
        """Line and column, from 1, of a place in the buffer."""
        breaks = self._buffer.count("\n", 0, position)
        column = position - self._buffer.rfind("\n", 0, position) if breaks else self._column + position
        return self._line + breaks, column
