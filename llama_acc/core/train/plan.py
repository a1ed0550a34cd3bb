"""What a run will do, found out and checked before anything is computed: recipe, checkpoint, tokenizer, data.

`make_plan` resolves the recipe; whatever comes after it takes a `Plan`, or values.
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama_acc.core.checkpoint.layout import Layout
from llama_acc.core.checkpoint.save import DTYPES, needed_bytes
from llama_acc.core.data.cache import EntryStore
from llama_acc.core.data.dataset import Dataset, load_dataset, load_published, publish
from llama_acc.core.data.image_workers import with_usable_images
from llama_acc.core.data.sources import MISSING_HINT, Source
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError, raise_together
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.nf4 import nbytes
from llama_acc.core.model.transformer import (
    Transformer,
    build_on_meta,
    describe,
    freeze_untrained,
    parameter_count,
    quantizable,
    quantize_on_meta,
    shapes_of,
)
from llama_acc.core.recipe import Recipe
from llama_acc.core.text import count_text
from llama_acc.core.tokenizer import Tokenizer
from llama_acc.core.train.base import find_model, has_frozen, read_base, with_absolute_paths
from llama_acc.core.train.callback import Callback
from llama_acc.core.train.data_parallel import Mode


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed: all that its memory depends on besides the model's shape and the batch.

    Attributes:
        dtype: type of activations and matrix products.
        quantize_skip: matrices not quantized to NF4; None = nothing is.
        compile: run each block through torch.compile.
        activation_checkpointing: recompute each block in the backward pass.
        data_parallel: see `DataParallel`.
        accumulate_unsharded: see `DataParallel`.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's.
        clip_grad_norm: the largest norm of a step's gradients.
    """

    dtype: torch.dtype
    quantize_skip: tuple[str, ...] | None
    compile: bool
    activation_checkpointing: bool
    data_parallel: Mode
    accumulate_unsharded: bool
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_grad_norm: float

    @classmethod
    def of(cls, recipe: Recipe) -> "StepSettings":
        """The recipe's."""
        train, parallel, optimizer = recipe.train, recipe.parallel, recipe.optimizer
        return cls(
            DTYPES[train.precision],
            tuple(recipe.tuning.quantize_skip) if recipe.tuning.quantize == "nf4" else None,
            train.compile,
            train.activation_checkpointing,
            parallel.data_parallel,
            parallel.accumulate_unsharded,
            optimizer.betas,
            optimizer.eps,
            optimizer.weight_decay,
            optimizer.clip_grad_norm,
        )


def model_on_meta(config: ModelConfig, settings: StepSettings, parallel: Parallel) -> Transformer:
    """A rank's part of the model, without storage: what trains is float32, and what does not may be quantized."""
    model = build_on_meta(config, settings.dtype, parallel)
    freeze_untrained(model)
    if settings.quantize_skip is not None:
        quantize_on_meta(model, settings.quantize_skip)
    return model


