"""What a message says to type next exists: commands, their flags and the recipe's keys."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from llama_acc.core.recipe import known_keys
from tests.test_docs import COMMAND, PACKAGE, parse

_OF_PIP = {"--upgrade"}


@cache
def messages() -> list[tuple[str, str]]:
    """Every text in the package that is no docstring, but for those that are a command's help, with its place.

    What is filled in stands as X.
    """
    texts = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        inner = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part != node}
        inner |= {node.value for node in nodes if isinstance(node, ast.Expr) and path.parent.name != "cli"}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
                texts.append((f"{path.name}:{node.lineno}", "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
                texts.append((f"{path.name}:{node.lineno}", node.value))
    return texts


def commands(command: Any) -> Iterator[Any]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from commands(inner)


def found(pattern: str) -> list[tuple[str, str]]:
    return [(place, match) for place, text in messages() for match in re.findall(pattern, text)]


def test_every_command_that_a_message_names_parses() -> None:
    named = found(r"(?<!this )llama-acc ([^`;,()\n]+)")
    assert len(named) > 50
    for place, line in named:
        try:
            parse(shlex.split(line.replace("'", ""), comments=True))
        except Exception as error:
            pytest.fail(f"{place}: llama-acc {line}: {error}")


def test_every_flag_that_a_message_names_exists() -> None:
    options = [parameter for command in commands(COMMAND) for parameter in command.params]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    named = found(r"(?<![\w-])(?<!var\()--[a-z][\w-]*(?![\w-]*:)")  # CSS has variables of this form
    assert len(named) > 100
    assert [(place, flag) for place, flag in named if flag not in known | _OF_PIP] == []


def test_every_recipe_key_that_a_message_names_exists() -> None:
    keys = {re.sub(r"\.\d+\.", ".", key) for key in known_keys()}
    named = found(
        r"\b(?!(?:tuning|train)\.X)((?:model|tuning|vision|data|optimizer|train|parallel|checkpoint)\.[\w.]+)="
    )
    assert len(named) > 20
    assert [(place, key) for place, key in named if re.sub(r"\.\d+\.", ".", key) not in keys] == []
