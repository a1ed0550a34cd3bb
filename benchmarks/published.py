"""Figures that others have published, beside what is predicted here for the same run, and what makes the difference.

The figures are in `published.yaml`. Takes some minutes; needs no GPU.

    python benchmarks/published.py [--json] [--efficiency 0.4]
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llama_acc.cli import console
from llama_acc.core.memory.measure import Texts, work_of
from llama_acc.core.memory.predict import (
    PARTS,
    MemoryRequest,
    context_bytes,
    gpu_table,
    predict,
    predict_generation,
    setup_of,
)
from llama_acc.core.memory.simulate import Setup

GB = 10**9
"""Bytes of a published GB: as GB is defined. Where 2^30 was meant, the figure is 7% larger."""

AGREES = 0.1
"""Up to this relative difference two figures agree."""

COUNTS = {"device": (), "reserved": ("CUDA context",), "allocated": ("CUDA context", "allocator slack")}
"""What a figure of memory may be, and the parts that it leaves out."""


@dataclass(frozen=True)
class Compared:
    """A published figure of memory, the prediction for that run here, and what the other program itself was counted at.

    Attributes:
        who: published it.
        what: the model and the method, and whether it is "training" or "inference".
        published: GB as printed, taken to be 10^9 bytes.
        counts: what of `COUNTS` it is.
        here: bytes predicted, by part.
        theirs: bytes that their own program takes, by part.
        why: reasons why it takes more or less of a part.
    """

    who: str
    what: str
    published: float
    counts: str
    here: dict[str, int]
    theirs: dict[str, int]
    why: dict[str, str]

    @property
    def total(self) -> int:
        """Bytes predicted here."""
        return sum(self.here.values())

    @property
    def counted(self) -> int:
        """Bytes of their own program."""
        return sum(self.theirs.values())

    @property
    def difference(self) -> float:
        """By how much the prediction differs from what is published, relative."""
        return self.total / GB / self.published - 1

    @property
    def unexplained(self) -> float:
        """By how much what is published differs from what their program was counted at, relative."""
        return self.published * GB / self.counted - 1

    def by_part(self) -> dict[str, int]:
        """Bytes that their program takes more than this one, by part; their sum is the whole difference."""
        parts = {part: self.theirs.get(part, 0) - self.here.get(part, 0) for part in PARTS}
        return {part: size for part, size in parts.items() if size}


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


def published_runs() -> dict[str, MemoryRequest]:
    """The runs that figures of memory are published of, by who published them and what they are, each on one GPU."""
    names = {f"{row['who']}: {row['what'].rpartition(', ')[0]}": row["run"] for row in _table()["memory"]}
    return {name: replace(_request(run), gpus=None, model_parallel_size=None) for name, run in names.items()}


def compare_memory(tell: Callable[[str], None] = lambda _: None) -> list[Compared]:
    """Every published figure of memory with its prediction; `tell` is told of each run."""
    return [_compared(row, tell) for row in _table()["memory"]]


def _compared(row: dict[str, Any], tell: Callable[[str], None]) -> Compared:
    tell(f"predicting {row['who']}'s {row['what']}")
    counts = _table()["counts"][row["who"]]
    setup = setup_of(_request(row["run"]))
    ranks = setup.world_size
    theirs = {part: round(ranks * size * GB) for part, size in row["theirs"].items()}
    if counts == "device":
        theirs["CUDA context"] = ranks * context_bytes(ranks)
    here = _on_all_ranks(setup, row["what"].endswith("inference"))
    kept = {part: size for part, size in here.items() if part not in COUNTS[counts]}
    return Compared(row["who"], row["what"], row["published"], counts, kept, theirs, row["why"])


def _on_all_ranks(setup: Setup, generates: bool) -> dict[str, int]:
    """Bytes by part, of all model-parallel ranks together."""

    def parts(rank: int) -> dict[str, int]:
        of_rank = replace(setup, rank=rank)
        usage = predict_generation(of_rank, max(setup.lengths)) if generates else predict(of_rank)
        return usage.parts

    found = parts(0)
    if setup.world_size > 1:  # all but rank 0 are alike: it alone has the vision tower
        others = parts(1)
        found = {part: size + (setup.world_size - 1) * others[part] for part, size in found.items()}
    return found


def compare_hours(tell: Callable[[str], None] = lambda _: None) -> list[ComparedHours]:
    """Every published figure of GPU-hours with the work that was counted for it."""
    found = []
    for row in _table()["hours"]:
        tell(f"counting the work of {row['who']}'s {row['what']}")
        items, means = row["texts"]["items"], row["texts"]
        texts = Texts(items, items * means["tokens"], items * means["labels"], items * means["squares"])
        rate = gpu_table()["kinds"][row["kind"]]["bf16"] * 1e12
        hours = work_of(setup_of(_request(row["run"])), texts) * row["epochs"] / rate / 3600
        found.append(ComparedHours(row["who"], row["what"], row["hours"], hours))
    return found


def _request(run: dict[str, Any]) -> MemoryRequest:
    return MemoryRequest(**{**run, "overrides": tuple(run.get("overrides", ()))})


def show_published(efficiency: float, as_json: bool) -> None:
    """Figures of memory and of GPU-hours; `efficiency` is the share of a GPU's rate that training reaches."""
    memory, hours = compare_memory(console.note), compare_hours(console.note)
    if as_json:
        rows = [
            {**vars(row), "difference": row.difference, "by_part": row.by_part(), "unexplained": row.unexplained}
            for row in memory
        ]
        print(json.dumps({"memory": rows, "hours": [vars(row) for row in hours]}, indent=1))
        return
    console.note("a GB is 10^9 bytes; taken as 2^30, what is published would be 7% more")
    _published_memory(memory)
    print()
    table = [["GPU-hours on 8 A100-80GB", "published", f"here at {efficiency:.0%}", "theirs would be at"]]
    for timed in hours:
        ours = timed.at_full_rate / efficiency
        row_hours = [f"{timed.published:g}", f"{ours:.0f}", f"{timed.at_full_rate / timed.published:.0%}"]
        table.append([f"{timed.who}: {timed.what}", *row_hours])
    console.table(table)


