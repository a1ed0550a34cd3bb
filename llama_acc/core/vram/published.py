"""Figures that others have published, beside what is predicted here for the same run: `published.yaml`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llama_acc.core.vram.gpus import kind
from llama_acc.core.vram.hours import Texts, gpu_hours, work_of
from llama_acc.core.vram.predict import Usage, predict, predict_generation
from llama_acc.core.vram.request import Request, setup_of
from llama_acc.core.vram.simulation import Setup
from llama_acc.core.vram.theirs import PARTS, RANKS, more_of_inference, more_of_training, other_ranks

GB = 10**9
"""Bytes of a published GB: as GB is defined. Where 2^30 was meant, the figure is 7% larger."""

AGREES = 0.1
"""Up to this relative difference two figures agree."""


@dataclass(frozen=True)
class Compared:
    """A published figure of memory and the prediction for it.

    Attributes:
        who: published it.
        what: the model and the method, and whether it is "training" or "inference".
        published: GB as printed, taken to be 10^9 bytes.
        usage: the prediction.
        more: bytes that they take besides, by what for.
        length: tokens of an example, where no length was published; else None.
        like_length: with how many tokens of an example the prediction and `more` would be what is published.
    """

    who: str
    what: str
    published: float
    usage: Usage
    more: dict[str, int]
    length: int | None = None
    like_length: int | None = None

    @property
    def difference(self) -> float:
        """Of the prediction to what is published, relative."""
        return self.usage.total / GB / self.published - 1

    @property
    def explained(self) -> int:
        """Bytes of the prediction and of what they take besides."""
        return self.usage.total + sum(self.more.values())

    @property
    def rest(self) -> float:
        """Bytes of what is published that are left unexplained; less than 0 where too much is explained."""
        return self.published * GB - self.explained


@dataclass(frozen=True)
class ComparedHours:
    """Published GPU-hours.

    Attributes:
        who: published them.
        what: the run.
        published: hours of all GPUs together.
        at_full_rate: hours that the counted work takes at the GPUs' whole rate.
    """

    who: str
    what: str
    published: float
    at_full_rate: float


@cache
def _table() -> Any:
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def published_runs() -> dict[str, Request]:
    """The runs that figures of memory are published of, by who published them and what they are."""
    return {f"{row['who']}: {row['what']}": _request(row["run"]) for row in _table()["memory"]}


def compare_memory(tell: Callable[[str], None] = lambda _: None) -> list[Compared]:
    """Every published figure of memory with its prediction; `tell` is told of each run."""
    found = []
    for row in _table()["memory"]:
        tell(f"predicting {row['who']}'s {row['what']}")
        setup = setup_of(_request(row["run"]))
        found += [_compared(row, work, setup) for work in ("training", "inference") if work in row]
    return found


def _compared(row: dict[str, Any], work: str, setup: Setup) -> Compared:
    usage, more = _theirs(row, work, setup)
    compared = Compared(row["who"], f"{row['what']}, {work}", row[work], usage, more)
    if work == "inference" or row.get("length_is_told", True) or abs(compared.difference) <= AGREES:
        return compared
    twice, more_of_twice = _theirs(row, work, replace(setup, lengths=tuple(2 * length for length in setup.lengths)))
    by_length = twice.total + sum(more_of_twice.values()) - compared.explained
    length = max(setup.lengths)
    return replace(compared, length=length, like_length=round(length * (1 + compared.rest / by_length)))


def _theirs(row: dict[str, Any], work: str, setup: Setup) -> tuple[Usage, dict[str, int]]:
    predicted = _training if work == "training" else _inference
    usage = predicted(setup)
    counted = more_of_training(setup, usage) if work == "training" else more_of_inference(setup)
    more = {part: counted[part] for name in row.get("parts", ()) if (part := PARTS[name]) in counted}
    if "ranks" in row:
        more = {RANKS: other_ranks(setup, usage, row["ranks"], predicted), **more}
    return usage, {part: size for part, size in more.items() if size}


def _training(setup: Setup) -> Usage:
    return predict(setup).training


def _inference(setup: Setup) -> Usage:
    return predict_generation(setup, max(setup.lengths))


def published_hours() -> list[dict[str, Any]]:
    """Every published figure of GPU-hours as printed: "who", "what", "hours" and "kind" of GPU."""
    return [{key: row[key] for key in ("who", "what", "hours", "kind")} for row in _table()["hours"]]


def compare_hours(tell: Callable[[str], None] = lambda _: None) -> list[ComparedHours]:
    """Every published figure of GPU-hours with the work that was counted for it."""
    found = []
    for row in _table()["hours"]:
        tell(f"counting the work of {row['who']}'s {row['what']}")
        items, means = row["texts"]["items"], row["texts"]
        texts = Texts(items, items * means["tokens"], items * means["labels"], items * means["squares"])
        hours = gpu_hours(work_of(setup_of(_request(row["run"]))), texts, row["epochs"], kind(row["kind"]), 1.0)
        found.append(ComparedHours(row["who"], row["what"], row["hours"], hours))
    return found


def _request(run: dict[str, Any]) -> Request:
    return Request(**{**run, "overrides": tuple(run.get("overrides", ()))})
