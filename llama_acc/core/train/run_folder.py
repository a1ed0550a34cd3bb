"""A run's folder: locked by one process, laid out as people expect it, resumed by the same run only."""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_acc.core.atomic import remove, remove_unfinished, write_text_whole
from llama_acc.core.checkpoint.adapter import base_fingerprint
from llama_acc.core.checkpoint.layout import latest_checkpoint
from llama_acc.core.checkpoint.resume import FORMAT_VERSION, read_progress
from llama_acc.core.checkpoint.save import checkpoints, free_bytes, saved_step
from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import read_object
from llama_acc.core.recipe import Recipe
from llama_acc.core.text import count_text, size_text
from llama_acc.core.tokenizer import find_tokenizer, load_tokenizer
from llama_acc.core.train.plan import Plan
from llama_acc.core.train.runs import flat

_DRY_RUN_FILES = {"recipe.yaml", "data.json"}
# A resumed run may be prolonged, logged, saved or spread over processes otherwise; it must not be another run.
_MAY_CHANGE = {
    "name",
    "description",
    "train.epochs",
    "train.max_steps",
    "train.early_stopping_patience",
    "train.batch_size",
    "train.micro_batch_tokens",
    "train.stream_base",
    "train.sample_prompts",
    "train.sample_every_steps",
    "train.sample_max_new_tokens",
    "train.trackers",
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
# Paths of files whose content is compared.
_DATA = re.compile(r"data\.sources\.\d+\.(path|root)")
_OTHER_RUN = "or start a new run in another --output"


class RunFolder:
    """The `--output` of a run, locked while it lives. The lock goes with the process, however that ends.

    Nothing is done before `open`, so that `close` can undo it wherever that was interrupted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint: Path | None = None
        self._made: list[Path] = []
        self._lock = -1

    def open(self, *, resume: bool, claim: bool = True, note: Callable[[str], None] = lambda text: None) -> None:
        """Makes and locks the folder, and finds what it holds; without `claim` another process has locked it.

        `note` receives a line for each thing in it that is damaged, and that a resume does without.

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
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)  # `llama-acc runs` may just be looking
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is in use by another run", "wait for it, or choose another --output") from None
        except OSError as error:
            raise UserError(
                f"cannot use {path} as output folder: {error.strerror}", "choose another --output"
            ) from None
        if not os.access(path, os.W_OK):
            raise UserError(f"cannot write into {path}", "choose another --output")
        if not resume:
            refuse_non_empty(path)
            return
        remove_unfinished(path)
        self.checkpoint = self._newest(note)
        for other in sorted(path.glob("epoch*")):
            if other != self.checkpoint and saved_step(other) is None:
                note(f"{other} does not say which step it is of (state/progress.json): it stays, and is not counted")

    def _newest(self, note: Callable[[str], None]) -> Path | None:
        """The checkpoint that `latest` names; where that names none, the newest one that is there."""
        found = [path for _, path in checkpoints(self.path)]
        named = None
        try:
            named = latest_checkpoint(self.path)
        except UserError as error:
            note(f"{error.message}; taken instead: {found[-1] if found else 'none'}")
        if named is not None:
            return named
        if not found:
            remove(self.path / "latest")
            return None
        # A kill can come between a first checkpoint and its name.
        write_text_whole(self.path / "latest", found[-1].name + "\n")
        return found[-1]

    def close(self) -> None:
        """Gives the folder free for another run; what was made for nothing goes."""
        with contextlib.suppress(OSError):  # it holds something
            for place in self._made:
                place.rmdir()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def write_plan(self, plan: Plan) -> None:
        """Writes recipe.yaml and data.json."""
        write_text_whole(self.path / "recipe.yaml", plan.recipe.to_yaml())
        write_text_whole(self.path / "data.json", json.dumps(plan.report, indent=1, ensure_ascii=False) + "\n")


def refuse_non_empty(path: Path) -> None:
    """A folder may hold what a dry run wrote, and nothing else: else a UserError."""
    there = {entry.name for entry in path.iterdir()} - _DRY_RUN_FILES if path.is_dir() else set()
    if there:
        raise UserError(
            f"{path} is not empty: it holds {', '.join(sorted(there)[:5])}{' ...' if len(there) > 5 else ''}",
            "choose another --output, or continue the run in it with --resume",
        )


