"""Everything a run does before its first step, and a guess at how long the rest would take."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llama_acc.core.atomic import check_checkpoint
from llama_acc.core.device import free_memory, pick_device, prepare_cpu
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.events import Events
from llama_acc.core.train.folder import RunFolder, refuse_non_empty
from llama_acc.core.train.image_feed import Dealt
from llama_acc.core.train.plan import Plan
from llama_acc.core.train.planning import check_disk, make_plan, read_base
from llama_acc.core.train.simulate import RankShare, rank_share
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import Trainer
from llama_acc.core.vram.guard import setup_of_run
from llama_acc.core.vram.hours import work_of
from llama_acc.core.vram.predict import Usage, predict

_PROBE_STEPS = 3  # the first one warms up, and another may have been disturbed
_PROBE_SECONDS = 20.0  # then no other one is begun


class DryRun(NamedTuple):
    """What a dry run has found out.

    Attributes:
        plan: the run.
        share: what lasts from step to step on one of the processes.
        device: where it would compute.
    """

    plan: Plan
    share: RankShare
    device: torch.device


@dataclass(frozen=True)
class Estimate:
    """How long the run's steps would take, in seconds, and how that was found out."""

    seconds: float
    how: str


def dry_run(
    recipe: Recipe,
    output: Path | None,
    *,
    device: str | None = None,
    recipe_folder: Path | None = None,
    events: Events,
    verify: bool = False,
    processes: int | None = None,
) -> DryRun:
    """Does everything but train; writes recipe.yaml and data.json into `output`, if there is one, and nothing else.

    Args:
        recipe: what to do.
        output: the run's folder.
        device: such as "cpu"; None picks one.
        recipe_folder: where relative paths of the recipe are looked for first.
        events: told what happens.
        verify: also compare the SHA-256 of the checkpoint's files with its manifest.
        processes: how many there are to be; none is started. None = as few as the recipe takes.

    Raises:
        UserError: whatever would stop the real run before its first step.
    """
    if output is not None:
        refuse_non_empty(output)
    plan = make_plan(recipe, events, recipe_folder=recipe_folder, dry_run=True)
    if plan.layouts:
        events.working("looking at the weights")
    for layout in plan.layouts:
        check_checkpoint(layout.folder, verify)
    share = rank_share(plan, processes or recipe.parallel.model_parallel_size)
    weights = read_base(plan.layouts, plan.config, Parallel())
    for note in weights.notes if weights else ():
        events.note(note)
    if output is not None:
        check_disk(plan, output)
    target = pick_device(device)
    if output is not None:
        folder = RunFolder(output)
        folder.open(resume=False)
        folder.write_recipe(plan.recipe)
        folder.write_data_report(plan.report)
        folder.close()
    return DryRun(plan, share, target)


def predict_memory(found: DryRun) -> Usage:
    """The fullest moment on one of the processes, with the largest micro-batch of the data."""
    return predict(setup_of_run(found.plan, found.share.world_size, found.device.type)).training


def estimate_time(found: DryRun, memory: Usage) -> Estimate:
    """The time of all steps: from one timed step where its memory fits in half of what is free, else from the work.

    Several processes are taken to share the work without loss; `memory` is what one of them takes.
    """
    device, processes = found.device, found.share.world_size
    alone = _on_one_process(found.plan)
    if processes == 1:
        return _estimate_alone(alone, device, memory)
    # One process takes no less than one of several.
    if memory.allocated <= free_memory(device) / 2:
        memory = predict(setup_of_run(alone, 1, device.type)).training
    estimate = _estimate_alone(alone, device, memory)
    how = f"{estimate.how}; {processes} processes as fast as this one, at best"
    return Estimate(estimate.seconds / processes, how)


def _on_one_process(plan: Plan) -> Plan:
    recipe = plan.recipe.model_copy(deep=True)
    recipe.parallel.model_parallel_size = 1
    return replace(plan, recipe=recipe)


def _estimate_alone(plan: Plan, device: torch.device, memory: Usage) -> Estimate:
    epochs = plan.total_steps / plan.steps_per_epoch
    if memory.allocated <= free_memory(device) / 2:
        per_token, per_step = _timed_step(plan, device)
        seconds = plan.train.tokens * epochs * per_token + plan.total_steps * per_step
        return Estimate(seconds, f"from one timed step on {device.type}")
    rate = _matmul_rate(plan, device)
    work = _epoch_operations(plan) * epochs
    how = f"from {work:.2e} floating-point operations at {rate / 1e12:.2g} TFLOP/s measured on {device.type}, at best"
    return Estimate(work / rate, how)


def _epoch_operations(plan: Plan) -> float:
    """Floating-point operations of an epoch, counted while the program's own step is simulated."""
    data = plan.train
    squares = float((data.lengths.astype(np.float64) ** 2).sum())
    return work_of(setup_of_run(plan, 1, "cuda")).of(data.tokens, squares, data.label_tokens)


def _timed_step(plan: Plan, device: torch.device) -> tuple[float, float]:
    """Seconds for a token forward and backward, and for an update, on a model of random weights."""
    trainer = Trainer(plan, device, None, Parallel())
    typical = np.argsort(plan.train.lengths, kind="stable")[len(plan.train) // 2 :][: plan.recipe.train.batch_size]
    (group, *_), _ = trainer.deal(plan.train, typical)
    (batch,) = trainer.fed(plan.train, [Dealt(group, 0)])
    trainer.close()
    whole, updates = [], []
    deadline = time.perf_counter() + _PROBE_SECONDS
    for _ in range(_PROBE_STEPS):
        start = time.perf_counter()
        if start > deadline:
            break
        result = train_step(
            trainer.model, trainer.optimizer, trainer.data_parallel, [batch], len(batch.tokens), 0.0, device
        )
        result.loss.item()
        whole.append(time.perf_counter() - start)
        for parameter in trainer.optimizer.named.values():
            parameter.grad = torch.zeros_like(parameter)
        start = time.perf_counter()
        norm = trainer.optimizer.squared_norm().sqrt()
        trainer.optimizer.step(0.0, norm, result.loss)
        norm.item()
        updates.append(time.perf_counter() - start)
    return max(min(whole) - min(updates), 0.0) / len(batch.tokens), min(updates)


def _matmul_rate(plan: Plan, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product in the training precision."""
    dtype = torch.bfloat16 if plan.recipe.train.precision == "bf16" else torch.float32
    size = 1024 if device.type == "cpu" else 8192
    if device.type == "cpu":
        prepare_cpu()
    a, b = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
