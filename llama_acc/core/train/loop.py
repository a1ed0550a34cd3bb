"""The training loop: every example of every epoch, logged, saved, resumable to the bit."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_acc.core.checkpoint.files import check_manifest
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.save import publish, read_progress, read_state, write_state, write_weights
from llama_acc.core.checkpoint.shards import Weights, fill, read_weights
from llama_acc.core.data.batches import MicroBatch, build, epoch_order, micro_batches, step_items
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.device import peak_memory_gib, prepare_cpu
from llama_acc.core.errors import RunError, UserError, listed
from llama_acc.core.model.transformer import build_on_meta, initialise
from llama_acc.core.train.events import Events
from llama_acc.core.train.folder import RunFolder
from llama_acc.core.train.interrupt import Interrupted, StopRequest
from llama_acc.core.train.metrics import MetricsLog
from llama_acc.core.train.optimizer import ClippedAdamW
from llama_acc.core.train.plan import Plan
from llama_acc.core.train.schedule import learning_rate
from llama_acc.core.train.step import StepResult, apply_activation_checkpointing, apply_compile, evaluate, train_step

_FORMAT_VERSION = 1


class Trainer:
    """A model, its optimizer and how far they are. `step` counts optimizer steps done."""

    def __init__(self, plan: Plan, device: torch.device, weights: Weights | None) -> None:
        """Builds the model and its optimizer.

        Args:
            plan: what to do.
            device: where to compute.
            weights: mapped and checked, to start from; None = random ones. What trains is float32, and copied.
        """
        train = plan.recipe.train
        if device.type == "cpu":
            prepare_cpu()
        if train.deterministic:
            torch.use_deterministic_algorithms(True)
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        model = build_on_meta(plan.config, dtype)
        if weights is None:
            model.to_empty(device=device)
            initialise(model, train.seed)
        else:
            fill(model, weights, device, torch.float32, copy=True)
        if train.compile:
            apply_compile(model)
        if train.activation_checkpointing:
            apply_activation_checkpointing(model)
        optimizer = plan.recipe.optimizer
        self.plan, self.device, self.model, self.step = plan, device, model, 0
        self.optimizer = ClippedAdamW(
            model,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            clip_grad_norm=optimizer.clip_grad_norm,
        )

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
        order = epoch_order(len(self.plan.train), train.seed, epoch, train.shuffle)
        return step_items(order, within, train.global_batch_size)

    def micro_batches(self, dataset: Dataset, items: np.ndarray) -> Iterator[MicroBatch]:
        """The items, dealt to micro-batches within the recipe's bounds."""
        train = self.plan.recipe.train
        for group in micro_batches(items, dataset.lengths, train.batch_size, train.micro_batch_tokens):
            yield build(dataset, group)

    def advance(self) -> tuple[StepResult, dict[str, Any]]:
        """One optimizer step. Returns its results on the device, and what the host knows of it."""
        items = self.items(self.step)
        data = self.plan.train
        label_tokens = int(data.label_counts[items].sum())
        lr = self.learning_rate()
        result = train_step(self.model, self.optimizer, self.micro_batches(data, items), label_tokens, lr, self.device)
        self.step += 1
        facts = {
            "step": self.step,
            "epoch": self.step / self.plan.steps_per_epoch,
            "lr": lr,
            "label_tokens": label_tokens,
            "tokens": int(data.lengths[items].sum()),
        }
        return result, facts

    def validate(self) -> float:
        """The loss per label token over the held-out items."""
        held_out = self.plan.validation
        assert held_out is not None
        batches = self.micro_batches(held_out, np.arange(len(held_out)))
        return evaluate(self.model, batches, int(held_out.label_counts.sum()), self.device)

    def save(self, folder: Path) -> None:
        """Writes a whole checkpoint into an existing, empty folder."""
        write_weights(self.model, folder, self.plan.save_dtype)
        for file in self.plan.tokenizer.files():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "recipe.yaml").write_text(self.plan.recipe.to_yaml(), encoding="utf-8")
        self.plan.train.template.save(folder / "template.json")
        progress = {
            "format_version": _FORMAT_VERSION,
            "step": self.step,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "data": self.plan.train.fingerprint(),
        }
        write_state(folder, self._state_tensors(), progress)

    def _state_tensors(self) -> dict[str, Tensor]:
        tensors = self.optimizer.state_tensors()
        if self.plan.save_dtype != torch.float32:
            tensors |= {f"master.{name}": parameter for name, parameter in self.model.named_parameters()}
        return tensors | {"rng.cpu": torch.get_rng_state()}

    def load(self, checkpoint: Path, step: int) -> None:
        """Takes over everything a checkpoint's state holds but the masters; `step` is where its progress stands."""
        state = read_state(checkpoint)
        self.optimizer.load_state_tensors(state)
        torch.set_rng_state(state["rng.cpu"])
        self.step = step