@dataclass(frozen=True)
class Plan:
    """A run that was checked.

    Attributes:
        recipe: with every path absolute.
        config: the model's shape.
        tokenizer: the model's.
        layouts: checkpoints the weights come from, left to right; empty = random weights.
        train: what is learned.
        validation: what is held out, or None.
        report: what data.json holds, held-out items included.
        steps_per_epoch: optimizer steps in a whole epoch; the last one may be smaller.
        total_steps: optimizer steps in the run.
        has_frozen: whether there are weights that do not train.
    """

    recipe: Recipe
    config: ModelConfig
    tokenizer: Tokenizer
    layouts: list[Layout]
    train: Dataset
    validation: Dataset | None
    report: dict[str, Any]
    steps_per_epoch: int
    total_steps: int
    has_frozen: bool

    @property
    def settings(self) -> StepSettings:
        """How a step is computed."""
        return StepSettings.of(self.recipe)

    @property
    def save_dtype(self) -> torch.dtype:
        """Type of the saved weights."""
        name = self.recipe.checkpoint.dtype
        return DTYPES[self.recipe.train.precision if name == "auto" else name]

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and full shapes of the parameters that train."""
        return {name: one.shape for name, one in describe(self.config).items() if one.trains}

    def trained_count(self) -> int:
        """Number of parameters that train."""
        return sum(math.prod(shape) for shape in self.trained_shapes().values())

    def quantized(self) -> tuple[int, int]:
        """Number of parameters that are quantized, and the bytes they take."""
        skip, shapes = self.settings.quantize_skip, shapes_of(self.config)
        quantized = [shapes[name] for name in ([] if skip is None else quantizable(self.config, skip))]
        return sum(map(math.prod, quantized)), sum(nbytes(*shape) for shape in quantized)

    def saves(self, name: str) -> bool:
        """Whether a parameter's weights are saved."""
        return not self.recipe.checkpoint.trainable_only or describe(self.config)[name].trains

    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint on disk."""
        trained = self.trained_count()
        saved = trained if self.recipe.checkpoint.trainable_only else parameter_count(self.config)
        copied = sum(map(len, self.tokenizer.files().values()))
        return needed_bytes(saved, trained, len(shapes_of(self.config)), self.save_dtype) + copied

    def disk_bytes(self, existing: Sequence[int] = (), done: int = 0) -> int:
        """What the run's checkpoints take of the disk at most, beside those that exist.

        Args:
            existing: the sizes of those checkpoints, oldest first; the next one will be as large as the last.
            done: steps that are done.
        """
        keep, new = self.recipe.checkpoint.keep, existing[-1] if existing else self.checkpoint_bytes()
        saves = self.save_count(done)
        if not keep:
            return saves * new
        on_disk, taken, most = deque(existing), 0, 0
        # Once none of the old ones is left, nothing changes any more.
        for _ in range(min(saves, keep + 1)):
            on_disk.append(new)  # whole before an old one goes
            taken += new
            most = max(most, taken)
            while len(on_disk) > keep:
                taken -= on_disk.popleft()
        return most

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due once `step` optimizer steps are done."""
        checkpoint = self.recipe.checkpoint
        epoch, within = divmod(step, self.steps_per_epoch)
        if step >= self.total_steps:
            return True
        if within == 0:
            return bool(checkpoint.every_epochs) and epoch % checkpoint.every_epochs == 0
        return bool(checkpoint.every_steps) and within % checkpoint.every_steps == 0

    def validates_at(self, step: int) -> bool:
        """Whether validation is due once `step` optimizer steps are done."""
        if self.validation is None:
            return False
        every = self.recipe.data.validation.every_steps or self.steps_per_epoch
        return step >= self.total_steps or step % every == 0

    def checkpoint_name(self, step: int) -> str:
        """`epoch0` when epoch 0 is done, `epoch0-iter500` after 500 steps of epoch 0 (LLaMA2-Accessory's names)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return f"epoch{epoch}-iter{within}" if within else f"epoch{epoch - 1}"

    def save_count(self, done: int = 0) -> int:
        """How many checkpoints the run writes once `done` steps are done."""
        checkpoint = self.recipe.checkpoint

        def saves_up_to(step: int) -> int:  # for a step before the last one
            epochs, rest = divmod(step, self.steps_per_epoch)
            count = epochs // checkpoint.every_epochs if checkpoint.every_epochs else 0
            if checkpoint.every_steps:
                in_epoch = (self.steps_per_epoch - 1) // checkpoint.every_steps
                count += epochs * in_epoch + rest // checkpoint.every_steps
            return count

        return 0 if done >= self.total_steps else saves_up_to(self.total_steps - 1) - saves_up_to(done) + 1

    def idle_steps(self) -> int:
        """How many steps have rate 0, and change nothing. A warm-up begins with one; see `learning_rate`."""
        if not self.recipe.optimizer.lr:
            return self.total_steps
        return 1 if self.recipe.train.warmup_epochs else 0


class PlannedData(NamedTuple):
    """What a run learns from; the fields are those of `Plan`."""

    train: Dataset
    validation: Dataset | None
    report: dict[str, Any]


def make_plan(
    recipe: Recipe,
    callback: Callback,
    *,
    recipe_folder: Path | None,
    dry_run: bool = False,
    saved: Path | None = None,
    store: EntryStore | None = None,
    published: Path | None = None,
) -> Plan:
    """Finds and checks everything a run needs, except its output folder and its weights.

    Args:
        recipe: what the user wants.
        callback: receives notes and progress.
        recipe_folder: where the recipe file lies; relative paths are looked for there first.
        dry_run: weights may be absent.
        saved: the run's own checkpoint, to resume from.
        store: where encoded data is kept; None: in the cache.
        published: a folder in which another process of this machine has left its data.

    Raises:
        UserError: the first group of problems found.
    """
    callback.working("reading the model's shape and tokenizer")
    layouts, config, tokenizer = find_model(recipe, recipe_folder, weights_may_be_absent=dry_run, saved=saved)
    if recipe.data.max_tokens > config.max_seq_len:
        raise UserError(
            f"data.max_tokens ({recipe.data.max_tokens}) is more than the model's max_seq_len ({config.max_seq_len})",
            "lower data.max_tokens, or raise model.max_seq_len",
        )
    if published is None and (saved is None or has_frozen(recipe)):
        read_base(layouts, config, Parallel())  # what does not fit is reported before hours of encoding
    callback.working("reading the data")
    if published is None:
        train, validation, report = _read_data(recipe, config, tokenizer, recipe_folder, callback, store)
    else:
        train, validation, report = _load_published(published, tokenizer)
    steps_per_epoch = math.ceil(len(train) / recipe.train.global_batch_size)
    total = math.ceil(recipe.train.epochs * steps_per_epoch - 1e-9)
    plan = Plan(
        with_absolute_paths(recipe, layouts, tokenizer, recipe_folder, saved),
        config,
        tokenizer,
        layouts,
        train,
        validation,
        report,
        steps_per_epoch,
        min(total, recipe.train.max_steps or total),
        has_frozen(recipe),
    )
    _check_learns(plan)
    return plan


def make_plan_together(
    recipe: Recipe, callback: Callback, parallel: Parallel, *, recipe_folder: Path | None, saved: Path | None = None
) -> Plan:
    """`make_plan` on every rank. One rank of each machine goes through the data; the others map what it encoded."""
    make = partial(make_plan, recipe, callback, recipe_folder=recipe_folder, saved=saved)

    def lead() -> tuple[Plan, Path] | None:
        if not parallel.is_local_rank_zero:
            return None
        plan, folder = make(store=store), store.own_folder()
        publish(plan.train, folder / "train")
        if plan.validation is not None:
            publish(plan.validation, folder / "validation")
        (folder / "report.json").write_text(json.dumps(plan.report), encoding="utf-8")
        return plan, folder

    with EntryStore() as store:
        if parallel.control is None:
            return make(store=store)
        led = parallel.raise_together(lead)
        found = parallel.broadcast_in_node(led and led[1])
        # Nobody leaves before all have mapped what is deleted then.
        return parallel.raise_together(lambda: led[0] if led else make(published=found))


def _load_published(folder: Path, tokenizer: Tokenizer) -> PlannedData:
    held_out = folder / "validation"
    validation = load_published(held_out, tokenizer) if held_out.exists() else None
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return PlannedData(load_published(folder / "train", tokenizer), validation, report)


def _check_learns(plan: Plan) -> None:
    """Refuses a run in which no step can change a weight.

    Raises:
        UserError: why none can.
    """
    if not plan.trained_count():
        raise UserError(
            f"nothing would train: all {parameter_count(plan.config):,} parameters are frozen",
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


def _read_data(
    recipe: Recipe,
    config: ModelConfig,
    tokenizer: Tokenizer,
    recipe_folder: Path | None,
    callback: Callback,
    store: EntryStore | None,
) -> PlannedData:
    """Everything a run learns from and is measured on.

    Raises:
        UserError: what is wrong with the data, all of it together; images after the rest.
    """
    data, seed = recipe.data, recipe.train.seed
    wanted = [([Source(**source.model_dump()) for source in data.sources], MISSING_HINT)]
    if data.validation.path is not None:
        held_out = Source(data.validation.path, template=data.sources[0].template)
        wanted.append(([held_out], "give it with data.validation.path=FILE"))

    def encoding(file: str, items: int, fraction: float) -> None:
        callback.working(f"encoding {file}: {count_text(items, 'item')}, {fraction:.0%}", key=file)

    def opening(done: int, total: int) -> None:
        callback.working(f"opened {done:,} of {count_text(total, 'image')}", key="images")

    loaded, errors = [], []
    for sources, missing_hint in wanted:
        try:
            loaded.append(
                load_dataset(
                    sources,
                    tokenizer,
                    data.max_tokens,
                    seed,
                    on_error=data.on_error,
                    image_positions=None if config.vision is None else config.vision.positions,
                    recipe_folder=recipe_folder,
                    progress=encoding,
                    store=store,
                    fetch=callback.fetch,
                    missing_hint=missing_hint,
                )
            )
        except UserError as error:
            errors.append(error)
    raise_together(errors)
    if config.vision is not None:
        images = data.images
        one_each = config.vision.encoder == "clip"
        loaded = with_usable_images(
            loaded, images.max_pixels, images.workers, one_each=one_each, on_error=data.on_error, progress=opening
        )
    train, *held_out_items = loaded
    report = train.report()
    if held_out_items:
        return PlannedData(train, held_out_items[0], {**report, "validation": held_out_items[0].report()})
    if data.validation.fraction:
        return PlannedData(*train.split(data.validation.fraction, seed), report)
    return PlannedData(train, None, report)
