"""This rank's part of a model in training: what it computes in a step, and what a checkpoint of it holds."""

import heapq
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_acc.core.checkpoint.adapter import BASE_FILE, Base, TrainedQuantized, base_fingerprint
from llama_acc.core.checkpoint.load import Weights, load_parameters
from llama_acc.core.checkpoint.resume import FORMAT_VERSION, SavedState, read_progress, restore_rng, rng_state
from llama_acc.core.checkpoint.save import Rows, Snapshot
from llama_acc.core.data.batches import (
    MicroBatch,
    assign_to_ranks,
    build,
    build_multimodal_batch,
    epoch_order,
    micro_batches,
    step_items,
)
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.templates import TEMPLATE_FILE, Template
from llama_acc.core.device import prepare_cpu
from llama_acc.core.distributed.groups import Parallel, is_sharded, local_part
from llama_acc.core.generate.vision_encoder import load_vision_encoder
from llama_acc.core.model.config import VISION_FILE, ModelConfig
from llama_acc.core.model.transformer import Transformer, initialize
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.image_loader import ImageLoader, MicroBatchIndices
from llama_acc.core.train.optimizer import ClippedAdamW, learning_rate
from llama_acc.core.train.plan import Plan, StepSettings, model_on_meta
from llama_acc.core.train.step import (
    StepResult,
    apply_activation_checkpointing,
    apply_compile,
    evaluate,
    forward,
    train_step,
)

# `largest_micro_batch` looks at this many steps, epochs and documents.
_LOOKED_AT, _EPOCHS, _DOCUMENTS = 32, 1000, 1 << 24


class Assembled(NamedTuple):
    """What computes optimizer steps: see `train_step`."""

    model: Transformer
    data_parallel: DataParallel
    optimizer: ClippedAdamW


def assemble(
    config: ModelConfig,
    settings: StepSettings,
    parallel: Parallel,
    device_type: str,
    materialize: Callable[[Transformer], None],
) -> Assembled:
    """Builds a rank's part of a run.

    Args:
        config: the model's shape.
        settings: how it computes.
        parallel: who trains together.
        device_type: such as "cpu", where it will compute.
        materialize: gives the parameters, which are on the meta device, storage and values.
    """
    model = model_on_meta(config, settings, parallel)
    if settings.compile:
        apply_compile(model)
    if settings.activation_checkpointing:
        apply_activation_checkpointing(model)
    data_parallel = DataParallel(model, parallel, settings.data_parallel, settings.accumulate_unsharded, device_type)
    materialize(model)
    optimizer = ClippedAdamW(
        model,
        parallel,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_grad_norm=settings.clip_grad_norm,
    )
    return Assembled(model, data_parallel, optimizer)


