"""WizardLM's Evol-Instruct: dialogues of one exchange (V2), or instructions and outputs."""

from collections.abc import Iterable

from llama_acc.core.data.convert.rules import Record, Row, Rule, Skipped, list_of, named, single_turn, text_of
from llama_acc.core.data.convert.turns import Turn, conversations, each_turn, in_exchanges, object_of, role_of


class WizardLm(Rule):
    """Both kinds of files, each as it is. WizardLM's test set has instructions without an output."""

    def records(self, row: Row) -> Iterable[Record]:
        if "conversations" in row:
            turns = in_exchanges(each_turn(list_of(row, "conversations"), turn_of), self.notes)
            return [{**named(row), "conversations": conversations(turns)}]
        if "Instruction" in row and "output" not in row:
            raise Skipped("an instruction without an output, to test with")
        return [single_turn(text_of(row, "instruction"), "", text_of(row, "output"))]


def turn_of(value: object) -> Turn:
    """A turn that has `from` and `value`."""
    turn = object_of(value)
    return role_of(text_of(turn, "from")), text_of(turn, "value")
