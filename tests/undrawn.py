"""Runs whose loss is not drawn: for one so small, the picture would take as long as the training."""

from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

from llama_acc.core.atomic import write_whole


def undrawn() -> AbstractContextManager[object]:
    """While it is open, loss.png is a file without a picture."""

    def leave_a_file(metrics: object, path: Path, title: str) -> None:
        write_whole(path, b"no picture")

    return mock.patch("llama_acc.core.train.log.draw_loss", leave_a_file)
