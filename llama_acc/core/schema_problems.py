"""What pydantic finds wrong with a file's values, in this toolkit's words."""

import re
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

# By pydantic's type of error: what a value should be. The names in braces are of its context.
_WANTED = {
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}
# A union's branch is no part of the key the user typed.
_BRANCH = re.compile(r"\.(str|int|float|list\[str\]|dict\[.*?\])(?=\.|$)")


def problems_of(error: ValidationError, suggest: Callable[[str], str] = lambda key: "") -> list[str]:
    """Every problem in a line, with the dotted key it is at.

    Args:
        error: what pydantic found.
        suggest: what an unknown key may have been meant to be, as a question; empty where nobody knows.
    """
    problems: list[str] = []
    wanted: dict[tuple[str, str], list[str]] = {}
    """Of each key and its value, what that should be: a union names more than one."""
    for item in error.errors():
        key = _BRANCH.sub("", ".".join(map(str, item["loc"])))
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            hint = suggest(key)
            problems.append(f"unknown key '{key}'" + (f": {hint}" if hint else ""))
        elif item["type"] == "missing":
            # Of a list that is too short, or of a mapping.
            what = "value" if isinstance(item["loc"][-1], int) else "key"
            problems.append(f"missing {what} '{key}'")
        elif item["type"] in _WANTED:
            wanted.setdefault((key, _shown(item["input"])), []).append(_what_is_wanted(item))
        else:
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{key}: {message}" if key else message)
    told = [
        f"{key}: should be {_alternatives(kinds)}, not {value}".removeprefix(": ")
        for (key, value), kinds in wanted.items()
        # What stands in a list is told, not that a union takes something else in the place of the list.
        if not any(inner.startswith(f"{key}.") for inner, _ in wanted)
    ]
    return list(dict.fromkeys([*told, *problems]))


def _alternatives(kinds: list[str]) -> str:
    return " or ".join(kind for kind in dict.fromkeys(kinds) if kind != "a whole number" or "a number" not in kinds)


def _what_is_wanted(item: ErrorDetails) -> str:
    context = {name: f"{value:g}" if isinstance(value, float) else value for name, value in item.get("ctx", {}).items()}
    return _WANTED[item["type"]].format(**context)


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)
