"""This rank's part of a model in training: what it computes in a step, and what a checkpoint of it holds."""

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
from llama_acc.core.checkpoint.streaming import BlockStream, find_regions, stream_blocks
from llama_acc.core.data.batches import MicroBatch, build, build_multimodal_batch, draws_of
from llama_acc.core.data.chat_template import ChatTemplate
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.templates import TEMPLATE_FILE
from llama_acc.core.device import device_type, prepare_cpu
from llama_acc.core.distributed.groups import Parallel, is_sharded, local_part
from llama_acc.core.generate.load import LoadedModel, load_vision_encoder
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.copies import ComputeCopies
from llama_acc.core.model.layers import TiedOutput
from llama_acc.core.model.transformer import (
    Transformer,
    build_on_meta,
    freeze_untrained,
    initialize,
    quantize_on_meta,
)
from llama_acc.core.model.vision_config import VISION_FILE
from llama_acc.core.tokenizer_folder import CHAT_TEMPLATE_FILE
from llama_acc.core.train.base import read_base_weights
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.image_loader import ImageLoader, MicroBatchIndices
from llama_acc.core.train.optimizer import ClippedAdamW
from llama_acc.core.train.plan import Plan, StepSettings
from llama_acc.core.train.samples import answer_prompts
from llama_acc.core.train.step import (
    StepResult,
    apply_activation_checkpointing,
    apply_compile,
    evaluate,
    forward,
    packed_ahead,
    train_step,
)


def model_for_training(config: ModelConfig, settings: StepSettings, parallel: Parallel) -> Transformer:
    """A rank's part of the model, without storage: what trains is float32, and what does not may be quantized."""
    model = build_on_meta(config, settings.dtype, parallel)
    freeze_untrained(model, settings.frozen_dtype)
    if settings.quantize_skip is not None:
        quantize_on_meta(model, settings.quantize_skip)
    return model


def check_streams(plan: Plan) -> None:
    """Checks that the base of a plan can be streamed."""
    weights = read_base_weights(plan.layouts, plan.config, Parallel()) or Weights()
    find_regions(model_for_training(plan.config, plan.settings, Parallel()), weights)


class Assembled(NamedTuple):
    """What computes optimizer steps: see `train_step`."""

    model: Transformer
    data_parallel: DataParallel
    optimizer: ClippedAdamW


def assemble(
    config: ModelConfig,
    settings: StepSettings,
    parallel: Parallel,
    kind: str,
    materialize: Callable[[Transformer], None],
) -> Assembled:
    """Builds a rank's part of a run, on a kind of device such as "cuda".

    `materialize` gives the parameters, which are on the meta device, storage and values.
    """
    model = model_for_training(config, settings, parallel)
    if settings.compile:
        apply_compile(model)
    if settings.activation_checkpointing:
        apply_activation_checkpointing(model)
    data_parallel = DataParallel(model, parallel, settings.data_parallel, settings.accumulate_unsharded, kind)
    materialize(model)
    # Several data-parallel ranks gather the parameters in the type they are computed in; compiled blocks cast them.
    is_copied = parallel.data_size == 1 and not settings.compile and device_type(model.norm.weight) == "cuda"
    copies = ComputeCopies(_cast_whole(model), settings.dtype) if is_copied else None
    return Assembled(model, data_parallel, ClippedAdamW(model, model.specs, parallel, copies=copies, **settings.adamw))


def _cast_whole(model: Transformer) -> dict[str, Tensor]:
    """The parameters that train, without an embedding of which a few rows are cast."""
    rows = None if isinstance(model.output, TiedOutput) else model.tok_embeddings.weight
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p is not rows}


