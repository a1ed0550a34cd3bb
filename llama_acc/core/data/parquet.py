"""The rows of a Parquet file, the form most data sets of Hugging Face have. pyarrow reads it, if it is installed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_acc.core.errors import UserError

PARQUET_SUFFIX = ".parquet"
_BATCH = 1024
"""Rows decoded at a time."""


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file: (its place, the cells by their columns).

    Raises:
        UserError: the file is missing or damaged, or pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"{path} is a Parquet file, and pyarrow, which reads them, is not installed",
            "type: pip install pyarrow",
        ) from None
    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield f"item {number}", value
    except FileNotFoundError as error:
        raise UserError(f"there is no data file {path}") from error
    # ValueError and OverflowError: values that Python has no like of, such as texts that are not UTF-8.
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        hint = "it may not have been copied or downloaded to its end"
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is damaged: {reason}", hint) from error
