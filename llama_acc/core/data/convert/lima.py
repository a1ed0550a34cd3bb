"""LIMA: dialogues as lists of texts, question and reply in turn; or in Vicuna's format."""

from collections.abc import Iterable

from llama_acc.core.data.convert.rules import Malformed, Record, Row, Rule, Skipped, list_of, system_of
from llama_acc.core.data.convert.turns import Turn, dialogue, each_turn, in_exchanges, turn_of
from llama_acc.core.data.rows import type_name


class Lima(Rule):
    """Both forms to dialogues. LIMA's test questions have no reply."""

    keys = ("conversations",)

    def records(self, row: Row) -> Iterable[Record]:
        values = list_of(row, "conversations")
        if len(values) == 1:
            raise Skipped("a question without a reply, to test with")
        alternating = bool(values) and isinstance(values[0], str)
        turns = each_turn(enumerate(values), _text) if alternating else each_turn(values, turn_of)
        return [dialogue(row, in_exchanges(turns, self.notes, system_of(row)))]


def _text(numbered: tuple[int, object]) -> Turn:
    number, text = numbered
    if not isinstance(text, str):
        raise Malformed(f"should be text, but is {type_name(text)}")
    return Turn("gpt" if number % 2 else "human", text)