class Trainer:
    """A model, its optimizer and how far they are: `step` optimizer steps are done."""

    def __init__(self, plan: Plan, device: torch.device, weights: Weights | None, parallel: Parallel) -> None:
        """Builds the model and its optimizer from checked weights; what they lack, or None, is random."""
        if device.type == "cpu":
            prepare_cpu(not plan.settings.stream_base)
        # What draws without a generator of its own, and what checkpoints keep of it, is the seed's, too.
        torch.manual_seed(plan.seed)
        self.stream: BlockStream | None = None

        def materialize(model: Transformer) -> None:
            given = set() if weights is None else set(weights.tensors)
            if plan.settings.stream_base:
                self.stream = stream_blocks(model, weights or Weights(), device)
            model.to_empty(device=device)
            initialize(model, plan.seed, {name for name, _ in model.named_parameters()} - given)
            if weights is not None:
                load_parameters(model, weights)

        self.model, self.data_parallel, self.optimizer = assemble(
            plan.config, plan.settings, parallel, device.type, materialize
        )
        self.plan, self.device, self.parallel, self.step = plan, device, parallel, 0
        # Only ranks that have the tower find out that it cannot be made.
        self.vision_encoder = parallel.raise_together(
            lambda: load_vision_encoder(self.model, weights, device, plan.seed, keep_all=not plan.saving.trainable_only)
        )
        self._images = None
        if self.vision_encoder is not None:
            self._images = ImageLoader(
                self.vision_encoder,
                plan.images,
                seed=plan.seed,
                cache_features=plan.recipe.vision.cache_features,
                reserve=plan.disk_bytes(),
            )
        self._batches: Iterator[MicroBatch] | None = None
        self.current_items: list[int] | None = None  # of the micro-batch that is computed, to report out of memory
        self.has_started = False  # whether a step was begun
        self.best_step: int | None = None  # where the validation loss was least so far; None: there was none
        self.best_loss, self.since_best = math.inf, 0  # that loss, and how many validations came after it
        # Of a model of random weights there is no base to belong to.
        self._base: Base | None = None
        if plan.layouts and parallel.is_main:
            skip = plan.settings.quantize_skip
            self._base = Base(
                base_fingerprint(plan.layouts, plan.config),
                tuple(str(layout.folder.resolve()) for layout in plan.layouts),
                None if skip is None else TrainedQuantized("nf4", skip),
            )
        self._base_fingerprint = None if self._base is None else self._base.fingerprint

    def split_into_micro_batches(self, dataset: Dataset, items: NDArray[np.int64]) -> tuple[list[list[int]], float]:
        """The items of each of this rank's micro-batches, and how many more tokens the fullest rank has than the mean
        one, as a fraction of that."""
        ranks = self.plan.micro_batches(dataset, items, self.parallel.data_size)
        loads = [sum(int(dataset.lengths[group].sum()) for group in own) for own in ranks]
        return ranks[self.parallel.data_rank], max(loads) * len(loads) / sum(loads) - 1.0

    def iter_batches(self, dataset: Dataset, indices: Iterable[MicroBatchIndices]) -> Iterator[MicroBatch]:
        """The micro-batches of a dataset, with what the model takes of their images.

        Held-out images are padded to a square, as those in generation are.
        """
        if self._images is None:
            return packed_ahead((build(dataset, items) for items, _ in indices), self.device)
        crop = self.plan.images.transform if dataset is self.plan.train else "pad_to_square"
        return self._images.iter_batches(dataset, indices, crop)

    def close(self) -> None:
        """Ends the processes that decode images, and the thread that reads blocks."""
        if self.stream is not None:
            self.stream.close()
        if self._images is not None:
            self._images.close()

    def probe_peak_memory(self) -> None:
        """Computes the largest micro-batch of the run, forward and backward, with all that lies in memory beside it.

        If memory is too short it runs out now, and not when that batch comes. Nothing that a run depends on changes:
        the gradients are dropped, and the moments, which would be made in the first step, are zero.
        """
        plan, ranks = self.plan, self.parallel.data_size
        state = rng_state(self.device)
        self.optimizer.make_state()
        self.current_items = self.parallel.run_on_rank_zero(lambda: plan.largest_micro_batch(ranks))
        if self.vision_encoder is None:
            batch = build(plan.train, self.current_items)
        else:
            # Of black images: a frozen tower takes less than a step, and its time is worth saving.
            vision = self.vision_encoder.vision
            batch = build_multimodal_batch(plan.train, self.current_items, vision.positions)
            shape = (len(batch.images), *vision.input_shape)
            batch = replace(batch, inputs=torch.zeros(shape, dtype=self.vision_encoder.dtype, device=self.device))
        batch = replace(batch, draws=draws_of(self.current_items, batch.example_sizes, plan.seed, 0))
        for last in (False, True) if plan.accumulates(ranks) else (True,):
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
        """One optimizer step; see `train_step` for the arguments.

        Returns:
            Its results on the device, and the metrics that the host knows of it.
        """
        plan, data = self.plan, self.plan.train
        items, lr = plan.items(self.step), plan.learning_rate(self.step)
        self.has_started = True
        label_weight = float(data.label_weights[items].sum(dtype=np.float64))
        groups, imbalance = self.split_into_micro_batches(data, items)
        if self._batches is None:
            # Of all steps to come: the images of the next ones are decoded while this one is computed.
            self._batches = self.iter_batches(data, self._remaining())
        batches = self._current(groups, islice(self._batches, len(groups)))
        parts = self.model, self.optimizer, self.data_parallel
        result = train_step(*parts, batches, label_weight, lr, self.device, extras, before_update)
        self.step += 1
        metrics = {
            "step": self.step,
            "epoch": self.step / plan.steps_per_epoch,
            "lr": lr,
            "label_tokens": int(data.label_counts[items].sum(dtype=np.int64)),
            "tokens": int(data.lengths[items].sum(dtype=np.int64)),
        }
        return result, metrics | ({"imbalance": imbalance} if self.parallel.data_size > 1 else {})

    def _remaining(self) -> Iterator[MicroBatchIndices]:
        """This rank's micro-batches from the coming step to the last one."""
        for step in range(self.step, self.plan.total_steps):
            groups, _ = self.split_into_micro_batches(self.plan.train, self.plan.items(step))
            yield from (MicroBatchIndices(group, step // self.plan.steps_per_epoch) for group in groups)

    def _current(self, groups: list[list[int]], batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        epoch = self.step // self.plan.steps_per_epoch
        for group, batch in zip(groups, batches, strict=True):
            yield replace(batch, draws=draws_of(group, batch.example_sizes, self.plan.seed, epoch))
            self.current_items = group  # the next one is asked for before this one is computed

    def validate(self) -> float:
        """The loss per label token over the held-out items."""
        held_out = self.plan.validation
        assert held_out is not None
        groups, _ = self.split_into_micro_batches(held_out, np.arange(len(held_out)))
        batches = self.iter_batches(held_out, (MicroBatchIndices(group, 0) for group in groups))
        loss = evaluate(self.model, self.data_parallel, batches, held_out.label_weight, self.device)
        if self.step % self.plan.validates_every:
            return loss  # at the end of a run that may be prolonged: it does not count
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.since_best = self.step, loss, 0
        else:
            self.since_best += 1
        return loss

    def answer_samples(self) -> dict[str, str]:
        """What the model answers to each sample prompt, on rank 0."""
        plan, template = self.plan, self.plan.train.template
        loaded = LoadedModel(self.model, plan.tokenizer, template, "the run", self.device, self.vision_encoder)
        loaded = replace(loaded, stream=self.stream)
        return answer_prompts(loaded, self.data_parallel, plan.samples, plan.settings.compile)

    @property
    def stops_early(self) -> bool:
        """Whether so many validations brought nothing better that the run is to end."""
        return self.plan.patience is not None and self.since_best >= self.plan.patience

    def ending(self) -> str:
        """Why the run is at its end."""
        plan, best = self.plan, self.best_step
        if not self.stops_early or self.step >= plan.total_steps:
            return "The run is complete."
        where = f", {plan.checkpoint_name(best)}" if best else ", before training"
        return (
            f"The run ended early, after step {self.step:,} of {plan.total_steps:,}: in {self.since_best} validations "
            f"the loss was not below the {self.best_loss:.4f} of step {best or 0:,}{where}."
        )

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
        if plan.patience is not None and self.best_step is not None:
            progress["best"] = {"step": self.best_step, "loss": self.best_loss, "since": self.since_best}
        files = {
            "config.json": _json(plan.config.to_params()),
            "meta.json": _json({"llama_type": plan.config.llama_type}),
            "recipe.yaml": plan.recipe.to_yaml().encode(),
            "state/progress.json": _json(progress),
            **plan.tokenizer.files(),
        }
        if isinstance(plan.train.template, ChatTemplate):
            files[CHAT_TEMPLATE_FILE] = plan.train.template.source.encode()
        else:
            files[TEMPLATE_FILE] = plan.train.template.to_json().encode()
        if plan.config.vision is not None:
            files[VISION_FILE] = plan.config.vision.to_json()
        if self._base is not None and plan.saving.trainable_only and plan.recipe.has_frozen:
            files[BASE_FILE] = self._base.to_json()
        weights = {name: _rows(p, local_part(p).tensor) for name, p in self.model.named_parameters()}
        named = self.optimizer.named
        state = {f"{key}.{name}": _rows(named[name], value) for key, name, value in self.optimizer.state_tensors()}
        if plan.save_dtype != torch.float32:
            state |= {f"master.{name}": weights[name] for name in named}
        if plan.saving.trainable_only:
            weights = {name: weights[name] for name in named}
        elif self.vision_encoder is not None and (tower := self.vision_encoder.tower) is not None:
            frozen = ((tower.vision.tower_prefix + name, p.detach()) for name, p in tower.named_parameters())
            weights |= {name: Rows(value, 0, tuple(value.shape), shared=True) for name, value in frozen}
        return Snapshot(weights, state, rng_state(self.device), plan.save_dtype, files, self.parallel)

    def load(self, state: SavedState, step: int) -> None:
        """Restores everything a checkpoint's state holds but the masters; `step` is where its progress stands."""
        self.optimizer.load_state(state.read)
        restore_rng(state.rng(), self.device)
        self.step, self._batches = step, None
        progress = read_progress(state.folder.parent)
        if best := progress.get("best"):
            self.best_step, self.best_loss, self.since_best = best["step"], best["loss"], best["since"]
        if self._base is None:  # it is not there any more, or never was
            self._base_fingerprint = progress.get("base")


def _rows(parameter: Tensor, value: Tensor) -> Rows:
    """A value as rows of a tensor that is shaped and sharded like a parameter, or a number that all ranks have."""
    if not value.dim():
        return Rows(value, 0, (), shared=True)
    return Rows(value, local_part(parameter).rows.start, tuple(parameter.shape), shared=not is_sharded(parameter))


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
