"""Checks of single flags, shared by the commands. A wrong one is told as Typer tells of any other wrong flag."""

import re
from typing import Any, TypeVar

import typer

_Value = TypeVar("_Value", bound=Any)


def given(value: _Value) -> _Value:
    """Refuses an empty text, which an unset shell variable leaves: as a path it would mean the current folder."""
    if "" in (value if isinstance(value, list) else [value]):
        raise typer.BadParameter("it is empty. Is a shell variable not set?")
    return value


def device(value: str | None) -> str | None:
    """Refuses what no tensor can be computed on; whether the device is there is found out when it is used."""
    if value is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is not one of: cuda, cuda:1 (another GPU), mps, cpu.")
    return value
