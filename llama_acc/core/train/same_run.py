"""Whether a run may go on from a checkpoint: it must be the same run, wherever its files lie now."""

import json
import re
from pathlib import Path
from typing import Any

from llama_acc.core.checkpoint.adapter import base_fingerprint
from llama_acc.core.checkpoint.resume import FORMAT_VERSION, read_progress
from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import read_object
from llama_acc.core.tokenizer import find_tokenizer, load_tokenizer
from llama_acc.core.train.plan import Plan
from llama_acc.core.train.plan_model import has_frozen, recipe_of
from llama_acc.core.units import count_text

# A resumed run may be prolonged, logged, saved or spread over processes otherwise; it must not be another run.
_MAY_CHANGE = {
    "name",
    "description",
    "train.epochs",
    "train.max_steps",
    "train.batch_size",
    "train.micro_batch_tokens",
    "checkpoint.keep",
    "checkpoint.every_epochs",
    "checkpoint.every_steps",
    "checkpoint.asynchronous",
    "data.validation.every_steps",
    "data.images.max_pixels",
    "data.images.workers",
    "parallel.model_parallel_size",
    "parallel.data_parallel",
    "parallel.accumulate_unsharded",
}
# Where something lies, of which the content is compared.
_DATA = re.compile(r"data\.sources\.\d+\.(path|root)")
_OTHER_RUN = "or start a new run in another --output"


def check_same_run(plan: Plan, checkpoint: Path) -> int:
    """Compares a run with the checkpoint it is to go on from, whose state's bytes are checked.

    Data, base and tokenizer are compared by content, so they may lie elsewhere, and under other names.

    Returns:
        How many steps are done.

    Raises:
        UserError: a damaged state, or all that makes it another run.
    """
    progress = read_progress(checkpoint)
    if progress["format_version"] > FORMAT_VERSION:
        raise UserError(f"{checkpoint}/state was written by a newer version", "update llama-acc")
    _check_recipe(plan, checkpoint, progress)
    if plan.train.fingerprint() != progress["data"]:
        raise UserError(
            f"the data is not what {checkpoint} was trained on{_how_it_differs(plan, checkpoint)}",
            f"resume with the same files; --data FILE says where they are now; {_OTHER_RUN}",
        )
    step: int = progress["step"]
    return step


def _check_recipe(plan: Plan, checkpoint: Path, progress: dict[str, Any]) -> None:
    before = _flat(recipe_of(checkpoint).model_dump(mode="json"))
    now = _flat(plan.recipe.model_dump(mode="json"))
    changed = {
        key: f"{before.get(key)!r} before, {now.get(key)!r} now"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key) and key not in _MAY_CHANGE and not _DATA.fullmatch(key)
    }
    if "data.validation.path" in changed and plan.validation is not None:
        if plan.validation.fingerprint() == progress.get("validation"):
            del changed["data.validation.path"]
        else:
            changed["data.validation.path"] += ", with other items"
    _compare_model(plan, checkpoint, progress, changed)
    if changed:
        problems = [f"{key}: {text}" for key, text in changed.items()]
        raise UserError(
            f"the recipe is not the one {checkpoint} was trained with:\n{listed(problems)}",
            "leave out --recipe and what you changed: --resume then takes the run's own recipe.yaml; " + _OTHER_RUN,
        )


def _compare_model(plan: Plan, checkpoint: Path, progress: dict[str, Any], changed: dict[str, str]) -> None:
    """Takes out of `changed` what is the same by its content, and puts in what is another one in the same place."""
    shape = [key for key in changed if re.match(r"model\.(params|size)\b", key)]
    if shape and json.loads(json.dumps(plan.config.to_params())) == read_object(checkpoint / "config.json"):
        for key in shape:
            del changed[key]
    moved = "model.pretrained" in changed
    if "model.tokenizer" in changed or moved:
        saved = find_tokenizer(checkpoint)
        same = saved is not None and load_tokenizer(saved).fingerprint() == plan.tokenizer.fingerprint()
        if same:
            changed.pop("model.tokenizer", None)
        else:
            was = changed.get("model.tokenizer", str(plan.tokenizer.path))
            changed["model.tokenizer"] = f"{was}, another tokenizer"
    base = progress.get("base")
    # A base of which nothing is used any more may be any, where it was.
    if base is None or not plan.layouts or not (moved or has_frozen(plan.recipe)):
        return
    if base_fingerprint(plan.layouts, plan.config) == base:
        changed.pop("model.pretrained", None)
    else:
        was = changed.get("model.pretrained", " and ".join(str(layout.folder) for layout in plan.layouts))
        changed["model.pretrained"] = f"{was}, with other weights"


def _how_it_differs(plan: Plan, checkpoint: Path) -> str:
    """The sizes of the data before and now, as far as they are known."""

    def size(report: dict[str, Any]) -> str:
        return f"{count_text(report['items'], 'item')} and {count_text(report['tokens'], 'token')}"

    now = size(plan.report)
    try:
        before = size(read_object(checkpoint.parent / "data.json"))
    except (UserError, KeyError, TypeError, ValueError):
        return f": it has {now}"
    if before == now:
        return f": it has {now} as before, but other text, in another order, or labeled otherwise"
    return f": {before} before, {now} now"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        pairs: list[tuple[str, Any]] = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        pairs = [(str(i), value) for i, value in enumerate(values)]
    else:
        return {prefix: values}
    return {
        name: leaf for key, value in pairs for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }
