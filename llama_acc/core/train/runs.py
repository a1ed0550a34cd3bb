"""The runs below a folder, from the files they leave. Imports no torch: what is read is small, or the end of a file."""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object, read_yaml

State = Literal["running", "done", "stopped", "not started", "damaged"]
_TAIL = 1 << 16  # bytes of a log, hundreds of its lines


@dataclass(frozen=True)
class Run:
    """A run's folder. None: its files do not say it, or not yet.

    Attributes:
        base: the checkpoints it starts from, or the size of a model of random weights.
        step: optimizer steps done.
        loss: per label token, of the last step.
        tokens_per_second: over the last steps.
        seen: when it last wrote, in seconds since 1970.
        problem: what is damaged.
    """

    folder: str
    state: State
    seen: float
    recipe: str | None = None
    base: str | None = None
    method: str | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    problem: str | None = None


def find_runs(folder: Path) -> list[Run]:
    """The runs in and below a folder, the one that wrote last first. Links are not followed.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", "give the folder that runs are in: llama-acc runs FOLDER")
    return sorted(map(_read_run, _folders(folder)), key=lambda run: -run.seen)


def _folders(top: Path) -> Iterator[Path]:
    for name, folders, files in os.walk(top):
        if {"recipe.yaml", "data.json"} <= {*files}:
            folders.clear()  # checkpoints, which have a recipe too
            yield Path(name)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]


def _read_run(folder: Path) -> Run:
    log, running = folder / "metrics.jsonl", _is_locked(folder)
    seen = (log if log.is_file() else folder / "recipe.yaml").stat().st_mtime
    try:
        recipe, lines = read_yaml(folder / "recipe.yaml"), _last_lines(log)
        model, tuning, train = recipe["model"], recipe["tuning"], recipe["train"]
        bases = [model["pretrained"]] if isinstance(model["pretrained"], str) else model["pretrained"]
        known = {
            "recipe": str(recipe["name"]),
            "base": " + ".join(map(_shown, bases or [])) or model["size"] or "random",
            "method": tuning["method"] + ("" if tuning["quantize"] == "none" else f"-{tuning['quantize']}"),
        }
        steps = [line for line in lines if "loss" in line]
        if not steps:
            return Run(str(folder), "running" if running else "not started", seen, **known)
        last, validation = steps[-1], [line for line in lines if "validation_loss" in line]
        total = math.ceil(train["epochs"] * round(last["step"] / last["epoch"]) - 1e-9)
        total = min(total, train["max_steps"] or total)
        patience = train.get("early_stopping_patience")
        ends = last["step"] >= total or bool(
            patience and validation and validation[-1].get("validations_since_best", 0) >= patience
        )
        # The last checkpoint comes after the last line, the report after that.
        done = ends and (folder / "report.md").is_file() and _saved_step(folder) in (None, last["step"])
        return Run(
            str(folder),
            "running" if running else "done" if done else "stopped",
            seen,
            **known,
            step=last["step"],
            total_steps=total,
            loss=last["loss"],
            validation_loss=validation[-1]["validation_loss"] if validation else None,
            tokens_per_second=sum(line["tokens"] for line in steps)
            / sum(line["tokens"] / line["tokens_per_second"] for line in steps),
        )
    except UserError as error:
        problem = error.message
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    return Run(str(folder), "running" if running else "damaged", seen, problem=problem.splitlines()[0])


def _shown(base: str) -> str:
    """A checkpoint as people call it: of a run, by that one's name too."""
    return "/".join(Path(base).parts[-2 if Path(base).name.startswith("epoch") else -1 :])


def _is_locked(folder: Path) -> bool:
    """Whether a process has the run in hand; see `RunFolder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _last_lines(log: Path) -> list[dict[str, Any]]:
    """The last whole lines of metrics.jsonl, and before them the last validation's."""
    if not log.is_file():
        return []
    content = log.read_bytes()
    start = content.rfind(b"\n", 0, max(0, len(content) - _TAIL)) + 1
    place = content.rfind(b'"validation_loss"', 0, start)
    texts = content[start:].split(b"\n")[:-1]
    if place >= 0:
        texts.insert(0, content[content.rfind(b"\n", 0, place) + 1 : content.find(b"\n", place)])
    return [json.loads(text) for text in texts]


def _saved_step(folder: Path) -> int | None:
    """The step of the newest checkpoint; None: it was taken away."""
    with contextlib.suppress(UserError, OSError, LookupError):
        name = (folder / "latest").read_text(encoding="utf-8").strip()
        step: int = read_object(folder / name / "state" / "progress.json")["step"]
        return step
    return None
