"""Finds out what a run will do, and checks everything that can be wrong with the user's input before anything is
computed: recipe, checkpoint, tokenizer, data, disk.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from llama_acc.core.checkpoint.layout import Layout
from llama_acc.core.checkpoint.load import Weights, check_tensors, read_weights
from llama_acc.core.checkpoint.save import checkpoints, free_bytes
from llama_acc.core.checkpoint.towers import check_tower
from llama_acc.core.data.cache import EntryStore
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.tuning import Shapes
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.events import Events
from llama_acc.core.train.plan import Plan
from llama_acc.core.train.plan_data import PlannedData, plan_data
from llama_acc.core.train.plan_model import find_model, has_frozen, resolved
from llama_acc.core.units import size_text


def make_plan(
    recipe: Recipe,
    events: Events,
    *,
    recipe_folder: Path | None,
    dry_run: bool,
    saved: Path | None = None,
    store: EntryStore | None = None,
    data: PlannedData | None = None,
) -> Plan:
    """Finds and checks everything a run needs, except its output folder and its weights.

    Args:
        recipe: what the user wants.
        events: told of notes and of progress.
        recipe_folder: where the recipe file lies; relative paths are looked for there first.
        dry_run: weights may be absent.
        saved: the run's own checkpoint, to go on from.
        store: where encoded data is kept; None: in the cache.
        data: what another process has found out about the data already.

    Raises:
        UserError: the first group of problems found.
    """
    events.working("reading the model's shape and tokenizer")
    layouts, config, tokenizer = find_model(recipe, recipe_folder, weights_may_be_absent=dry_run, saved=saved)
    if recipe.data.max_tokens > config.max_seq_len:
        raise UserError(
            f"data.max_tokens ({recipe.data.max_tokens}) is more than the model's max_seq_len ({config.max_seq_len})",
            "lower data.max_tokens, or raise model.max_seq_len",
        )
    if data is None and (saved is None or has_frozen(recipe)):
        read_base(layouts, config, Parallel())  # what does not fit is said before hours of encoding
    events.working("reading the data")
    train, validation, report = data or plan_data(recipe, config, tokenizer, recipe_folder, events, store)
    steps_per_epoch = math.ceil(len(train) / recipe.train.global_batch_size)
    total = math.ceil(recipe.train.epochs * steps_per_epoch - 1e-9)
    total = min(total, recipe.train.max_steps or total)
    recipe = resolved(recipe, layouts, tokenizer, recipe_folder, saved)
    plan = Plan(recipe, config, tokenizer, layouts, train, validation, report, steps_per_epoch, total)
    check_learns(plan)
    return plan


def check_learns(plan: Plan) -> None:
    """Refuses a run in which no step can change a weight.

    Raises:
        UserError: why none can.
    """
    if not plan.trained_count():
        raise UserError(
            f"nothing would train: all {plan.parameter_count():,} parameters are frozen",
            "choose another tuning.method",
        )
    if plan.idle_steps() < plan.total_steps:
        return
    if not plan.recipe.optimizer.lr:
        raise UserError("nothing would be learned: optimizer.lr is 0", "set optimizer.lr, such as optimizer.lr=2e-5")
    raise UserError(
        "nothing would be learned: the run has one step, and a warm-up begins at rate 0",
        "set train.warmup_epochs=0, or take more steps: a smaller train.global_batch_size, more train.epochs",
    )


def read_base(layouts: Sequence[Layout], config: ModelConfig, parallel: Parallel) -> Weights | None:
    """Maps a rank's share of the weights a run starts from, all of them checked; None = random weights.

    Raises:
        UserError: damaged files, or tensors that do not fit, all of them listed.
    """
    if not layouts:
        return None
    weights = read_weights(layouts, parallel.model_rank, parallel.model_size)
    where = " and ".join(str(layout.folder) for layout in layouts)
    check_tensors(weights, _needed(config, weights, where), where)
    return weights


def _needed(config: ModelConfig, weights: Weights, where: str) -> Shapes:
    """What a run's base must hold.

    A base has nothing of what the method adds, a checkpoint of a tuned model all of it; so it is with vision.

    Raises:
        UserError: it has no vision tower, or in stage two nothing of what stage one trains.
    """
    needed, parts = config.base_shapes(), config.vision_parts
    check_tower(config.vision, weights.tensors, where)
    added = config.parameter_shapes().keys() - needed.keys() - parts.keys()
    shapes = config.parameter_shapes()
    if any(name in weights.tensors for name in added):
        needed |= {name: shapes[name] for name in added}
    if any(name in weights.tensors for name in parts):
        needed |= parts
    elif parts and config.vision_training.stage == 2:
        raise UserError(
            f"nothing of what stage one of vision trains is in {where}: {', '.join(list(parts)[:3])}, ...",
            "give a checkpoint of stage one besides (--pretrained RUN), or train that: vision.stage=1",
        )
    return needed


def check_disk(plan: Plan, output: Path, done: int = 0) -> None:
    """Compares the space that is still to be taken by the run's checkpoints with what is free.

    Args:
        plan: the run.
        output: its folder; what it holds already takes no more, and goes when it is old enough.
        done: steps it has done.

    Raises:
        UserError: too little, naming both.
    """
    there = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for _, path in checkpoints(output)]
    needed, free = plan.disk_bytes(there, done), free_bytes(output)
    if needed > free:
        one = there[-1] if there else plan.checkpoint_bytes()
        beside = f" beside the {len(there)} there" if there else ""
        raise UserError(
            f"too little disk for the checkpoints: {-(-needed // one)} of {size_text(one)}{beside} need "
            f"{size_text(needed)}, {size_text(free)} are free at {output}",
            "free some, choose another --output"
            + (", or lower checkpoint.keep" if plan.recipe.checkpoint.keep != 1 else ""),
        )
