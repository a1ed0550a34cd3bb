"""Everything a run does before its first step, and a guess at how long the rest would take."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llama_acc.core.checkpoint.files import check_checkpoint
from llama_acc.core.device import free_memory, pick_device, prepare_cpu
from llama_acc.core.parallel import Parallel
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.events import Events
from llama_acc.core.train.folder import RunFolder, refuse_non_empty
from llama_acc.core.train.image_feed import Dealt
from llama_acc.core.train.plan import Plan, check_disk, make_plan, read_base
from llama_acc.core.train.simulate import RankShare, rank_share
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import Trainer

_PROBE_STEPS = 3  # the first one warms up, and another may have been disturbed


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
) -> tuple[Plan, Estimate, RankShare]:
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
    plan = make_plan(recipe, events, recipe_folder=recipe_folder, dry_run=True, resumes=False)
    for layout in plan.layouts:
        check_checkpoint(layout.folder, verify)
    processes = processes or recipe.parallel.model_parallel_size
    share = rank_share(plan, processes)
    read_base(plan, Parallel())
    if output is not None:
        check_disk(plan, output)
    target = pick_device(device)
    if output is not None:
        folder = RunFolder(output)
        folder.open(resume=False)
        folder.write_recipe(plan.recipe)
        folder.write_data_report(plan.report)
        folder.close()
    return plan, estimate_time(plan, target, processes), share


def estimate_time(plan: Plan, device: torch.device, processes: int = 1) -> Estimate:
    """The time of all steps: from one timed step where its memory fits in half of what is free, else from the work.

    Several processes are taken to share the work without loss.
    """
    alone = _estimate_alone(plan, device)
    if processes == 1:
        return alone
    return Estimate(alone.seconds / processes, f"{alone.how}; {processes} processes as fast as this one, at best")


def _estimate_alone(plan: Plan, device: torch.device) -> Estimate:
    tokens = _tokens(plan)
    if training_bytes(plan) <= free_memory(device) / 2:
        per_token, per_step = _timed_step(plan, device)
        return Estimate(tokens * per_token + plan.total_steps * per_step, f"from one timed step on {device.type}")
    rate = _matmul_rate(plan, device)
    work = training_flops(plan, tokens)
    how = f"from {work:.2e} floating-point operations at {rate / 1e12:.2g} TFLOP/s measured on {device.type}, at best"
    return Estimate(work / rate, how)


def _tokens(plan: Plan) -> float:
    """Tokens of the whole run, epochs taken as alike."""
    return float(plan.train.tokens) * plan.total_steps / plan.steps_per_epoch


def training_bytes(plan: Plan) -> int:
    """Memory of one training step, roughly: weights, gradients, AdamW's moments, and activations.

    16 bytes a parameter that trains, its own for any other, in NF4 about half a byte; a block keeps about 12 values of
    the width and 4 of the SwiGLU's for each token (only its input with activation checkpointing).
    """
    config, train = plan.config, plan.recipe.train
    tokens = min(train.batch_size, len(plan.train)) * int(plan.train.lengths.max())
    size = 2 if train.precision == "bf16" else 4
    one_block = (12 * config.dim + 4 * config.hidden_dim) * tokens * size
    kept = config.dim * tokens * size if train.activation_checkpointing else one_block
    frozen = plan.parameter_count() - plan.trained_count()
    quantised, quantised_bytes = plan.quantised()
    weights = 16 * plan.trained_count() + size * (frozen - quantised) + quantised_bytes
    return weights + config.n_layers * kept + one_block


def training_flops(plan: Plan, tokens: float) -> float:
    """Floating-point operations of training on `tokens` tokens.

    Forward and backward take 6 operations a parameter and token (4 if it does not train; the head's only where there
    is a label, the embedding none), recomputing a forward pass 2 more; attention takes 6 * width * length more a layer
    and token.
    """
    config = plan.config
    head = config.vocab_size * config.dim
    labelled = plan.train.label_tokens / plan.train.tokens
    trains = 6 if plan.config.tuning.what.everything else 4
    passes = trains + (2 if plan.recipe.train.activation_checkpointing else 0)
    mean_length = float((plan.train.lengths.astype(np.float64) ** 2).sum()) / plan.train.tokens
    tower = 0 if config.vision is None else sum(map(math.prod, config.vision.tower_shapes().values()))
    blocks = plan.parameter_count() - tower - 2 * head + config.n_layers * config.dim * mean_length
    return tokens * (passes * blocks + trains * head * labelled)


def _timed_step(plan: Plan, device: torch.device) -> tuple[float, float]:
    """Seconds for a token forward and backward, and for an update, on a model of random weights."""
    trainer = Trainer(plan, device, None, Parallel())
    typical = np.argsort(plan.train.lengths, kind="stable")[len(plan.train) // 2 :][: plan.recipe.train.batch_size]
    (group, *_), _ = trainer.deal(plan.train, typical)
    (batch,) = trainer.fed(plan.train, [Dealt(group, 0)])
    trainer.close()
    whole, updates = [], []
    for _ in range(_PROBE_STEPS):
        start = time.perf_counter()
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
