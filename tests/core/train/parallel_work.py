"""What the processes of tests/core/train/test_parallel.py do."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_acc.core.distributed.groups import init_distributed
from llama_acc.core.model.transformer import build_on_meta
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.trainer import Trainer
from tests.core.ranks import next_port
from tests.core.tiny import CPU, SMALL
from tests.core.train.runs import plan_of, run


def runs(todo: Sequence[dict[str, Any]]) -> None:
    """Several runs, one after the other."""
    for one in todo:
        run(Path(one["output"]), *one["overrides"], resume=one.get("resume", False))
        next_port()


def of_two(modes: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What two processes do one after the other."""
    return {"collectives": collectives(modes), "frozen_rows": frozen_rows(), "agreement": agreement()}


class Collectives(TorchDispatchMode):
    """Counts what the ranks do together."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.counts[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def collectives(modes: Sequence[Sequence[str]]) -> list[list[dict[str, int]]]:
    """For each list of overrides, how often a step of it used each collective; for two steps."""
    counted = []
    for overrides in modes:
        plan = plan_of(*overrides)
        with init_distributed(CPU, plan.recipe.parallel.model_parallel_size) as parallel:
            trainer = Trainer(plan, CPU, None, parallel)
            steps = []
            for _ in range(2):
                with Collectives() as mode:
                    trainer.advance(extras=[0.0])
                steps.append(dict(mode.counts))
            counted.append(steps)
        next_port()
    return counted


def frozen_rows() -> dict[str, list[int]]:
    """The rows stored of a frozen and of a trained matrix, under each mode."""
    rows = {}
    for mode in ("ddp", "sdp", "fsdp"):
        with init_distributed(CPU, 1) as parallel:
            model = build_on_meta(SMALL, torch.float32, parallel)
            model.layers[0].attention.wq.weight.requires_grad_(False)  # type: ignore[union-attr]
            DataParallel(model, parallel, mode, False, "cpu")  # type: ignore[arg-type]
            named = dict(model.named_parameters())
            both = [named[f"layers.0.attention.{name}.weight"] for name in ("wq", "wo")]
            assert all(isinstance(parameter, DTensor) for parameter in both)
            rows[mode] = [len(parameter.to_local()) for parameter in both]  # type: ignore[attr-defined]
        next_port()
    return rows


def agreement() -> list[str]:
    """What each way of working together gives on this rank."""
    from llama_acc.core.errors import UserError

    said = []
    with init_distributed(CPU, 1) as parallel:
        times: list[float] = []
        parallel.run_rank_zero_first(lambda: times.append(time.monotonic()))
        begun = parallel.gather(times)
        said.append(f"first {[len(each) for each in begun]} {begun[0] < begun[1]}")
        said.append(f"once {parallel.run_on_rank_zero(lambda: 'told by ' + os.environ['RANK'])}")

        def fails_on_one() -> None:
            if parallel.rank == 1:
                raise UserError("rank 1 has no file", "copy it")

        for how in (parallel.raise_together, parallel.run_rank_zero_first):
            try:
                how(fails_on_one)
                said.append("nothing")
            except UserError as error:
                said.append(f"{error.message}; {error.hint}")
        try:
            parallel.run_on_rank_zero(lambda: _refuse())
        except UserError as error:
            said.append(error.message)
    return said


def _refuse() -> None:
    from llama_acc.core.errors import UserError

    raise UserError("refused by main")
