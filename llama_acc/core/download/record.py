"""What was downloaded into a folder: `.llama-acc-download` in it.

`{"format_version": 1, "files": {name: {"bytes", "identity", "source"}}, "done": {address: [names]}}`
"""

import contextlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_acc.core.checkpoint.files import write_text_whole
from llama_acc.core.errors import UserError

if TYPE_CHECKING:
    from llama_acc.core.download.remote import Remote

FORMAT_VERSION = 1
NAME = ".llama-acc-download"


class Record:
    """The files of a folder that came whole, and from where."""

    def __init__(self, folder: Path) -> None:
        """Reads it. One that cannot be read counts as none: files are then compared with what they should be.

        Raises:
            UserError: a newer program wrote it.
        """
        self.folder = folder
        self._path = folder / NAME
        self._lock = threading.Lock()
        self._files: dict[str, dict[str, Any]] = {}
        self._done: dict[str, list[str]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(self._path.read_text(encoding="utf-8"))
            if known["format_version"] > FORMAT_VERSION:
                raise UserError(f"{self._path} was written by a newer version of llama-acc", "update it")
            self._files, self._done = dict(known["files"]), dict(known["done"])

    def holds(self, remote: "Remote") -> bool:
        """Whether a file is here as it came from there."""
        known = self._files.get(remote.name)
        return known is not None and known["identity"] == remote.identity and self._is_untouched(remote.name)

    def knows(self, name: str) -> bool:
        """Whether a file of this name came here."""
        return name in self._files

    def finished(self, address: str) -> list[Path] | None:
        """The files of an address that came whole and are still here; None if one of them is not."""
        names = self._done.get(address)
        if names is None or not all(self._is_untouched(name) for name in names):
            return None
        return [self.folder / name for name in names]

    def add(self, remote: "Remote") -> None:
        """Notes a file that is whole."""
        with self._lock:
            size = (self.folder / remote.name).stat().st_size
            self._files[remote.name] = {"bytes": size, "identity": remote.identity, "source": remote.source}
            self._write()

    def finish(self, address: str, names: Sequence[str]) -> None:
        """Notes that these are all files an address means."""
        with self._lock:
            self._done[address] = list(names)
            self._write()

    def _is_untouched(self, name: str) -> bool:
        path = self.folder / name
        return name in self._files and path.is_file() and path.stat().st_size == self._files[name]["bytes"]

    def _write(self) -> None:
        known = {"format_version": FORMAT_VERSION, "files": self._files, "done": self._done}
        write_text_whole(self._path, json.dumps(known, indent=1) + "\n")
