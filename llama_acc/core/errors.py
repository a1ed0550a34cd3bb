"""What can go wrong, as the user reads it. Imports nothing, so every module may use it."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

# A union's branch is no part of the key the user typed.
_BRANCH = re.compile(r"\.(str|int|constrained-int|float|bool|literal\[.*?\]|list\[str\]|dict\[.*?\])(?=\.|$)")
# What pydantic's messages say of Python and its parser.
_PYTHONS = re.compile(r" or instance of .*|, (unable to|got) .*")


class LlamaAccError(Exception):
    """A failure with one clear message: what is wrong and where, and a hint of what to type or try next.

    `exit_code` is what the command returns.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class UserError(LlamaAccError):
    """The user's input is at fault: a flag, a recipe, data, a checkpoint. Found before the first step."""

    exit_code = 2


class DataError(UserError):
    """Problems in data files, one to a line. `problems` names each of them with its place."""

    def __init__(self, problems: list[str], hint: str | None = None) -> None:
        one = len(problems) == 1
        super().__init__(problems[0] if one else f"{len(problems)} problems in the data:\n{listed(problems)}", hint)
        self.problems = problems


class RunError(LlamaAccError):
    """It failed while running: a non-finite loss, no memory, a full disk."""


def raise_all(errors: Sequence[UserError]) -> None:
    """Raise one error for all of `errors`, if there are any."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [p for e in errors for p in (e.problems if isinstance(e, DataError) else [e.message])]
        raise DataError(problems, next((e.hint for e in errors if e.hint), None))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question naming the closest of `known` ("did you mean 'lima'?"), or an empty string if none is close."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def listed(problems: Sequence[str], most: int = 20) -> str:
    """Problems one to a line, at most `most` of them, then the count of the rest."""
    more = [f"  ... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join([*(f"  {problem}" for problem in problems[:most]), *more])


def schema_problems(error: "ValidationError", suggest: Callable[[str], str] = lambda key: "") -> list[str]:
    """What pydantic finds wrong with a file's values, one problem a line, with the dotted key it is at. `suggest` asks
    what an unknown key may have been meant to be; empty where nobody knows."""
    problems: list[str] = []
    values: dict[tuple[str, str], list[str]] = {}  # by key and value: what it should be; a union names more than one
    for item in error.errors():
        key, message = _BRANCH.sub("", ".".join(map(str, item["loc"]))), item["msg"]
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            hint = suggest(key)
            problems.append(f"unknown key '{key}'" + (f": {hint}" if hint else ""))
        elif item["type"] == "missing":
            problems.append(f"missing key '{key}'")
        elif message.startswith("Input should be "):
            given, kind = item["input"], _PYTHONS.sub("", message.removeprefix("Input should be "))
            shown = repr(given) if isinstance(given, str) else json.dumps(given, default=str, skipkeys=True)
            if item["type"] in ("list_type", "tuple_type"):
                kind = f"a list, written [{given}]" if isinstance(given, str) else "a valid list"
            values.setdefault((key, shown), []).append(kind)
        elif item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
            continue  # of which some are wrong, and named
        else:
            problems.append(f"{key}: {message.removeprefix('Value error, ')}".removeprefix(": "))
    wrong = [f"{key}: should be {' or '.join(kinds)}, not {value}" for (key, value), kinds in values.items()]
    return list(dict.fromkeys([*wrong, *problems]))
