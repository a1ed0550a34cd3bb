"""From one process of a machine to the others: what it found, by a folder they all see. Large arrays are mapped there.

Both ends are processes of one run of one user, so what is passed may be a pickle.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

_LARGE = 1 << 16  # bytes
_FILE = "handed-on.pickle"


def hand_on(value: Any, folder: Path) -> None:
    """Leaves a value in a folder that only this run writes to."""
    with (folder / _FILE).open("wb") as file:
        _Pickler(file, folder).dump(value)


def taken_over(folder: Path) -> Any:
    """What was left there. Its arrays stay whole when the folder is deleted."""
    return _Unpickler(io.BytesIO((folder / _FILE).read_bytes()), folder).load()


class _Pickler(pickle.Pickler):
    """Puts large arrays into files of their own."""

    def __init__(self, file: Any, folder: Path) -> None:
        super().__init__(file)
        self._folder, self._count = folder, 0

    def persistent_id(self, value: Any) -> str | None:
        if not isinstance(value, np.ndarray) or value.nbytes < _LARGE:
            return None
        self._count += 1
        name = f"handed-on-{self._count}.npy"
        np.save(self._folder / name, value, allow_pickle=False)
        return name


class _Unpickler(pickle.Unpickler):
    """Maps them."""

    def __init__(self, file: Any, folder: Path) -> None:
        super().__init__(file)
        self._folder = folder

    def persistent_load(self, name: Any) -> Any:
        return np.load(self._folder / name, mmap_mode="r", allow_pickle=False)
