"""WizardLM's Evol-Instruct: dialogues of one exchange (V2), or instructions and outputs."""

from collections.abc import Iterable

from llama_acc.core.data.convert.rules import Record, Row, Rule, Skipped, list_of, single_turn, system_of
from llama_acc.core.data.convert.turns import dialogue, each_turn, in_exchanges, turn_of


class WizardLm(Rule):
    """Both kinds of files, each as it is. WizardLM's test set has instructions without an output."""

    keys = (*Rule.keys, "conversations")

    def records(self, row: Row) -> Iterable[Record]:
        if "conversations" in row:
            turns = each_turn(list_of(row, "conversations"), turn_of)
            return [dialogue(row, in_exchanges(turns, self.notes, system_of(row)))]
        if "Instruction" in row and "output" not in row:
            raise Skipped("an instruction without an output, to test with")
        return [single_turn(row)]
