"""Tables and JSON lines of any columns: which of them is what, the user says."""

from collections.abc import Iterable

from llama_acc.core.data.convert.rules import Record, Row, Rule, optional_text, single_turn, text_of

FIELDS = ("instruction", "input", "output")


class Mapped(Rule):
    """Single-turn items from columns by their names, or by those of `--map`."""

    def records(self, row: Row) -> Iterable[Record]:
        mapping = self.options.mapping
        instruction, output = (text_of(row, mapping.get(field, field)) for field in ("instruction", "output"))
        return [single_turn(instruction, self._context(row), output)]

    def _context(self, row: Row) -> str:
        mapping = self.options.mapping
        if "input" in mapping:
            column = mapping["input"]
            # What was named has to be there, though a row may have nothing in it.
            return optional_text(row, column) if column in row else text_of(row, column)
        return "" if "input" in mapping.values() else optional_text(row, "input")


def required_columns(mapping: dict[str, str]) -> list[str]:
    """The columns that a table must have."""
    return [mapping.get(field, field) for field in FIELDS if field != "input" or field in mapping]