def check_disk(plan: Plan, output: Path, done: int = 0) -> None:
    """Compares the space that checkpoints will take, besides those in `output`, with what is free."""
    existing = len(checkpoints(output))
    needed, free, one = plan.disk_bytes(existing, done), free_bytes(output), plan.checkpoint_bytes()
    if needed > free:
        beside = f" beside the {existing} there" if existing else ""
        raise UserError(
            f"too little disk for the checkpoints: {needed // one} of {size_text(one)}{beside} need "
            f"{size_text(needed)}, {size_text(free)} are free at {output}",
            "free some, choose another --output" + (", or lower checkpoint.keep" if plan.saving.keep != 1 else ""),
        )


def check_same_run(plan: Plan, checkpoint: Path) -> int:
    """Compares a run with the checkpoint it is to resume from, whose state's bytes are checked; returns its steps.

    Data, base and tokenizer are compared by content, so they may lie elsewhere, and under other names.

    Raises:
        UserError: a damaged state, all that makes it another run, or fewer steps than are done.
    """
    progress = read_progress(checkpoint)
    if progress["format_version"] > FORMAT_VERSION:
        raise UserError(f"{checkpoint}/state was written by a newer version", "update llama-acc")
    changed = _changed_keys(plan, checkpoint, progress)
    if changed:
        problems = [f"{key}: {text}" for key, text in changed.items()]
        raise UserError(
            f"the recipe is not the one {checkpoint} was trained with:\n{listed(problems)}",
            "leave out --recipe and what you changed: --resume then takes the run's own recipe.yaml; " + _OTHER_RUN,
        )
    if plan.train.fingerprint() != progress["data"]:
        before, now = _size(checkpoint.parent / "data.json"), _size(plan.report)
        if before == now:
            differs = f"it has {now} as before, but other text, in another order, or labeled otherwise"
        else:
            differs = f"{before} before, {now} now"
        raise UserError(
            f"the data is not what {checkpoint} was trained on: {differs}",
            f"resume with the same files; --data FILE says where they are now; {_OTHER_RUN}",
        )
    step: int = progress["step"]
    if step > plan.total_steps:
        raise UserError(
            f"{checkpoint} has done {count_text(step, 'step')}, the recipe asks for {plan.total_steps}",
            f"raise train.epochs or train.max_steps, or leave them as they were; {_OTHER_RUN}",
        )
    return step


def _size(report: Path | dict[str, Any]) -> str:
    """The size of the data that a report, or the file it was kept in, tells of."""
    try:
        found = read_object(report) if isinstance(report, Path) else report
        return f"{count_text(found['items'], 'item')} and {count_text(found['tokens'], 'token')}"
    except (UserError, KeyError, TypeError, ValueError):
        return "unknown"


def _changed_keys(plan: Plan, checkpoint: Path, progress: dict[str, Any]) -> dict[str, str]:
    """The keys that make it another run, each with what it was and is."""
    before = flat(Recipe.load(checkpoint / "recipe.yaml").model_dump(mode="json"))
    now = flat(plan.recipe.model_dump(mode="json"))
    changed = {
        key: f"{before.get(key)!r} before, {now.get(key)!r} now"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and key not in _MAY_CHANGE and not _DATA.fullmatch(key)
    }

    def compare(key: str, same: bool, shown: object, other: str) -> None:
        """What is the same by its content may have another name; what is not may have the same."""
        if same:
            changed.pop(key, None)
        else:
            changed[key] = f"{changed.get(key, shown)}, {other}"

    if "data.validation.path" in changed and plan.validation is not None:
        same = plan.validation.fingerprint() == progress.get("validation")
        compare("data.validation.path", same, "", "with other items")
    shape = [key for key in changed if re.match(r"model\.(params|size)\b", key)]
    if shape and json.loads(json.dumps(plan.config.to_params())) == read_object(checkpoint / "config.json"):
        for key in shape:
            del changed[key]
    moved = "model.pretrained" in changed
    if "model.tokenizer" in changed or moved:
        saved = find_tokenizer(checkpoint)
        same = saved is not None and load_tokenizer(saved).fingerprint() == plan.tokenizer.fingerprint()
        compare("model.tokenizer", same, plan.tokenizer.path, "another tokenizer")
    # A base of which nothing is used any more may be any, where it was.
    if progress.get("base") is not None and plan.layouts and (moved or plan.recipe.has_frozen):
        same = base_fingerprint(plan.layouts, plan.config) == progress["base"]
        compare(
            "model.pretrained", same, " and ".join(str(layout.folder) for layout in plan.layouts), "with other weights"
        )
    return changed
