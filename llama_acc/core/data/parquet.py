"""The rows of a Parquet file, the form most data sets of Hugging Face have. pyarrow reads it, if it is installed.

A value is what it would be in a JSON file of the same rows: columns of JSON text (Arrow's `arrow.json`, which datasets
writes where rows differ in shape; Parquet's logical type JSON) are decoded at any depth, a struct of lists (datasets'
`Sequence`) is a list of objects, and NaN, which pandas writes for an empty cell, is null.
"""

from collections.abc import Callable, Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import IO, Any

from llama_acc.core.errors import UserError

PARQUET_SUFFIX = ".parquet"
_BATCH = 1024  # rows

_Decode = Callable[[Any], Any]


def parquet_rows(
    path: Path, content: IO[bytes], decode_json: Callable[[str], Any]
) -> Iterator[tuple[str, Any, str | None]]:
    """The rows of a file: (its place, the cells by their columns, why this row cannot be read).

    `path` is what it is called, `content` what it holds.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"{path} is a Parquet file, and pyarrow, which reads them, is not installed", "type: pip install pyarrow"
        ) from None
    try:
        with ParquetFile(content) as file:
            is_json = iter([file.schema.column(i).logical_type.type == "JSON" for i in range(len(file.schema))])
            decoders = {field.name: _decoder(field, is_json, decode_json) for field in file.schema_arrow}
            if len(decoders) != len(file.schema_arrow):
                raise UserError(f"{path}: a column stands twice in {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    try:
                        yield f"item {number}", {name: decoders[name](cell) for name, cell in value.items()}, None
                    except (JSONDecodeError, RecursionError) as error:
                        yield f"item {number}", value, f"a cell that should hold JSON: {error}"
    # ValueError and OverflowError: values that Python has no like of, such as texts that are not UTF-8.
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{path} is damaged: {reason}", "it may not have been copied or downloaded to its end"
        ) from error


def _decoder(field: Any, is_json: Iterator[bool], decode_json: Callable[[str], Any]) -> _Decode:
    """How a column's values become what they would be in JSON; `is_json`: whether Parquet calls them so, of each of the
    leaves from here on."""
    from pyarrow import types

    kind, name = field.type, (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    if hasattr(kind, "extension_name"):
        kind, name = kind.storage_type, kind.extension_name
    if types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        inner = {field.name: _decoder(field, is_json, decode_json) for field in fields}
        is_sequence = len(inner) > 1 and all(_is_list(field.type) for field in fields)
        return lambda value: value and _struct({name: inner[name](cell) for name, cell in value.items()}, is_sequence)
    if _is_list(kind):
        element = _decoder(kind.value_field, is_json, decode_json)
        return lambda value: value and [element(item) for item in value]
    if types.is_map(kind):
        key, item = (_decoder(part, is_json, decode_json) for part in (kind.key_field, kind.item_field))
        return lambda value: None if value is None else {key(k): item(v) for k, v in value}
    if next(is_json, False) or name == "arrow.json":
        return lambda value: None if value is None else decode_json(value)
    return lambda value: value if value == value else None  # NaN


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _struct(cells: dict[str, Any], is_sequence: bool) -> Any:
    lengths = {-1 if cell is None else len(cell) for cell in cells.values()} if is_sequence else set()
    if len(lengths) != 1 or lengths == {-1}:
        return cells
    return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
