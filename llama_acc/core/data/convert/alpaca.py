"""Alpaca: `instruction`, perhaps `input`, `output`, and LLaMA-Factory's `system` and `history`."""

from collections.abc import Iterable

from llama_acc.core.data.convert.rules import Record, Row, Rule, single_turn


class Alpaca(Rule):
    """Single-turn items, perhaps with earlier turns."""

    def records(self, row: Row) -> Iterable[Record]:
        return [single_turn(row)]
