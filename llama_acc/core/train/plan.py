"""What a run will do, found out and checked before anything is computed: recipe, checkpoint, tokenizer, data.

`make_plan` resolves the recipe; whatever comes after it takes a `Plan`, or values.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llama_acc.core.checkpoint.layout import Layout
from llama_acc.core.checkpoint.save import DTYPES, needed_bytes
from llama_acc.core.data.batches import assign_to_ranks, epoch_length, epoch_order, micro_batches
from llama_acc.core.data.cache import EntryStore
from llama_acc.core.data.dataset import Dataset, load_dataset, load_published, publish
from llama_acc.core.data.image_files import with_usable_images
from llama_acc.core.data.sources import MISSING_HINT, Source
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError, raise_all
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import describe, parameter_count, quantization_notes, shapes_of
from llama_acc.core.recipe import CheckpointSection, ImagesSection, Recipe, TrainSection
from llama_acc.core.tokenizer import Tokenizer
from llama_acc.core.train.base import find_model, read_base_weights, with_absolute_paths
from llama_acc.core.train.data_parallel import Mode
from llama_acc.core.train.optimizer import learning_rate
from llama_acc.core.train.runs import Callback
from llama_acc.core.train.samples import Samples, plan_samples, read_prompts

# The largest micro-batch is looked for in so many steps, of so many epochs and documents.
_STEPS, _EPOCHS, _DOCUMENTS = 32, 1000, 1 << 24

_epoch_order = lru_cache(maxsize=2)(epoch_order)


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed: all that its memory depends on besides the model's shape and the batch.

    `dtype` is that of activations and matrix products, `quantize_skip` the matrices not quantized to NF4 (None: nothing
    is), `adamw` the settings of `ClippedAdamW`, `frozen_dtype` the type of what does not train (None: `dtype`); see
    `DataParallel` for its two and `BlockStream` for `stream_base`.
    """

    dtype: torch.dtype
    quantize_skip: tuple[str, ...] | None
    compile: bool
    activation_checkpointing: bool
    model_parallel_size: int
    data_parallel: Mode
    accumulate_unsharded: bool
    adamw: dict[str, Any]
    frozen_dtype: torch.dtype | None = None
    stream_base: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> "StepSettings":
        """The recipe's."""
        train, parallel = recipe.train, recipe.parallel
        return cls(
            DTYPES[train.precision],
            tuple(recipe.tuning.quantize_skip) if recipe.tuning.quantize == "nf4" else None,
            train.compile,
            train.activation_checkpointing is not False,
            parallel.model_parallel_size,
            parallel.data_parallel,
            parallel.accumulate_unsharded,
            recipe.optimizer.model_dump(include={"betas", "eps", "weight_decay", "clip_grad_norm"}),
            stream_base=train.stream_base is True,
        )


PlannedData = tuple[Dataset, Dataset | None, dict[str, Any]]
"""What a run learns from: what is trained on, what is held out, and what data.json says of both."""