def saved_step(checkpoint: Path, plan: Plan) -> int:
    """How many steps a checkpoint has done of this plan; its state's bytes are checked.

    Raises:
        UserError: the state is damaged, of another version or other data.
    """
    progress = read_progress(checkpoint)
    if progress["format_version"] > _FORMAT_VERSION:
        raise UserError(f"{checkpoint}/state was written by a newer version", "update llama-acc")
    if progress["data"] != plan.train.fingerprint():
        raise UserError(f"the data is not what {checkpoint} was trained on", "resume with the same files")
    step: int = progress["step"]
    return step


def saved_masters(checkpoint: Path) -> Weights:
    """A checkpoint's weights in float32, exactly as they were trained: the masters, or the saved float32 weights.

    Raises:
        UserError: the weights were changed since.
    """
    masters = {name: tensor for name, tensor in read_state(checkpoint).items() if name.startswith("master.")}
    if masters:
        return Weights.of({name.removeprefix("master."): tensor for name, tensor in masters.items()})
    check_manifest(checkpoint, contents=True, under="consolidated.")
    return read_weights([inspect(checkpoint)])


class Loop:
    """Runs a trainer to the plan's end, and tells of it."""

    def __init__(self, trainer: Trainer, folder: RunFolder, log: MetricsLog, events: Events, stop: StopRequest) -> None:
        self.trainer, self.folder, self.log, self.events, self.stop = trainer, folder, log, events, stop
        self._pending: tuple[StepResult, dict[str, Any]] | None = None
        self._since = time.perf_counter()

    def run(self) -> None:
        """Trains until the plan is done.

        Raises:
            RunError: a loss that is not finite.
            Interrupted: a signal came in; a checkpoint was saved.
        """
        trainer, plan = self.trainer, self.trainer.plan
        self._since = time.perf_counter()
        while trainer.step < plan.total_steps:
            current = trainer.advance()
            # A device works on this step while the host looks at the one before; a CPU has finished it by now.
            self._settle()
            self._pending = current
            if trainer.device.type == "cpu":
                self._settle()
            due_save = plan.saves_at(trainer.step) or self.stop.received is not None
            due_validation = plan.validates_at(trainer.step)
            if not (due_save or due_validation):
                continue
            self._settle()
            if due_validation:
                self._validate()
            if due_save:
                self._save()
            if self.stop.received is not None and trainer.step < plan.total_steps:
                raise Interrupted(self.stop.received)
            self._since = time.perf_counter()

    def _settle(self) -> None:
        """Reads the pending step's results, logs them, and refuses to go on from a step that is not finite."""
        if self._pending is None:
            return
        result, facts = self._pending
        self._pending = None
        loss, grad_norm = result.loss.item(), result.grad_norm.item()
        now = time.perf_counter()
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            raise self._not_finite(facts["step"], loss, grad_norm)
        metrics = {
            "step": facts["step"],
            "epoch": facts["epoch"],
            "loss": loss,
            "lr": facts["lr"],
            "grad_norm": grad_norm,
            "label_tokens": facts["label_tokens"],
            "tokens": facts["tokens"],
            "tokens_per_second": facts["tokens"] / max(now - self._since, 1e-9),
            "peak_memory_gib": peak_memory_gib(self.trainer.device),
        }
        self._since = now
        self.log.write(metrics)
        self.events.step(metrics, self.trainer.plan)

    def _not_finite(self, step: int, loss: float, grad_norm: float) -> RunError:
        trainer = self.trainer
        items = [trainer.plan.train.origin(int(item)) for item in trainer.items(step - 1)]
        return RunError(
            f"the loss of step {step} is {loss}, its gradient norm {grad_norm}: the weights did not take this step, "
            f"the newest checkpoint in {self.folder.path} is unharmed. The step's items:\n{listed(items, most=16)}",
            "look at these items; try a lower optimizer.lr, a longer train.warmup_epochs, or train.precision=fp32",
        )

    def _validate(self) -> None:
        metrics = {"step": self.trainer.step, "validation_loss": self.trainer.validate()}
        self.log.write(metrics)
        self.events.validation(metrics)

    def _save(self) -> None:
        plan = self.trainer.plan
        folder = self.folder.path / plan.checkpoint_name(self.trainer.step)
        publish(folder, self.trainer.save, plan.recipe.checkpoint.keep)
        self.events.saved(folder)
