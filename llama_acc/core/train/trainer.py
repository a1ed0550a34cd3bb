"""This rank's part of a model in training: what it computes in a step, and what a checkpoint of it holds."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_acc.core.checkpoint.adapter import BASE_FILE, Base, base_of
from llama_acc.core.checkpoint.load import Weights, load_parameters
from llama_acc.core.checkpoint.resume import FORMAT_VERSION, SavedState, read_progress, restore_rng, rng_state
from llama_acc.core.checkpoint.save import Rows, Snapshot
from llama_acc.core.data.batches import (
    MicroBatch,
    build,
    build_seen,
    deal_to_ranks,
    epoch_order,
    micro_batches,
    step_items,
)
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.templates import TEMPLATE_FILE, Template
from llama_acc.core.device import prepare_cpu
from llama_acc.core.distributed.groups import Parallel, is_sharded, local_part
from llama_acc.core.generate.vision_encoder import load_vision_encoder
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer, initialise
from llama_acc.core.model.vision_config import VISION_FILE
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.image_feed import Dealt, ImageFeeds
from llama_acc.core.train.largest import largest_micro_batch
from llama_acc.core.train.optimizer import ClippedAdamW
from llama_acc.core.train.plan import Plan
from llama_acc.core.train.plan_model import has_frozen, model_on_meta
from llama_acc.core.train.schedule import learning_rate
from llama_acc.core.train.step import (
    StepResult,
    apply_activation_checkpointing,
    apply_compile,
    evaluate,
    forward,
    train_step,
)


class Assembled(NamedTuple):
    """What computes optimizer steps: see `train_step`."""

    model: Transformer
    data_parallel: DataParallel
    optimizer: ClippedAdamW


def assemble(
    recipe: Recipe,
    config: ModelConfig,
    parallel: Parallel,
    device_type: str,
    materialise: Callable[[Transformer], None],
) -> Assembled:
    """Builds a rank's part of a run.

    Args:
        recipe: how it trains.
        config: the model's shape.
        parallel: who trains together.
        device_type: such as "cpu", where it will compute.
        materialise: gives the parameters, which are on the meta device, storage and values.
    """
    model = model_on_meta(recipe, config, parallel)
    if recipe.train.compile:
        apply_compile(model)
    if recipe.train.activation_checkpointing:
        apply_activation_checkpointing(model)
    settings = recipe.parallel
    data_parallel = DataParallel(model, parallel, settings.data_parallel, settings.accumulate_unsharded, device_type)
    materialise(model)
    optimizer = ClippedAdamW(
        model,
        parallel,
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.eps,
        weight_decay=recipe.optimizer.weight_decay,
        clip_grad_norm=recipe.optimizer.clip_grad_norm,
    )
    return Assembled(model, data_parallel, optimizer)


class Trainer:
    """A model, its optimizer and how far they are. `step` counts optimizer steps done."""

    def __init__(self, plan: Plan, device: torch.device, weights: Weights | None, parallel: Parallel) -> None:
        """Builds the model and its optimizer.

        Args:
            plan: what to do.
            device: where to compute.
            weights: mapped and checked, to start from; what it lacks is random. What trains is float32, and copied.
            parallel: who trains together.
        """
        recipe = plan.recipe
        if device.type == "cpu":
            prepare_cpu()
        if recipe.train.deterministic:
            torch.use_deterministic_algorithms(True)
        # What draws without a generator of its own, and what checkpoints keep of it, is the seed's, too.
        torch.manual_seed(recipe.train.seed)

        def materialise(model: Transformer) -> None:
            model.to_empty(device=device)
            given = set() if weights is None else set(weights.tensors)
            initialise(model, recipe.train.seed, {name for name, _ in model.named_parameters()} - given)
            if weights is not None:
                load_parameters(model, weights)

        self.model, self.data_parallel, self.optimizer = assemble(
            recipe, plan.config, parallel, device.type, materialise
        )
        self.plan, self.device, self.parallel, self.step = plan, device, parallel, 0
        keep_all = not recipe.checkpoint.trainable_only
        # Only ranks that have the tower find out that it cannot be made.
        self.vision_encoder = parallel.raise_together(
            lambda: load_vision_encoder(self.model, weights, device, recipe.train.seed, keep_all)
        )
        self._feeds = (
            None if self.vision_encoder is None else ImageFeeds(self.vision_encoder, recipe, plan.disk_bytes())
        )
        self._batches: Iterator[MicroBatch] | None = None
        # For whoever has to tell that memory ran out.
        self.in_hand: list[int] | None = None
        self.started = False
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch under way
        # Of a model of random weights there is no base to belong to.
        self.base: Base | None = None
        if plan.layouts and parallel.is_main:
            names = recipe.model.pretrained_list()
            self.base = base_of(plan.layouts, plan.config, names, plan.trained_quantised())
        # For a resume.
        self._base_fingerprint = None if self.base is None else self.base.fingerprint

    def learning_rate(self) -> float:
        """The rate of the coming step."""
        recipe = self.plan.recipe
        return learning_rate(
            self.step / self.plan.steps_per_epoch,
            epochs=recipe.train.epochs,
            warmup_epochs=recipe.train.warmup_epochs,
            lr=recipe.optimizer.lr,
            min_lr=recipe.optimizer.min_lr,
        )

    def items(self, step: int) -> np.ndarray:
        """The training items of optimizer step `step`, counted from 0: a function of data, seed and batch size."""
        train = self.plan.recipe.train
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.plan.train), train.seed, epoch, train.shuffle))
        return step_items(self._order[1], within, train.global_batch_size)

    def deal(self, dataset: Dataset, items: np.ndarray) -> tuple[list[list[int]], float]:
        """Deals items to ranks and micro-batches, within the recipe's bounds.

        Returns:
            The items of each of this rank's micro-batches, and how many more tokens the fullest rank has than the mean
            one, as a fraction of that.
        """
        train, ranks = self.plan.recipe.train, self.parallel.data_size
        groups = micro_batches(items, dataset.lengths, train.batch_size, train.micro_batch_tokens, ranks)
        dealt = deal_to_ranks(groups, dataset.lengths, ranks)
        loads = [sum(int(dataset.lengths[item]) for group in own for item in groups[group]) for own in dealt]
        own = [groups[group] for group in dealt[self.parallel.data_rank]]
        return own, max(loads) * ranks / sum(loads) - 1.0

    def _dealt(self) -> Iterator[Dealt]:
        """This rank's micro-batches from the coming step to the last one."""
        for step in range(self.step, self.plan.total_steps):
            groups, _ = self.deal(self.plan.train, self.items(step))
            yield from (Dealt(group, step // self.plan.steps_per_epoch) for group in groups)

    def fed(self, dataset: Dataset, dealt: Iterable[Dealt]) -> Iterator[MicroBatch]:
        """The micro-batches of documents of a data set, with what the model takes of their images."""
        if self._feeds is None:
            return (build(dataset, group) for group, _ in dealt)
        return self._feeds.fed(dataset, dealt, is_training=dataset is self.plan.train)

    def close(self) -> None:
        """Ends the processes that decode images."""
        if self._feeds is not None:
            self._feeds.close()

    def _told(self, groups: Sequence[list[int]], batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for group, batch in zip(groups, batches, strict=True):
            self.in_hand = group
            yield batch

    def _without_images_opened(self, items: list[int]) -> MicroBatch:
        """A micro-batch whose images are black: a frozen tower takes less than a step, and its time is worth saving."""
        if self.vision_encoder is None:
            return build(self.plan.train, items)
        vision = self.vision_encoder.vision
        batch = build_seen(self.plan.train, items, vision.positions)
        shape = (len(batch.images), *vision.input_shape)
        return replace(batch, inputs=torch.zeros(shape, dtype=self.vision_encoder.dtype, device=self.device))

    def rehearse(self) -> None:
        """Computes the largest micro-batch of the run, forward and backward, with all that lies in memory beside it.

        If memory is too short it runs out now, and not when that batch comes. Nothing that a run depends on changes:
        the gradients are dropped, and the moments, which would be made in the first step, are zero.
        """
        plan, train = self.plan, self.plan.recipe.train
        state = rng_state(self.device)
        self.optimizer.make_state()
        self.in_hand = self.parallel.run_on_rank_zero(lambda: largest_micro_batch(plan, self.parallel.data_size))
        batch = self._without_images_opened(self.in_hand)
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
        self, before_update: Callable[[], None] = lambda: None, facts: Sequence[float] = ()
    ) -> tuple[StepResult, dict[str, Any]]:
        """One optimizer step.

        Args:
            before_update: called before anything that a checkpoint holds changes.
            facts: numbers to sum over all ranks along with the results.

        Returns:
            Its results on the device, and what the host knows of it.
        """
        items = self.items(self.step)
        self.started = True
        data = self.plan.train
        label_tokens = int(data.label_counts[items].sum(dtype=np.int64))
        lr = self.learning_rate()
        groups, imbalance = self.deal(data, items)
        if self._batches is None:
            # Of all steps to come: the images of the next ones are decoded while this one is computed.
            self._batches = self.fed(data, self._dealt())
        result = train_step(
            self.model,
            self.optimizer,
            self.data_parallel,
            self._told(groups, islice(self._batches, len(groups))),
            label_tokens,
            lr,
            self.device,
            facts,
            before_update,
        )
        self.step += 1
        told = {
            "step": self.step,
            "epoch": self.step / self.plan.steps_per_epoch,
            "lr": lr,
            "label_tokens": label_tokens,
            "tokens": int(data.lengths[items].sum(dtype=np.int64)),
        }
        if self.parallel.data_size > 1:
            told["imbalance"] = imbalance
        return result, told

    def validate(self) -> float:
        """The loss per label token over the held-out items."""
        held_out = self.plan.validation
        assert held_out is not None
        groups, _ = self.deal(held_out, np.arange(len(held_out)))
        batches = self.fed(held_out, (Dealt(group, 0) for group in groups))
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
        if self.base is not None and plan.recipe.checkpoint.trainable_only and has_frozen(plan.recipe):
            files[BASE_FILE] = self.base.to_json()
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
        """Takes over everything a checkpoint's state holds but the masters; `step` is where its progress stands."""
        self.optimizer.load_state(state.read)
        restore_rng(state.rng(), self.device)
        self.step, self._batches = step, None
        if self.base is None:  # it is not there any more, or never was
            self._base_fingerprint = read_progress(state.folder.parent).get("base")


def _rows(parameter: Tensor, value: Tensor) -> Rows:
    """A value as rows of a tensor that is shaped and dealt out like a parameter, or a number that all ranks have."""
    if not value.dim():
        return Rows(value, 0, (), shared=True)
    return Rows(value, local_part(parameter).rows.start, tuple(parameter.shape), shared=not is_sharded(parameter))


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
