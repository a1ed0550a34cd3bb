"""A run's folder: claimed by one process, laid out as people expect it."""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from llama_acc.core.checkpoint.files import remove_unfinished, write_text_whole
from llama_acc.core.checkpoint.layout import latest_checkpoint
from llama_acc.core.checkpoint.save import checkpoints
from llama_acc.core.errors import UserError, listed
from llama_acc.core.recipe import Recipe

_DRY_RUN_FILES = {"recipe.yaml", "data.json"}
# A resumed run may be prolonged, logged, saved or spread over processes otherwise; it must not be another run.
_MAY_CHANGE = {
    "name",
    "description",
    "train.epochs",
    "train.max_steps",
    "train.batch_size",
    "train.micro_batch_tokens",
    "checkpoint.keep",
    "checkpoint.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.asynchronous",
    "data.validation.every_steps",
    "data.images.max_pixels",
    "data.images.workers",
    "parallel.model_parallel_size",
    "parallel.data_parallel",
    "parallel.accumulate_unsharded",
}


class RunFolder:
    """The `--output` of a run, locked while it lives. The lock goes with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        """Nothing is done before `open`, so that `close` can undo it wherever that was interrupted.

        Args:
            path: where it is.
        """
        self.path = path
        self.checkpoint: Path | None = None
        self._made, self._lock = False, -1

    def open(self, *, resume: bool, claim: bool = True) -> None:
        """Makes and locks the folder, and finds what it holds.

        Args:
            resume: go on from what it holds.
            claim: False for a process that works under another one's lock, after that has it.

        Raises:
            UserError: it is a file, cannot be written, is in use, or holds something and `resume` was not asked for.
        """
        path = self.path
        if not claim:
            self.checkpoint = latest_checkpoint(path) if resume else None
            return
        self._made = not path.exists()
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
        self.checkpoint = latest_checkpoint(path) or self._first_checkpoint()

    def _first_checkpoint(self) -> Path | None:
        """A first checkpoint that a killed process wrote whole, but did not come to name in `latest`."""
        found = checkpoints(self.path)
        if found:
            write_text_whole(self.path / "latest", found[-1].name + "\n")
        return found[-1] if found else None

    def close(self) -> None:
        """Gives the folder free for another run; one that was made for nothing goes."""
        if self._made:
            with contextlib.suppress(OSError):  # it holds something
                self.path.rmdir()
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


def check_same_run(recipe: Recipe, checkpoint: Path) -> None:
    """Compares a recipe with the one of the checkpoint it is to continue.

    Raises:
        UserError: keys that make it another run, all of them listed.
    """
    before = _flat(Recipe.load(checkpoint / "recipe.yaml").model_dump(mode="json"))
    now = _flat(recipe.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and key not in _MAY_CHANGE
    ]
    if changed:
        raise UserError(
            f"the recipe is not the one {checkpoint} was trained with:\n{listed(changed)}",
            "leave out --recipe and what you changed: --resume then takes the run's own recipe.yaml. "
            "Or start a new run in another --output",
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        pairs: list[tuple[str, Any]] = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        pairs = [(str(i), value) for i, value in enumerate(values)]
    else:
        return {prefix: values}
    return {
        name: leaf for key, value in pairs for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
