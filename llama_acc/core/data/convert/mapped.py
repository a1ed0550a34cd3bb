"""Tables and JSON lines of any columns: which of them is what, the user says."""

from collections.abc import Iterable

from llama_acc.core.data.convert.openai import any_turn
from llama_acc.core.data.convert.rules import Options, Record, Row, Rule, list_of, single_turn, system_of, text_of
from llama_acc.core.data.convert.turns import dialogue, each_turn, in_exchanges
from llama_acc.core.data.keys import INPUT, is_empty

FIELDS = ("instruction", "input", "output", "system", "conversations")
_PLAIN = "rows without an instruction became plain text, to be trained with template: none"


class Mapped(Rule):
    """Items from columns by their names, or by those of `--map`."""

    turn_keys = ("from", "value", "role", "content")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        mapping = options.mapping
        self._turns = mapping.get("conversations")
        if self._turns is not None:
            self.turns_in = self.keys = (self._turns,)
        else:
            unnamed = [field for field in ("instruction", "output", "history") if field not in mapping]
            self.keys = (*unnamed, *mapping.values(), *(() if "input" in mapping else INPUT))
        # Which of several replies it is to be was said then.
        self.chosen = self._turns is not None or "output" in mapping

    def records(self, row: Row) -> Iterable[Record]:
        mapping = self.options.mapping
        if self._turns is not None:
            turns = each_turn(list_of(row, self._turns), any_turn)
            system = text_of(row, mapping["system"]) if "system" in mapping else system_of(row)
            return [dialogue(row, in_exchanges(turns, self.notes, system))]
        if "output" in mapping and "instruction" not in mapping and "instruction" not in row:
            if not is_empty(row.get(mapping["output"])):
                self.notes[_PLAIN] += 1
            row = {**row, "instruction": ""}
        return [single_turn(row, **mapping)]


def required_columns(mapping: dict[str, str]) -> list[str]:
    """The columns that a table must have."""
    if "conversations" in mapping:
        return list(mapping.values())
    is_plain = "output" in mapping and "instruction" not in mapping
    needed = {} if is_plain else {"instruction": "instruction"}
    return list({**needed, "output": "output", **mapping}.values())