@dataclass(frozen=True)
class Plan:
    """A run that was checked: all that it does."""

    recipe: Recipe  # with every path absolute, to be kept, compared and shown
    config: ModelConfig
    settings: StepSettings
    tokenizer: Tokenizer
    layouts: list[Layout]  # checkpoints the weights come from, left to right; empty = random weights
    train: Dataset
    validation: Dataset | None
    report: dict[str, Any]  # what data.json holds, held-out items included
    steps_per_epoch: int  # optimizer steps in a whole epoch; the last one may be smaller
    total_steps: int  # optimizer steps in the run
    seed: int
    images: ImagesSection
    saving: CheckpointSection  # when and what to save, and how many checkpoints to keep
    save_dtype: torch.dtype  # type of the saved weights
    samples: Samples
    chosen: str = ""  # what "auto" in the recipe has become and why, in words; empty: there was none

    def with_chosen(self, train: TrainSection, chosen: str) -> "Plan":
        """The plan with another section `train`, which has no "auto"."""
        recipe, old = self.recipe.model_copy(update={"train": train}), self.settings
        settings = replace(StepSettings.of(recipe), dtype=old.dtype, frozen_dtype=old.frozen_dtype)
        return replace(self, recipe=recipe, settings=settings, chosen=chosen)

    def without_bf16(self) -> "Plan":
        """The plan for a CPU that has no instructions for bf16: products of it take 2.4 times as long there as those of
        float32, with AVX2 over 7 times. What is bf16 is computed in float32; what does not train stays bf16 in memory.
        """
        if self.settings.dtype != torch.bfloat16:
            return self
        return replace(self, settings=replace(self.settings, dtype=torch.float32, frozen_dtype=torch.bfloat16))

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and full shapes of the parameters that train."""
        return {name: one.shape for name, one in describe(self.config).items() if one.trains}

    def trained_count(self) -> int:
        """Number of parameters that train."""
        return sum(map(math.prod, self.trained_shapes().values()))

    @property
    def items_per_epoch(self) -> int:
        """How many items are trained on in an epoch, by the weights of their sources."""
        return epoch_length(self.train.uses)

    def items(self, step: int) -> NDArray[np.int64]:
        """The training items of optimizer step `step`, counted from 0: a function of data, seed and batch size. An
        epoch's last step takes what is left."""
        train, (epoch, within) = self.recipe.train, divmod(step, self.steps_per_epoch)
        order, size = _epoch_order(self.train.uses, train.seed, epoch, train.shuffle), train.global_batch_size
        return order[within * size : (within + 1) * size]

    def micro_batches(self, dataset: Dataset, items: NDArray[np.int64], ranks: int) -> list[list[list[int]]]:
        """Splits items into micro-batches, equally many for each of so many data-parallel ranks."""
        lengths = dataset.lengths
        groups = micro_batches(items, lengths, *self.recipe.train.bounds(), ranks)
        return [[groups[place] for place in own] for own in assign_to_ranks(groups, lengths, ranks)]

    def accumulates(self, ranks: int) -> bool:
        """Whether a full step may take more than one micro-batch on each of so many data-parallel ranks."""
        examples, tokens = self.recipe.train.bounds()
        size = min(self.recipe.train.global_batch_size, self.items_per_epoch)
        most = size * int(self.train.lengths.max())
        return size > examples * ranks or (tokens is not None and most > tokens * ranks)

    def largest_micro_batch(self, ranks: int) -> list[int]:
        """The items of the run's micro-batch that has most tokens, on so many data-parallel ranks.

        Steps that have most tokens are split to find it, and those whose longest items have most; of a run of more
        than 1,000 epochs or 16 million items, in its first epochs.
        """
        train, lengths = self.recipe.train, self.train.lengths
        size, (examples, _), totals, longest = train.global_batch_size, train.bounds(), [], []
        epochs = min(-(-self.total_steps // self.steps_per_epoch), _EPOCHS, max(1, _DOCUMENTS // self.items_per_epoch))
        for epoch in range(epochs):
            count = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
            order = _epoch_order(self.train.uses, train.seed, epoch, train.shuffle)[: count * size]
            by_step = np.zeros(count * size, dtype=np.int64)
            by_step[: len(order)] = lengths[order]
            by_step = np.sort(by_step.reshape(count, size), axis=1)
            totals.append(by_step.sum(1))
            longest.append(by_step[:, -examples:].sum(1))
        fullest = [np.argsort(-np.concatenate(tokens), kind="stable")[:_STEPS] for tokens in (totals, longest)]
        groups = [
            group
            for step in sorted({int(step) for steps in fullest for step in steps})
            for own in self.micro_batches(self.train, self.items(step), ranks)
            for group in own
        ]
        return max(groups, key=lambda group: int(lengths[group].sum()))

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0."""
        train, optimizer = self.recipe.train, self.recipe.optimizer
        return learning_rate(
            step / self.steps_per_epoch,
            epochs=train.epochs,
            warmup_epochs=train.warmup_epochs,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
        )

    def idle_steps(self) -> int:
        """How many steps have rate 0, and change nothing. A warm-up begins with one; see `learning_rate`."""
        if not self.recipe.optimizer.lr:
            return self.total_steps
        return 1 if self.recipe.train.warmup_epochs else 0

    def validates_at(self, step: int) -> bool:
        """Whether validation is due once `step` optimizer steps are done."""
        return self.validation is not None and (step >= self.total_steps or step % self.validates_every == 0)

    @property
    def validates_every(self) -> int:
        """In optimizer steps."""
        return self.recipe.data.validation.every_steps or self.steps_per_epoch

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due once `step` optimizer steps are done."""
        return self._saves_up_to(step) > self._saves_up_to(step - 1)

    def samples_at(self, step: int) -> bool:
        """Whether the sample prompts are to be answered once `step` optimizer steps are done."""
        every = self.recipe.train.sample_every_steps or self.steps_per_epoch
        return bool(self.samples.prompts) and (step >= self.total_steps or step % every == 0)

    @property
    def patience(self) -> int | None:
        """How many validations in a row without a better loss end the run; None: none do."""
        return self.recipe.train.early_stopping_patience

    def save_count(self, done: int = 0) -> int:
        """How many checkpoints the run writes once `done` steps are done, at most."""
        count = self._saves_up_to(self.total_steps) - self._saves_up_to(done)
        # With early stopping each validation may find the best one so far.
        return count + (self.total_steps // self.validates_every - done // self.validates_every) * bool(self.patience)

    def _saves_up_to(self, step: int) -> int:
        saving = self.saving
        step, is_end = min(step, self.total_steps - 1), step >= self.total_steps
        epochs, rest = divmod(step, self.steps_per_epoch)
        count = epochs // saving.every_epochs if saving.every_epochs else 0
        if saving.every_steps:
            count += epochs * ((self.steps_per_epoch - 1) // saving.every_steps) + rest // saving.every_steps
        return count + is_end

    def checkpoint_name(self, step: int) -> str:
        """`epoch0` when epoch 0 is done, `epoch0-iter500` after 500 steps of epoch 0 (LLaMA2-Accessory's names)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return f"epoch{epoch}-iter{within}" if within else f"epoch{epoch - 1}"

    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint on disk."""
        trained = self.trained_count()
        saved = trained if self.saving.trainable_only else parameter_count(self.config)
        copied = sum(map(len, self.tokenizer.files().values()))
        return needed_bytes(saved, trained, len(shapes_of(self.config)), self.save_dtype) + copied

    def disk_bytes(self, existing: int = 0, done: int = 0) -> int:
        """What the run's checkpoints take of the disk at most once `done` steps are done, beside so many that exist; a
        new one is whole before the oldest goes."""
        count, keep = self.save_count(done), self.saving.keep
        return self.checkpoint_bytes() * (min(count, max(1, keep + 1 - existing)) if keep else count)


def make_plan(
    recipe: Recipe,
    callback: Callback,
    *,
    dry_run: bool = False,
    saved: Path | None = None,
    store: EntryStore | None = None,
    published: Path | None = None,
) -> Plan:
    """Finds and checks everything a run needs, except its output folder and its weights, which may be absent in a
    `dry_run`.

    `saved` is the run's own checkpoint, to resume from. Encoded data is kept in `store` (None: in the cache), or it was
    left in the folder `published` by another process of this machine.

    Raises:
        UserError: the first group of problems found.
    """
    prompts, most_new = read_prompts(recipe.train.sample_prompts, recipe.folder), recipe.train.sample_max_new_tokens
    callback.progress("reading the model's shape and tokenizer")
    layouts, config, tokenizer = find_model(recipe, weights_may_be_absent=dry_run, saved=saved)
    skip = recipe.tuning.quantize_skip if recipe.tuning.quantize == "nf4" else None
    for note in quantization_notes(config, skip, recipe.parallel.model_parallel_size):
        callback.note(note)
    if recipe.data.max_tokens > config.max_seq_len:
        raise UserError(
            f"data.max_tokens ({recipe.data.max_tokens}) is more than the model's max_seq_len ({config.max_seq_len})",
            "lower data.max_tokens, or raise model.max_seq_len",
        )
    if published is None and (saved is None or recipe.has_frozen):
        read_base_weights(layouts, config, Parallel())  # what does not fit is reported before hours of encoding
    callback.progress("reading the data")
    if published is None:
        train, validation, report = _read_data(recipe, config, tokenizer, callback, store)
    else:
        train, validation, report = _load_published(published, tokenizer)
    steps_per_epoch = math.ceil(epoch_length(train.uses) / recipe.train.global_batch_size)
    total = math.ceil(recipe.train.epochs * steps_per_epoch - 1e-9)
    checkpoint = recipe.checkpoint
    plan = Plan(
        recipe=with_absolute_paths(recipe, layouts, tokenizer, saved),
        config=config,
        settings=StepSettings.of(recipe),
        tokenizer=tokenizer,
        layouts=layouts,
        train=train,
        validation=validation,
        report=report,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total, recipe.train.max_steps or total),
        seed=recipe.train.seed,
        images=recipe.data.images,
        saving=checkpoint,
        save_dtype=DTYPES[recipe.train.precision if checkpoint.dtype == "auto" else checkpoint.dtype],
        samples=plan_samples(prompts, most_new, train.template, tokenizer, config.max_seq_len),
    )
    if prompts:  # a resumed run does without the file
        plan.recipe.train.sample_prompts = prompts
    _check_learns(plan)
    return plan


def make_plan_together(recipe: Recipe, callback: Callback, parallel: Parallel, *, saved: Path | None = None) -> Plan:
    """`make_plan` on every rank. One rank of each machine goes through the data; the others map what it encoded."""
    make = partial(make_plan, recipe, callback, saved=saved)

    def lead() -> tuple[Plan, Path] | None:
        if not parallel.is_local_rank_zero:
            return None
        plan, folder = make(store=store), store.own_folder
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
    return load_published(folder / "train", tokenizer), validation, report


def _check_learns(plan: Plan) -> None:
    """Refuses a run in which no step can change a weight, naming why."""
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
    callback: Callback,
    store: EntryStore | None,
) -> PlannedData:
    """Everything a run learns from and is measured on."""
    data, seed = recipe.data, recipe.train.seed

    def load(sources: Sequence[Source], missing_hint: str) -> Dataset:
        return load_dataset(
            sources,
            tokenizer,
            data.max_tokens,
            seed,
            on_error=data.on_error,
            image_positions=None if config.vision is None else config.vision.positions,
            progress=lambda file, items, part: callback.progress(f"encoding {file}", items, round(items / (part or 1))),
            store=store,
            fetch=callback.fetch,
            missing_hint=missing_hint,
        )

    wanted = [([Source(**source.model_dump(), folder=recipe.folder) for source in data.sources], MISSING_HINT)]
    if data.validation.path is not None:
        alike = data.sources[0].model_dump(include={"format", "template", "train_on", "reasoning"})
        held_out = Source(data.validation.path, **alike, folder=recipe.folder)
        wanted.append(([held_out], "give it with data.validation.path=FILE"))
    loaded, errors = [], []
    for sources, missing_hint in wanted:
        try:
            loaded.append(load(sources, missing_hint))
        except UserError as error:
            errors.append(error)
    raise_all(errors)
    if config.vision is not None:
        loaded = with_usable_images(
            loaded,
            data.images.max_pixels,
            data.images.workers,
            one_each=config.vision.encoder == "clip",
            on_error=data.on_error,
            progress=partial(callback.progress, "opening images"),
        )
    train, *others = loaded
    report = train.report()
    if others:
        return train, others[0], {**report, "validation": others[0].report()}
    if data.validation.fraction:
        return *train.split(data.validation.fraction, seed), report
    return train, None, report
