"""Finds out what a run will do, and checks everything that can be wrong with the user's input before anything is
computed: recipe, checkpoint, tokenizer, data, disk.
"""

import math
from pathlib import Path

from llama_acc.core.checkpoint.resume import FORMAT_VERSION, read_progress
from llama_acc.core.checkpoint.save import free_bytes
from llama_acc.core.checkpoint.shards import Weights, check_tensors, read_weights
from llama_acc.core.checkpoint.towers import check_tower
from llama_acc.core.data.cache import EntryStore
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.tuning import Shapes
from llama_acc.core.parallel import Parallel
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
    resumes: bool,
    store: EntryStore | None = None,
    data: PlannedData | None = None,
) -> Plan:
    """Finds and checks everything a run needs, except its output folder and its weights.

    Args:
        recipe: what the user wants.
        events: told of notes and of progress.
        recipe_folder: where the recipe file lies; relative paths are looked for there first.
        dry_run: weights may be absent.
        resumes: weights come from a checkpoint of the run itself.
        store: where encoded data is kept; None: in the cache.
        data: what another process has found out about the data already.

    Raises:
        UserError: the first group of problems found.
    """
    # A resumed run has weights of its own; of what does not train it may have none.
    has_all = resumes and not has_frozen(recipe)
    layouts, config, tokenizer = find_model(recipe, recipe_folder, weights_may_be_absent=dry_run or has_all)
    if recipe.data.max_tokens > config.max_seq_len:
        raise UserError(
            f"data.max_tokens ({recipe.data.max_tokens}) is more than the model's max_seq_len ({config.max_seq_len})",
            "lower data.max_tokens, or raise model.max_seq_len",
        )
    train, validation, report = data or plan_data(recipe, config, tokenizer, recipe_folder, events, store)
    steps_per_epoch = math.ceil(len(train) / recipe.train.global_batch_size)
    total = math.ceil(recipe.train.epochs * steps_per_epoch - 1e-9)
    total = min(total, recipe.train.max_steps or total)
    recipe = resolved(recipe, layouts, tokenizer, recipe_folder)
    return Plan(recipe, config, tokenizer, layouts, train, validation, report, steps_per_epoch, total)


def saved_step(checkpoint: Path, plan: Plan) -> int:
    """How many steps a checkpoint has done of this plan; its state's bytes are checked.

    Raises:
        UserError: the state is damaged, of another version or other data.
    """
    progress = read_progress(checkpoint)
    if progress["format_version"] > FORMAT_VERSION:
        raise UserError(f"{checkpoint}/state was written by a newer version", "update llama-acc")
    if not plan.train.is_data_of(progress["data"]):
        raise UserError(f"the data is not what {checkpoint} was trained on", "resume with the same files")
    step: int = progress["step"]
    return step


def read_base(plan: Plan, parallel: Parallel) -> Weights | None:
    """Maps a rank's share of the weights a run starts from, all of them checked; None = random weights.

    Raises:
        UserError: damaged files, or tensors that do not fit, all of them listed.
    """
    if not plan.layouts:
        return None
    weights = read_weights(plan.layouts, parallel.model_rank, parallel.model_size)
    where = " and ".join(str(layout.folder) for layout in plan.layouts)
    check_tensors(weights, _needed(plan.config, weights, where), where)
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


def check_disk(plan: Plan, output: Path) -> None:
    """Compares the space the run's checkpoints take with what is free.

    Raises:
        UserError: too little, naming both.
    """
    count, needed, free = plan.checkpoints_at_once(), plan.disk_bytes(), free_bytes(output)
    if needed > free:
        raise UserError(
            f"too little disk for the checkpoints: {count} of {size_text(plan.checkpoint_bytes())} need "
            f"{size_text(needed)}, {size_text(free)} are free at {output}",
            "free some, choose another --output, or lower checkpoint.keep",
        )
