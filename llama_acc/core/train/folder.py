"""A run's folder: claimed by one process, laid out as people expect it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_acc.core.atomic import remove, remove_unfinished, write_text_whole
from llama_acc.core.checkpoint.layout import latest_checkpoint
from llama_acc.core.checkpoint.save import checkpoints, saved_step
from llama_acc.core.errors import UserError
from llama_acc.core.recipe import Recipe

_DRY_RUN_FILES = {"recipe.yaml", "data.json"}


class RunFolder:
    """The `--output` of a run, locked while it lives. The lock goes with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        """Nothing is done before `open`, so that `close` can undo it wherever that was interrupted.

        Args:
            path: where it is.
        """
        self.path = path
        self.checkpoint: Path | None = None
        self._made: list[Path] = []
        self._lock = -1

    def open(self, *, resume: bool, claim: bool = True, tell: Callable[[str], None] = lambda text: None) -> None:
        """Makes and locks the folder, and finds what it holds.

        Args:
            resume: go on from what it holds.
            tell: is given a line for each thing in it that is damaged, and that a resume does without.
            claim: False for a process that works under another one's lock, after that has it.

        Raises:
            UserError: it is a file, cannot be written, is in use, or holds something and `resume` was not asked for.
        """
        path = self.path
        if not claim:
            self.checkpoint = latest_checkpoint(path) if resume else None
            return
        self._made = [place for place in (path, *path.parents) if not os.path.lexists(place)]
        try:
            path.mkdir(parents=True, exist_ok=True)
            # The folder itself is locked, so no lock file can be left behind.
            self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(
                f"cannot use {path} as output folder: {error.strerror}", "choose another --output"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is in use by another run", "wait for it, or choose another --output") from None
        except OSError as error:
            raise UserError(f"cannot lock {path}: {error.strerror}", "choose another --output") from None
        if not os.access(path, os.W_OK):
            raise UserError(f"cannot write into {path}", "choose another --output")
        if not resume:
            refuse_non_empty(path)
            return
        remove_unfinished(path)
        self.checkpoint = self._newest(tell)
        for other in sorted(path.glob("epoch*")):
            if other != self.checkpoint and saved_step(other) is None:
                tell(f"{other} does not say which step it is of (state/progress.json): it stays, and is not counted")

    def _newest(self, tell: Callable[[str], None]) -> Path | None:
        """The checkpoint that `latest` names; where that names none, the newest one that is there."""
        found = checkpoints(self.path)
        try:
            named = latest_checkpoint(self.path)
        except UserError as error:
            named = None
            tell(f"{error.message}; taken instead: {found[-1][1] if found else 'none'}")
        if named is None and found:
            # A kill can come between a first checkpoint and its name.
            write_text_whole(self.path / "latest", found[-1][1].name + "\n")
        elif named is None:
            remove(self.path / "latest")
        return named or (found[-1][1] if found else None)

    def close(self) -> None:
        """Gives the folder free for another run; what was made for nothing goes."""
        with contextlib.suppress(OSError):  # it holds something
            for place in self._made:
                place.rmdir()
        if self._lock >= 0:
            os.close(self._lock)

    def write_recipe(self, recipe: Recipe) -> None:
        """Writes recipe.yaml."""
        write_text_whole(self.path / "recipe.yaml", recipe.to_yaml())

    def write_data_report(self, report: dict[str, Any]) -> None:
        """Writes data.json."""
        write_text_whole(self.path / "data.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def refuse_non_empty(path: Path) -> None:
    """A folder may hold what a dry run wrote, and nothing else.

    Raises:
        UserError: it holds something.
    """
    if not path.is_dir():
        return
    there = {entry.name for entry in path.iterdir()} - _DRY_RUN_FILES
    if there:
        raise UserError(
            f"{path} is not empty: it holds {', '.join(sorted(there)[:5])}{' ...' if len(there) > 5 else ''}",
            "choose another --output, or continue the run in it with --resume",
        )
