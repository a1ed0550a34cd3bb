"""What ranks of one machine do together before training, and what each of them then has."""

import os
import re
from pathlib import Path
from typing import Any

from llama_acc.core.distributed.groups import Parallel, init_distributed
from llama_acc.core.train.callback import Callback
from llama_acc.core.train.plan import make_plan_together
from tests.core.tiny import CPU
from tests.core.train.runs import quickstart


class _Told(Callback):
    def __init__(self) -> None:
        self.encoded: list[str] = []

    def working(self, text: str, key: str | None = None) -> None:
        if text.startswith("encoding "):
            self.encoded.append(str(key))


def planned(overrides: list[str], cache_sizes: list[str]) -> list[dict[str, Any]]:
    """Plans on this rank among the others, with each of these cache sizes."""
    results = []
    with init_distributed(CPU, 1) as parallel:
        for size in cache_sizes:
            os.environ["LLAMA_ACC_CACHE_GIB"] = size
            results.append(_planned(overrides, parallel))
    return results


def _planned(overrides: list[str], parallel: Parallel) -> dict[str, Any]:
    """Which files this rank encoded itself, which it has mapped, and what is in them."""
    told = _Told()
    plan = make_plan_together(quickstart(*overrides), told, parallel, recipe_folder=None)
    parts = [part for part in (plan.train, plan.validation) if part is not None]
    return {
        "encoded": told.encoded,
        "mapped": mapped_files(".tokens"),
        "fingerprints": [part.fingerprint() for part in parts],
        "documents": [part.document(i)[0].tolist() for part in parts for i in range(len(part))],
        "lengths": [part.lengths.tolist() for part in parts],
        "report": plan.report,
    }


def mapped_files(suffix: str) -> list[str]:
    """Device and inode of the files that this process has mapped, whether they have a name still or not."""
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, _, _, device, inode, *name = line.split(maxsplit=5)
        if name and re.search(rf"{re.escape(suffix)}( \(deleted\))?$", name[0]):
            found.add(f"{device} {inode}")
    return sorted(found)
