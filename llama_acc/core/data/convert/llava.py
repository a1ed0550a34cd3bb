"""LLaVA-Instruct: dialogues about an image, whose place in a question is marked `<image>`."""

from collections.abc import Iterable, Iterator

from llama_acc.core.data.convert.rules import (
    Malformed,
    Record,
    Row,
    Rule,
    about,
    list_of,
    system_of,
    text_of,
    with_system,
)
from llama_acc.core.data.convert.turns import Turn, dialogue, each_turn, in_exchanges, object_of, turn_of

_MARK = "<image>"


class Llava(Rule):
    """One item for each question and its answer, or whole dialogues. The mark of the image goes; new lines stay."""

    keys = ("conversations",)

    def records(self, row: Row) -> Iterable[Record]:
        values = list_of(row, "conversations")
        if self.options.reference:
            return _as_the_reference(row, values)
        exchanges = in_exchanges(each_turn(values, _turn), self.notes, system_of(row))
        if self.options.dialogues:
            return [dialogue(row, exchanges)]
        pairs = list(zip(exchanges.turns[::2], exchanges.turns[1::2], strict=True))
        if left_out := sum(not reply.trained for _, reply in pairs):
            self.notes["replies that are not to be trained on were left out"] += left_out
        start = {**about(row), **with_system(exchanges.system)}
        return [
            {**start, "instruction": question.text, "input": "", "output": reply.text}
            for question, reply in pairs
            if reply.trained
        ]


def _turn(value: object) -> Turn:
    turn = turn_of(value)
    # An image stands before or behind the question, on a line of its own.
    return turn._replace(text=turn.text.replace(_MARK, "").strip()) if _MARK in turn.text else turn


def _as_the_reference(row: Row, values: list[object]) -> Iterator[Record]:
    """LLaMA2-Accessory's tool: turns two by two, all of a turn's fields without the mark and without new lines."""
    others = {key: value for key, value in row.items() if key != "conversations"}
    for number in range(0, len(values) // 2 * 2, 2):
        pair = [_flat(value, place) for place, value in enumerate(values[number : number + 2], start=number + 1)]
        yield {**others, "conversations": pair}


def _flat(value: object, place: int) -> Record:
    try:
        turn = object_of(value)
        return {key: text_of(turn, key).replace(_MARK, "").replace("\n", "") for key in turn}
    except Malformed as error:
        raise Malformed(f"turn {place}: {error}") from error
