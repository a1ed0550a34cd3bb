"""What the processes of test_parallel.py do."""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_acc.core.distributed.groups import Parallel, init_distributed, local_part
from llama_acc.core.errors import UserError
from llama_acc.core.model.transformer import build_on_meta
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.plan import make_plan_together
from llama_acc.core.train.runs import Callback
from llama_acc.core.train.trainer import Trainer
from tests.core.ranks import next_port
from tests.core.tiny import CPU, SMALL
from tests.core.train.runs import plan_of, quickstart, run


def runs(todo: Sequence[dict[str, Any]]) -> None:
    """Several runs, one after the other."""
    for one in todo:
        run(Path(one["output"]), *one["overrides"], resume=one.get("resume", False))
        next_port()


def of_two(modes: Sequence[Sequence[str]], data: Sequence[str], temporary: str, home: str) -> dict[str, Any]:
    """What two processes do one after the other, with these folders for temporary files and for the cache."""
    tempfile.tempdir, os.environ["LLAMA_ACC_HOME"] = temporary, home
    with init_distributed(CPU, 1) as parallel:
        agreement, planned = _agreement(parallel), []
        for size in ("0", "10"):
            os.environ["LLAMA_ACC_CACHE_GIB"] = size
            planned.append(_planned(data, parallel))
    next_port()
    counted = [_collectives(overrides) for overrides in modes]
    rows = {mode: _frozen_rows(mode) for mode in ("ddp", "sdp", "fsdp")}
    return {"collectives": counted, "frozen_rows": rows, "planned": planned, "agreement": agreement}


class Collectives(TorchDispatchMode):
    """Counts what the ranks do together."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.counts[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def _collectives(overrides: Sequence[str]) -> list[dict[str, int]]:
    """How often each of two steps used each collective."""
    steps = []
    with init_distributed(CPU, 1) as parallel:
        trainer = Trainer(plan_of(*overrides), CPU, None, parallel)
        for _ in range(2):
            with Collectives() as mode:
                trainer.advance(extras=[0.0])
            steps.append(dict(mode.counts))
    next_port()
    return steps


def _frozen_rows(mode: Any) -> list[int]:
    """The rows stored of a frozen and of a trained matrix."""
    with init_distributed(CPU, 1) as parallel:
        model = build_on_meta(SMALL, torch.float32, parallel)
        model.layers[0].attention.wq.weight.requires_grad_(False)  # type: ignore[union-attr]
        DataParallel(model, parallel, mode, False, "cpu")
        named = dict(model.named_parameters())
        rows = [len(local_part(named[f"layers.0.attention.{name}.weight"]).tensor) for name in ("wq", "wo")]
    next_port()
    return rows


class _Encoded(Callback):
    def __init__(self) -> None:
        self.files: list[str] = []

    def progress(self, label: str, done: int = 0, total: int = 0) -> None:
        if label.startswith("encoding "):
            self.files.append(label.removeprefix("encoding "))


def _planned(overrides: Sequence[str], parallel: Parallel) -> dict[str, Any]:
    """Which files this rank encoded itself, which it has mapped, and what is in them."""
    encoded = _Encoded()
    plan = make_plan_together(quickstart(*overrides), encoded, parallel)
    maps = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    mapped = {tuple(fields[3:5]) for fields in maps if re.search(r"\.tokens( \(deleted\))?$", fields[-1])}
    parts = [part for part in (plan.train, plan.validation) if part is not None]
    return {
        "encoded": encoded.files,
        "mapped": sorted(mapped),
        "uses": plan.train.uses,
        "fingerprints": [part.fingerprint() for part in parts],
        "documents": [part.document(i)[0].tolist() for part in parts for i in range(len(part))],
        "report": plan.report,
    }


def _agreement(parallel: Parallel) -> list[Any]:
    """What each way of working together gives on this rank."""
    calls: list[int] = []
    parallel.run_rank_zero_first(lambda: calls.append(parallel.rank))
    said = [calls, parallel.run_on_rank_zero(lambda: f"by {os.environ['RANK']}")]

    def fails_on_one() -> None:
        if parallel.rank == 1:
            raise UserError("rank 1 has no file", "copy it")

    def refuse() -> None:
        raise UserError("refused by main")

    for how, work in (
        (parallel.raise_together, fails_on_one),
        (parallel.run_rank_zero_first, fails_on_one),
        (parallel.run_on_rank_zero, refuse),
    ):
        try:
            how(work)
        except UserError as error:
            said.append(str(error))
    return said
