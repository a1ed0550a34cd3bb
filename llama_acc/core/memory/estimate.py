"""What a dry run predicts: what each process keeps, its memory, and how long the run's steps would take."""

import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from llama_acc.core.device import free_memory, prepare_cpu
from llama_acc.core.distributed.groups import Parallel, local_part, simulated
from llama_acc.core.memory.guard import setup_of_run
from llama_acc.core.memory.hours import work_of
from llama_acc.core.memory.predict import Usage, predict
from llama_acc.core.model.vision import tower_shapes
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.image_loader import MicroBatchIndices
from llama_acc.core.train.optimizer import MOMENTS
from llama_acc.core.train.plan import Plan, model_on_meta
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import Trainer

_PROBE_STEPS = 3  # the first one warms up, and another may have been disturbed
_PROBE_SECONDS = 20.0  # then no other one is begun


@dataclass(frozen=True)
class RankShare:
    """What lasts from step to step on one rank.

    Attributes:
        parameters: numbers it stores of the model.
        weights: bytes of these.
        gradients: bytes of the gradients of what trains, of those that stay from one micro-batch to the next.
        moments: bytes of the optimizer's state.
    """

    parameters: int
    weights: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        """Bytes in all, without activations, gathered parameters and buffers."""
        return self.weights + self.gradients + self.moments


def rank_share(plan: Plan, world_size: int) -> RankShare:
    """Builds rank 0 of `world_size` on the meta device. It has most: it is the first to get an odd row.

    Raises:
        UserError: the processes cannot be shared out in model-parallel groups.
    """
    settings, config = plan.settings, plan.config
    with simulated(0, world_size, plan.recipe.parallel.model_parallel_size) as parallel:
        model = model_on_meta(config, settings, parallel)
        DataParallel(model, parallel, settings.data_parallel, settings.accumulate_unsharded, "cpu")
        stored = [local_part(parameter).tensor for parameter in model.parameters()]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained_bytes = sum(local_part(parameter).tensor.nbytes for parameter in trained)
        # The vision tower is on the first rank of each model-parallel group, whole.
        tower = 0 if config.vision is None else sum(map(math.prod, tower_shapes(config.vision).values()))
        # Gradients that are summed over the ranks only once a step are whole, not sharded.
        whole = settings.data_parallel == "sdp" or (settings.data_parallel == "fsdp" and settings.accumulate_unsharded)
        whole = whole and parallel.data_size > 1
        return RankShare(
            # A byte of a quantized matrix holds two.
            parameters=sum(tensor.numel() * (1 if tensor.is_floating_point() else 2) for tensor in stored) + tower,
            weights=sum(tensor.nbytes for tensor in (*stored, *model.buffers())) + tower * settings.dtype.itemsize,
            gradients=sum(p.numel() * p.element_size() for p in trained) if whole else trained_bytes,
            moments=len(MOMENTS) * trained_bytes,
        )


@dataclass(frozen=True)
class Estimate:
    """How long the run's steps would take, in seconds, and how that was found out."""

    seconds: float
    how: str


def predict_memory(plan: Plan, processes: int, device: torch.device) -> Usage:
    """The fullest moment on one of the processes, with the largest micro-batch of the data."""
    return predict(setup_of_run(plan, processes, device.type)).training


def estimate_time(plan: Plan, processes: int, device: torch.device, memory: Usage) -> Estimate:
    """The time of all steps: from one timed step where its memory fits in half of what is free, else from the work.

    Several processes are taken to share the work without loss; `memory` is what one of them takes.
    """
    recipe = plan.recipe.model_copy(deep=True)
    recipe.parallel.model_parallel_size = 1
    alone = replace(plan, recipe=recipe)
    if processes == 1:
        return _estimate_alone(alone, device, memory)
    # One process takes no less than one of several.
    if memory.allocated <= free_memory(device) / 2:
        memory = predict_memory(alone, 1, device)
    estimate = _estimate_alone(alone, device, memory)
    how = f"{estimate.how}; {processes} processes as fast as this one, at best"
    return Estimate(estimate.seconds / processes, how)


def _estimate_alone(plan: Plan, device: torch.device, memory: Usage) -> Estimate:
    epochs = plan.total_steps / plan.steps_per_epoch
    if memory.allocated <= free_memory(device) / 2:
        per_token, per_step = _timed_step(plan, device)
        seconds = plan.train.tokens * epochs * per_token + plan.total_steps * per_step
        return Estimate(seconds, f"from one timed step on {device.type}")
    rate = _matmul_rate(plan.settings.dtype, device)
    squares = float((plan.train.lengths.astype(np.float64) ** 2).sum())
    # Counted while the program's own step is simulated.
    operations = work_of(setup_of_run(plan, 1, "cuda")).of(plan.train.tokens, squares, plan.train.label_tokens)
    work = operations * epochs
    how = f"from {work:.2e} floating-point operations at {rate / 1e12:.2g} TFLOP/s measured on {device.type}, at best"
    return Estimate(work / rate, how)


def _timed_step(plan: Plan, device: torch.device) -> tuple[float, float]:
    """Seconds for a token forward and backward, and for an update, on a model of random weights."""
    trainer = Trainer(plan, device, None, Parallel())
    typical = np.argsort(plan.train.lengths, kind="stable")[len(plan.train) // 2 :][: plan.recipe.train.batch_size]
    (group, *_), _ = trainer.split_into_micro_batches(plan.train, typical)
    (batch,) = trainer.iter_batches(plan.train, [MicroBatchIndices(group, 0)])
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


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product."""
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
