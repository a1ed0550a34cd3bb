"""Runs as who watches them sees them: what they report as they go on, and what their files say. Imports no torch."""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama_acc.core.errors import UserError
from llama_acc.core.hub import fetch_data
from llama_acc.core.input_files import read_object, read_yaml

if TYPE_CHECKING:
    from llama_acc.core.train.plan import Plan

State = Literal["running", "done", "stopped", "not started", "damaged"]
Metrics = dict[str, Any]
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
_OF_A_STEP = ("loss", "lr", "tokens", "tokens_per_second", "peak_memory_gib")
_TAIL = 1 << 16  # bytes of a log, hundreds of its lines


class Callback:
    """Watches a run and shows nothing; a subclass shows what it overrides."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def fetch(self, address: str) -> list[Path]:
        """The files that an address of data means; missing ones are downloaded, and that may be shown."""
        return fetch_data(address)

    def progress(self, label: str, done: int = 0, total: int = 0) -> None:
        """What is being done, such as "loading the model", and how far it is; `total` 0: that is not known."""

    def plan(self, plan: "Plan") -> list[tuple[str, str]]:
        """What will be done, before it starts. Returns what report.md says of it: subjects and texts."""
        return []

    def step(self, metrics: Metrics, plan: "Plan") -> None:
        """An optimizer step, as in metrics.jsonl."""

    def validation(self, metrics: Metrics) -> None:
        """A validation line, as in metrics.jsonl."""

    def samples(self, step: int, answers: Mapping[str, str]) -> None:
        """What the model answers to each sample prompt after so many steps."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is whole on disk."""


@dataclass(frozen=True)
class Run:
    """A run's folder. None: its files do not say it, or not yet."""

    folder: str
    state: State
    seen: float  # when it last wrote, in seconds since 1970
    recipe: str | None = None
    base: str | None = None  # the checkpoints it starts from, or the size of a model of random weights
    method: str | None = None
    step: int | None = None  # optimizer steps done
    total_steps: int | None = None
    loss: float | None = None  # per label token, of the last step
    validation_loss: float | None = None
    tokens_per_second: float | None = None  # over the last steps
    problem: str | None = None  # what is damaged


def find_runs(*folders: Path) -> list[Run]:
    """The runs in and below folders, the one that wrote last first. Links are not followed."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}", "give the folder that runs are in: llama-acc runs FOLDER")
    found = {below.resolve(): below for folder in folders for below in _folders(folder)}
    return sorted(map(_read_run, found.values()), key=lambda run: -run.seen)


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


def read_metrics(path: Path) -> tuple[list[Metrics], list[int]]:
    """The lines of a metrics.jsonl that can be read, and the numbers of the others, from 1; none there is an empty one.

    A last line that was cut short by a kill is neither.
    """
    return read_lines(path, is_metrics)


def read_lines(path: Path, is_whole: Callable[[Metrics], bool]) -> tuple[list[Metrics], list[int]]:
    """The same of any log, of which a line is whole that has what it needs."""
    lines, damaged = [], []
    texts = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, text in enumerate(texts, start=1):
        line = None
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
        if isinstance(line, dict) and type(line.get("step")) is int and is_whole(line):
            lines.append(line)
        elif text.strip() and number < len(texts):
            damaged.append(number)
    return lines, damaged


def is_metrics(line: Metrics) -> bool:
    """Whether it has all that is needed of a step or a validation."""
    if not all(type(value) is float or (type(value) is int and abs(value) < 2**63) for value in line.values()):
        return False
    is_step = all(key in line for key in _OF_A_STEP) and line["tokens_per_second"] > 0
    return is_step or "validation_loss" in line


def is_sample(line: Metrics) -> bool:
    """Whether it is an answer to a sample prompt."""
    return all(type(line.get(key)) is str for key in ("prompt", "answer"))


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys, such as `data.sources.0.path`."""
    if isinstance(values, dict) and values:
        pairs: list[tuple[str, Any]] = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        pairs = [(str(i), value) for i, value in enumerate(values)]
    else:
        return {prefix: values}
    return {
        name: leaf for key, value in pairs for name, leaf in flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