def _published_memory(rows: "list[Compared]") -> None:
    """A line for each figure, then what makes the difference of those that do not agree."""
    table = [["published by", "run", "memory", "GB", "here", "difference", "theirs counted", "unexplained"]]
    for row in rows:
        ours = [f"{row.total / GB:.1f}", f"{row.difference:+.0%}"]
        theirs = [f"{row.counted / GB:.1f}", f"{row.unexplained:+.0%}"]
        table.append([row.who, row.what, row.counts, f"{row.published:g}", *ours, *theirs])
    console.table(table)
    for row in rows:
        if abs(row.difference) > AGREES:
            print(f"\n{row.who}, {row.what}, GB:\n{_explained(row)}")


def _explained(row: "Compared") -> str:
    """From the prediction over the parts to the published figure; parts below 1% of it that have no reason are one."""
    lines, small = [f"{row.total / GB:7.2f}  predicted here"], 0
    for part, size in sorted(row.by_part().items(), key=lambda item: -abs(item[1])):
        if part in row.why:
            lines.append(f"{size / GB:+7.2f}  {part}: {row.why[part]}")
        elif abs(size) >= 0.01 * row.published * GB:
            lines.append(f"{size / GB:+7.2f}  {part}")
        else:
            small += size
    lines.append(f"{small / GB:+7.2f}  other parts")
    lines.append(f"{row.counted / GB:7.2f}  their own program, counted")
    lines.append(f"{row.published - row.counted / GB:+7.2f}  not explained")
    return "\n".join([*lines, f"{row.published:7.2f}  published"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Published figures beside predictions.")
    parser.add_argument("--json", action="store_true", help="everything, in bytes")
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of a GPU's rate that is reached")
    arguments = parser.parse_args()
    show_published(arguments.efficiency, arguments.json)
