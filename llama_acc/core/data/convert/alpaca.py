"""Alpaca: `instruction`, perhaps `input`, `output`."""

from collections.abc import Iterable

from llama_acc.core.data.convert.rules import Record, Row, Rule, optional_text, single_turn, text_of


class Alpaca(Rule):
    """Single-turn items, of which other fields go."""

    def records(self, row: Row) -> Iterable[Record]:
        return [single_turn(text_of(row, "instruction"), optional_text(row, "input"), text_of(row, "output"))]