class Trainer:
    """A model, its optimizer and how far they are.

    Attributes:
        step: optimizer steps done.
        current_items: those of the micro-batch that was begun last, to report where memory ran out.
        has_started: whether a step was begun.
    """

    def __init__(self, plan: Plan, device: torch.device, weights: Weights | None, parallel: Parallel) -> None:
        """Builds the model and its optimizer.

        Args:
            plan: what to do.
            device: where to compute.
            weights: mapped and checked, to start from; what it lacks is random. What trains is float32, and copied.
            parallel: who trains together.
        """
        recipe, seed = plan.recipe, plan.recipe.train.seed
        if device.type == "cpu":
            prepare_cpu()
        if recipe.train.deterministic:
            torch.use_deterministic_algorithms(True)
        # What draws without a generator of its own, and what checkpoints keep of it, is the seed's, too.
        torch.manual_seed(seed)

        def materialize(model: Transformer) -> None:
            model.to_empty(device=device)
            given = set() if weights is None else set(weights.tensors)
            initialize(model, seed, {name for name, _ in model.named_parameters()} - given)
            if weights is not None:
                load_parameters(model, weights)

        self.model, self.data_parallel, self.optimizer = assemble(
            plan.config, plan.settings, parallel, device.type, materialize
        )
        self.plan, self.device, self.parallel, self.step = plan, device, parallel, 0
        keep_all = not recipe.checkpoint.trainable_only
        # Only ranks that have the tower find out that it cannot be made.
        self.vision_encoder = parallel.raise_together(
            lambda: load_vision_encoder(self.model, weights, device, seed, keep_all)
        )
        self._images = None
        if self.vision_encoder is not None:
            self._images = ImageLoader(
                self.vision_encoder,
                seed=seed,
                max_pixels=recipe.data.images.max_pixels,
                workers=recipe.data.images.workers,
                cache_features=recipe.vision.cache_features,
                reserve=plan.disk_bytes(),
            )
        self._batches: Iterator[MicroBatch] | None = None
        self.current_items: list[int] | None = None
        self.has_started = False
        self._order: tuple[int, NDArray[np.int64]] | None = None  # of the current epoch
        # Of a model of random weights there is no base to belong to.
        self._base: Base | None = None
        if plan.layouts and parallel.is_main:
            skip = plan.settings.quantize_skip
            quantized = None if skip is None else TrainedQuantized("nf4", skip)
            pretrained = tuple(recipe.model.pretrained_list())
            self._base = Base(base_fingerprint(plan.layouts, plan.config), pretrained, quantized)
        # For a resume.
        self._base_fingerprint = None if self._base is None else self._base.fingerprint

    def learning_rate(self) -> float:
        """The rate of the coming step."""
        optimizer, train = self.plan.recipe.optimizer, self.plan.recipe.train
        return learning_rate(
            self.step / self.plan.steps_per_epoch,
            epochs=train.epochs,
            warmup_epochs=train.warmup_epochs,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
        )

    def items(self, step: int) -> NDArray[np.int64]:
        """The training items of optimizer step `step`, counted from 0: a function of data, seed and batch size."""
        train = self.plan.recipe.train
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.plan.train), train.seed, epoch, train.shuffle))
        return step_items(self._order[1], within, train.global_batch_size)

    def split_into_micro_batches(self, dataset: Dataset, items: NDArray[np.int64]) -> tuple[list[list[int]], float]:
        """Splits items among ranks and micro-batches, within the recipe's bounds.

        Returns:
            The items of each of this rank's micro-batches, and how many more tokens the fullest rank has than the mean
            one, as a fraction of that.
        """
        train, ranks = self.plan.recipe.train, self.parallel.data_size
        groups = micro_batches(items, dataset.lengths, train.batch_size, train.micro_batch_tokens, ranks)
        assigned = assign_to_ranks(groups, dataset.lengths, ranks)
        loads = [sum(int(dataset.lengths[item]) for group in own for item in groups[group]) for own in assigned]
        own = [groups[group] for group in assigned[self.parallel.data_rank]]
        return own, max(loads) * ranks / sum(loads) - 1.0

    def iter_batches(self, dataset: Dataset, indices: Iterable[MicroBatchIndices]) -> Iterator[MicroBatch]:
        """The micro-batches of a dataset, with what the model takes of their images.

        Held-out images are padded to a square, as those in generation are.
        """
        if self._images is None:
            return (build(dataset, items) for items, _ in indices)
        crop = self.plan.recipe.data.images.transform if dataset is self.plan.train else "pad_to_square"
        return self._images.iter_batches(dataset, indices, crop)

    def _remaining(self) -> Iterator[MicroBatchIndices]:
        """This rank's micro-batches from the coming step to the last one."""
        for step in range(self.step, self.plan.total_steps):
            groups, _ = self.split_into_micro_batches(self.plan.train, self.items(step))
            yield from (MicroBatchIndices(group, step // self.plan.steps_per_epoch) for group in groups)

    def close(self) -> None:
        """Ends the processes that decode images."""
        if self._images is not None:
            self._images.close()

    def probe_peak_memory(self) -> None:
        """Computes the largest micro-batch of the run, forward and backward, with all that lies in memory beside it.

        If memory is too short it runs out now, and not when that batch comes. Nothing that a run depends on changes:
        the gradients are dropped, and the moments, which would be made in the first step, are zero.
        """
        plan, train = self.plan, self.plan.recipe.train
        state = rng_state(self.device)
        self.optimizer.make_state()
        self.current_items = self.parallel.run_on_rank_zero(lambda: largest_micro_batch(plan, self.parallel.data_size))
        if self.vision_encoder is None:
            batch = build(plan.train, self.current_items)
        else:
            # Of black images: a frozen tower takes less than a step, and its time is worth saving.
            vision = self.vision_encoder.vision
            batch = build_multimodal_batch(plan.train, self.current_items, vision.positions)
            shape = (len(batch.images), *vision.input_shape)
            inputs = torch.zeros(shape, dtype=self.vision_encoder.dtype, device=self.device)
            batch = replace(batch, inputs=inputs)
        several = min(train.global_batch_size, len(plan.train)) > train.batch_size * self.parallel.data_size
        for last in (False, True) if several else (True,):
            self.data_parallel.before_backward(last)
            forward(self.model, batch, 0.0, self.device).backward()
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        restore_rng(state, self.device)

    def advance(
        self, before_update: Callable[[], None] = lambda: None, extras: Sequence[float] = ()
    ) -> tuple[StepResult, dict[str, Any]]:
        """One optimizer step.

        Args:
            before_update: called before anything that a checkpoint holds changes.
            extras: numbers to sum over all ranks along with the results.

        Returns:
            Its results on the device, and the metrics that the host knows of it.
        """
        items, data, lr = self.items(self.step), self.plan.train, self.learning_rate()
        self.has_started = True
        label_tokens = int(data.label_counts[items].sum(dtype=np.int64))
        groups, imbalance = self.split_into_micro_batches(data, items)
        if self._batches is None:
            # Of all steps to come: the images of the next ones are decoded while this one is computed.
            self._batches = self.iter_batches(data, self._remaining())

        def batches() -> Iterator[MicroBatch]:
            assert self._batches is not None
            for group, batch in zip(groups, islice(self._batches, len(groups)), strict=True):
                self.current_items = group
                yield batch

        result = train_step(
            self.model,
            self.optimizer,
            self.data_parallel,
            batches(),
            label_tokens,
            lr,
            self.device,
            extras,
            before_update,
        )
        self.step += 1
        metrics = {
            "step": self.step,
            "epoch": self.step / self.plan.steps_per_epoch,
            "lr": lr,
            "label_tokens": label_tokens,
            "tokens": int(data.lengths[items].sum(dtype=np.int64)),
        }
        if self.parallel.data_size > 1:
            metrics["imbalance"] = imbalance
        return result, metrics

    def validate(self) -> float:
        """The loss per label token over the held-out items."""
        held_out = self.plan.validation
        assert held_out is not None
        groups, _ = self.split_into_micro_batches(held_out, np.arange(len(held_out)))
        batches = self.iter_batches(held_out, (MicroBatchIndices(group, 0) for group in groups))
        return evaluate(self.model, self.data_parallel, batches, held_out.label_tokens, self.device)

    def snapshot(self) -> Snapshot:
        """Everything a checkpoint of this moment holds; its tensors are the ones in use."""
        plan = self.plan
        progress = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "steps_per_epoch": plan.steps_per_epoch,
            "data": plan.train.fingerprint(),
            "validation": None if plan.validation is None else plan.validation.fingerprint(),
            "base": self._base_fingerprint,
            "model_parallel_size": self.parallel.model_size,
            "data_parallel_size": self.parallel.data_size,
        }
        files = {
            "config.json": _json(plan.config.to_params()),
            "meta.json": _json({"llama_type": plan.config.llama_type}),
            "recipe.yaml": plan.recipe.to_yaml().encode(),
            "state/progress.json": _json(progress),
            **plan.tokenizer.files(),
        }
        if isinstance(plan.train.template, Template):  # a chat template is among the tokenizer's files
            files[TEMPLATE_FILE] = plan.train.template.to_json().encode()
        if plan.config.vision is not None:
            files[VISION_FILE] = plan.config.vision.to_json()
        if self._base is not None and plan.recipe.checkpoint.trainable_only and plan.has_frozen:
            files[BASE_FILE] = self._base.to_json()
        weights = {name: _rows(p, local_part(p).tensor) for name, p in self.model.named_parameters()}
        named = self.optimizer.named
        state = {f"{key}.{name}": _rows(named[name], value) for key, name, value in self.optimizer.state_tensors()}
        if plan.save_dtype != torch.float32:
            state |= {f"master.{name}": weights[name] for name in named}
        tower = None if self.vision_encoder is None else self.vision_encoder.tower
        if tower is not None:
            frozen = ((tower.vision.tower_prefix + name, p.detach()) for name, p in tower.named_parameters())
            weights |= {name: Rows(value, 0, tuple(value.shape), shared=True) for name, value in frozen}
        weights = {name: rows for name, rows in weights.items() if plan.saves(name)}
        return Snapshot(weights, state, rng_state(self.device), plan.save_dtype, files, self.parallel)

    def load(self, state: SavedState, step: int) -> None:
        """Restores everything a checkpoint's state holds but the masters; `step` is where its progress stands."""
        self.optimizer.load_state(state.read)
        restore_rng(state.rng(), self.device)
        self.step, self._batches = step, None
        if self._base is None:  # it is not there any more, or never was
            self._base_fingerprint = read_progress(state.folder.parent).get("base")


def _rows(parameter: Tensor, value: Tensor) -> Rows:
    """A value as rows of a tensor that is shaped and sharded like a parameter, or a number that all ranks have."""
    if not value.dim():
        return Rows(value, 0, (), shared=True)
    return Rows(value, local_part(parameter).rows.start, tuple(parameter.shape), shared=not is_sharded(parameter))


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


class _Step(NamedTuple):
    """An optimizer step that may have the largest micro-batch."""

    tokens: int
    number: int
    items: NDArray[np.int64]


def largest_micro_batch(plan: Plan, data_size: int) -> list[int]:
    """The items of the run's micro-batch that has most tokens, on `data_size` data-parallel ranks.

    How items are split into micro-batches is looked at for the steps that have most tokens, and for those whose longest
    items have most; of a run of more than 1,000 epochs or 16 million items, in its first epochs.
    """
    train, lengths = plan.recipe.train, plan.train.lengths
    epochs = min(math.ceil(train.epochs), _EPOCHS, max(1, _DOCUMENTS // len(plan.train)))
    kept: tuple[list[_Step], list[_Step]] = ([], [])
    for epoch in range(epochs):
        for steps, found in zip(kept, _fullest_steps(plan, epoch), strict=True):
            steps[:] = heapq.nlargest(_LOOKED_AT, [*steps, *found], lambda step: (step.tokens, -step.number))
    items = {step.number: step.items for steps in kept for step in steps}
    largest: list[int] = []
    for number in sorted(items):
        groups = micro_batches(items[number], lengths, train.batch_size, train.micro_batch_tokens, data_size)
        largest = max(largest, *groups, key=lambda group: int(lengths[group].sum()) if group else 0)
    return largest


def _fullest_steps(plan: Plan, epoch: int) -> tuple[list[_Step], list[_Step]]:
    """An epoch's steps that have most tokens; and those whose longest items, as many as a micro-batch takes, do."""
    train = plan.recipe.train
    first, size = epoch * plan.steps_per_epoch, train.global_batch_size
    count = min(plan.steps_per_epoch, max(0, plan.total_steps - first))
    order = epoch_order(len(plan.train), train.seed, epoch, train.shuffle)[: count * size]
    lengths = np.zeros(count * size, dtype=plan.train.lengths.dtype)
    lengths[: len(order)] = plan.train.lengths[order]
    by_length = lengths.reshape(count, size)
    by_length.sort(axis=1)

    def fullest(tokens: NDArray[np.int64]) -> list[_Step]:
        highest = np.argsort(-tokens, kind="stable")[:_LOOKED_AT].tolist()
        return [_Step(int(tokens[i]), first + i, step_items(order, i, size).copy()) for i in highest]

    longest = by_length[:, -train.batch_size :].sum(1, dtype=np.int64)
    return fullest(by_length.sum(1, dtype=np.int64)), fullest(longest)
