"""Figures that others have published, beside what is predicted here for the same run: `published.yaml`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llama_acc.core.vram.gpus import GIB, kind
from llama_acc.core.vram.hours import Texts, gpu_hours, work_of
from llama_acc.core.vram.predict import Usage, predict, predict_generation
from llama_acc.core.vram.request import Request, setup_of

AGREES = 0.1
"""Up to this relative difference two figures agree."""


@dataclass(frozen=True)
class Compared:
    """A published figure of memory and the prediction for it.

    Attributes:
        who: published it.
        what: the model and the method, and whether it is "training" or "inference".
        published: GB as printed.
        usage: the prediction.
        why: what makes the difference.
    """

    who: str
    what: str
    published: float
    usage: Usage
    why: str

    @property
    def difference(self) -> float:
        """Of the prediction to what is published, relative."""
        return self.usage.total / GIB / self.published - 1

    @property
    def weights(self) -> int:
        """Bytes of the weights alone, in which both should agree."""
        return self.usage.parts["weights"] + self.usage.parts["quantisation state"] + self.usage.parts["vision tower"]


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
        usages = {"training": predict(setup).training}
        if "inference" in row:
            usages["inference"] = predict_generation(setup, max(setup.lengths))
        found += [
            Compared(row["who"], f"{row['what']}, {work}", row[work], usage, row["why"])
            for work, usage in usages.items()
        ]
    return found


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
