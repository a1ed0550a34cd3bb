"""LLaVA-Instruct: dialogues about an image, whose place in a question is marked `<image>`."""

from collections.abc import Iterable, Iterator

from llama_acc.core.data.convert.rules import Malformed, Record, Row, Rule, list_of, named, single_turn, text_of
from llama_acc.core.data.convert.turns import Turn, conversations, each_turn, in_exchanges, object_of, role_of

_MARK = "<image>"


class Llava(Rule):
    """One item for each question and its answer, or whole dialogues. The mark of the image goes; new lines stay."""

    def records(self, row: Row) -> Iterable[Record]:
        values = list_of(row, "conversations")
        if self.options.reference:
            return _as_the_reference(row, values)
        turns = in_exchanges(each_turn(values, _turn), self.notes)
        about = {**named(row), **({"image": row["image"]} if row.get("image") else {})}
        if self.options.dialogues:
            return [{**about, "conversations": conversations(turns)}]
        pairs = zip(turns[::2], turns[1::2], strict=True)
        return [{**about, **single_turn(question, "", answer)} for (_, question), (_, answer) in pairs]


def _turn(value: object) -> Turn:
    turn = object_of(value)
    # An image stands before or behind the question, on a line of its own.
    text = text_of(turn, "value")
    return role_of(text_of(turn, "from")), text.replace(_MARK, "").strip() if _MARK in text else text


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
