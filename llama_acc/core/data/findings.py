"""What is wrong, or may be, with items of a data file: which kind of thing, where, and how the text there begins."""

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_BEGINNING = 60
"""Characters of a value that are shown."""
MOST_PROBLEMS = 1000
"""Of a file that is not to be used with problems: with so many of them, reading on helps nobody."""
EXAMPLES = 100
"""Findings of one kind that are kept; all are counted."""


class Kind(NamedTuple):
    """One kind of finding."""

    title: str  # what is counted, in the plural
    fatal: bool = False  # the item cannot be trained on: it stops a run, or is left out (`data.on_error`)


KINDS: dict[str, Kind] = {
    "unreadable": Kind("rows that cannot be read", fatal=True),
    "no_item": Kind("values that are not items", fatal=True),
    "missing_field": Kind("missing fields", fatal=True),
    "wrong_type": Kind("fields that are not text", fatal=True),
    "unknown_role": Kind("unknown roles", fatal=True),
    "mixed_kinds": Kind("dialogues among single-turn items", fatal=True),
    "surrogate": Kind("lone surrogates", fatal=True),
    "preference": Kind("pairs of a preferred and a rejected reply", fatal=True),
    "unsupported": Kind("items whose keys ask for what cannot be done", fatal=True),
    "image": Kind("images that are not given by a path", fatal=True),
    "image_file": Kind("images that cannot be opened", fatal=True),
    "template": Kind("items that the prompt format cannot write", fatal=True),
    "blank": Kind("blank rows, left out"),
    "empty_reply": Kind("empty replies"),
    "role_order": Kind("roles out of order"),
    "echo": Kind("replies that repeat the question"),
    "mojibake": Kind("texts decoded wrongly"),
    "duplicate": Kind("exact duplicates"),
    "language": Kind("items in another language than the rest"),
    "stop_in_reply": Kind("replies that hold the format's stop string"),
    "format_mark": Kind("texts that hold a mark of the format"),
    "special_text": Kind("plain texts that hold what a special token is written like"),
    "merged": Kind("answers whose first token begins in the prompt"),
    "no_label": Kind("items without a trained token: dropped"),
    "cut": Kind("items that are cut"),
}


class Finding(NamedTuple):
    """One thing found in one item."""

    kind: str  # a key of `KINDS`
    where: str  # such as "item 3 (line 7)"
    field: str  # such as "output", or "turn 2, value"; empty: the item itself
    message: str
    value: str = ""  # how the value there begins, as JSON

    def __str__(self) -> str:
        # The message of an error names the field itself.
        place = ", ".join(part for part in (self.where, "" if self.fatal else self.field) if part)
        return f"{f'{place}: ' if place else ''}{self.message}{f': {self.value}' if self.value else ''}"

    @property
    def fatal(self) -> bool:
        """The item cannot be trained on."""
        return KINDS[self.kind].fatal


@dataclass
class Findings:
    """Findings counted by kind, and the first ones of each kind."""

    most: int | None = EXAMPLES  # how many of a kind are kept; None: all
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Count it, and keep it if it is one of the first."""
        self.extend(finding.kind, 1, [finding])

    def extend(self, kind: str, count: int, places: Sequence[Finding]) -> None:
        """Count so many of a kind, of which the first are given."""
        self.counts[kind] += count
        kept = self.places.setdefault(kind, [])
        kept.extend(places if self.most is None else places[: max(self.most - len(kept), 0)])

    def merge(self, later: "Findings") -> None:
        """Add what was found further on."""
        for kind, count in later.counts.items():
            self.extend(kind, count, later.places.get(kind, []))

    def to_json(self) -> dict[str, Any]:
        """As plain values, kinds in their order."""
        return {
            kind: {
                "count": self.counts[kind],
                "fatal": about.fatal,
                "places": [finding._asdict() for finding in self.places[kind]],
            }
            for kind, about in KINDS.items()
            if self.counts[kind]
        }


def other_form(kinds: Collection[str], file: str) -> str:
    """What to try with a file, named as it is typed, of which no row is an item; by the kinds of all findings in it."""
    whole = (
        "data.sources.0.format=dialogue data.sources.0.template=dialogue trains on them (the format alone where the "
        "template is auto or a chat template)"
    )
    first = "data.sources.0.format=single_turn_llava takes the first question and answer of each"
    every = f"llama-acc convert-data llava {file} --output NEW.jsonl makes an item of each"
    other = f"if it is in a form of its own: llama-acc convert-data auto {file} --output NEW.jsonl"
    hints = {
        "mixed_kinds": f"they are dialogues: {whole}; {first}; {every}",
        "preference": f"llama-acc convert-data auto {file} --preview 1 says how to take the preferred reply of each",
        "template": "take another prompt format: --template NAME or FILE.jinja; in a run, data.sources.0.template=NAME",
        "unsupported": f"leave such items out: data.on_error=skip; or, {other}",
    }
    fatal = {kind for kind in kinds if KINDS[kind].fatal}
    return hints.get(fatal.pop(), other) if len(fatal) == 1 else other


def beginning(value: Any) -> str:
    """How a value begins, in one line: a text in quotes, anything else as JSON."""
    if isinstance(value, str):
        short = json.dumps(value[:_BEGINNING], ensure_ascii=False)
        text = short if len(value) <= _BEGINNING else f"{short} ..."
    else:
        text = ""
        try:
            for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
                text += part
                if len(text) > _BEGINNING:
                    text = f"{text[:_BEGINNING]} ..."
                    break
        except (RecursionError, TypeError, ValueError):
            text = ""
    # A lone surrogate cannot be written anywhere.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
