"""JSON lines: a file of one object a line."""

import json
from pathlib import Path
from typing import Any

from llama_acc.core.errors import DataError, UserError
from llama_acc.core.input_files import read_bytes

Objects = dict[int, dict[str, Any]]
"""The objects of a file by the number of their line, from 1; blank lines have none."""


def read_objects(path: Path) -> Objects:
    """The objects of a file.

    Raises:
        UserError: it cannot be read, or holds none.
        DataError: lines that are no JSON objects.
    """
    return parse_objects(read_bytes(path), path)


def parse_objects(data: bytes, path: Path) -> Objects:
    """The objects in the content of a file; see `read_objects`."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8: byte {error.start} (line {number}) cannot be decoded") from error
    objects: Objects = {}
    problems: list[str] = []
    # Not splitlines(): a JSON text may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (RecursionError, ValueError) as error:
            problems.append(f"{path} line {number}: not JSON: {error}")
            continue
        if isinstance(value, dict):
            objects[number] = value
        else:
            problems.append(f"{path} line {number}: it should hold an object, but holds {line.strip()[:40]}")
    if problems:
        raise DataError(problems, "each line should be a JSON object of its own")
    if not objects:
        raise UserError(f"{path} is empty")
    return objects
