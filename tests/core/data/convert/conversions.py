"""Conversions as the tests use them: rows in, records out, and what became of the rest."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_acc.core.data.convert.formats import Options
from llama_acc.core.data.convert.run import Conversion


def convert_rows(
    format: str, rows: Sequence[Any], folder: Path, **options: Any
) -> tuple[list[dict[str, Any]], Conversion]:
    """The records that rows give, and the conversion with its counts."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return convert_file(format, path, **options)


def convert_file(format: str, path: Path, **options: Any) -> tuple[list[dict[str, Any]], Conversion]:
    """The records that a file gives."""
    conversion = Conversion(format, [path], Options(**options))
    return [converted.record for converted in conversion], conversion


def talk(*turns: tuple[str, str], **others: Any) -> dict[str, Any]:
    """A row in ShareGPT's format."""
    return {**others, "conversations": [{"from": role, "value": text} for role, text in turns]}


def turns_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    """A written dialogue's turns."""
    return [(turn["from"], turn["value"]) for turn in record["conversations"]]
