"""Whole files of items; the package reads them one at a time."""

from pathlib import Path
from typing import NamedTuple

from llama_acc.core.data.items import Item, stream_items
from llama_acc.core.data.sources import data_files
from llama_acc.core.errors import DataError, UserError, raise_all


class ItemFile(NamedTuple):
    kind: str
    items: list[Item]


def read_file(path: Path, format: str = "auto") -> ItemFile:
    """The items of a file; all that is wrong with them is raised together."""
    stream = stream_items(path, format)
    items: list[Item] = []
    problems: list[str] = []
    errors: list[UserError] = []
    try:
        for checked in stream:
            problems += [f"{path}: {problem}" for problem in checked.problems if problem.fatal]
            items += [checked.item] * (checked.item is not None)
    except UserError as error:
        errors.append(error)
    raise_all([DataError(problems), *errors] if problems else errors)
    return ItemFile(stream.kind, items)


def read_items(path: str | Path, format: str = "auto") -> list[Item]:
    """The items of a file, folder or glob."""
    return [item for file in data_files(path) for item in read_file(file, format).items]
