"""What a run will do: its model, its data, its steps, and when it saves. `planning.make_plan` finds it out."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama_acc.core.checkpoint.adapter import TrainedQuantised
from llama_acc.core.checkpoint.layout import Layout
from llama_acc.core.checkpoint.save import DTYPES, free_bytes, needed_bytes
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.findings import KINDS as FINDINGS
from llama_acc.core.data.keys import unused_text
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.home import home
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.nf4 import nbytes
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.recipe import Recipe
from llama_acc.core.tokenizer import Tokenizer, tokenizer_notes
from llama_acc.core.train.plan_model import model_on_meta
from llama_acc.core.units import count_text, size_text

MOST_IDLE = 0.05
"""The part of a run's steps that may have rate 0 without a word."""


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

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of activations and matrix products."""
        return DTYPES[self.recipe.train.precision]

    @property
    def save_dtype(self) -> torch.dtype:
        """Type of the saved weights."""
        name = self.recipe.checkpoint.dtype
        return DTYPES[self.recipe.train.precision if name == "auto" else name]

    def parameter_count(self) -> int:
        """Number of parameters."""
        return self.config.parameter_count()

    def model_on_meta(self, parallel: Parallel) -> Transformer:
        """A rank's part of the model, without storage: what trains is float32, and what does not may be quantised."""
        return model_on_meta(self.recipe, self.config, parallel)

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and full shapes of the parameters that train."""
        trains = self.config.trains
        return {name: shape for name, shape in self.config.parameter_shapes().items() if trains(name)}

    def trained_count(self) -> int:
        """Number of parameters that train."""
        return sum(math.prod(shape) for shape in self.trained_shapes().values())

    def quantised(self) -> tuple[int, int]:
        """Number of parameters that are quantised, and the bytes they take."""
        tuning, shapes = self.recipe.tuning, self.config.parameter_shapes()
        names = self.config.quantisable(tuning.quantize_skip) if tuning.quantize == "nf4" else []
        return sum(math.prod(shapes[name]) for name in names), sum(nbytes(*shapes[name]) for name in names)

    def trained_quantised(self) -> TrainedQuantised | None:
        """How the base is quantised while training on it; None = it is not."""
        tuning = self.recipe.tuning
        if tuning.quantize == "none":
            return None
        return TrainedQuantised(tuning.quantize, tuple(tuning.quantize_skip))

    def saves(self, name: str) -> bool:
        """Whether a parameter's weights are saved."""
        return not self.recipe.checkpoint.trainable_only or self.config.trains(name)

    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint on disk."""
        trained = self.trained_count()
        saved = trained if self.recipe.checkpoint.trainable_only else self.parameter_count()
        copied = sum(map(len, self.tokenizer.files().values()))
        return needed_bytes(saved, trained, len(self.config.parameter_shapes()), self.save_dtype) + copied

    def disk_bytes(self, there: Sequence[int] = (), done: int = 0) -> int:
        """What the run's checkpoints take of the disk at most, beside those that are there.

        Args:
            there: the sizes of the checkpoints that are there, oldest first; the next one will be as large as the last.
            done: steps that are done.
        """
        keep, new = self.recipe.checkpoint.keep, there[-1] if there else self.checkpoint_bytes()
        saves = self.save_count(done)
        if not keep:
            return saves * new
        on_disk, taken, most = deque(there), 0, 0
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
        if step >= self.total_steps:
            return True
        epoch, within = divmod(step, self.steps_per_epoch)
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
        if done >= self.total_steps:
            return 0
        return self._saves_up_to(self.total_steps - 1) - self._saves_up_to(done) + 1

    def _saves_up_to(self, step: int) -> int:
        """How many checkpoints are written up to a step that is not the last one."""
        checkpoint = self.recipe.checkpoint
        epochs, rest = divmod(step, self.steps_per_epoch)
        count = epochs // checkpoint.every_epochs if checkpoint.every_epochs else 0
        if checkpoint.every_steps:
            count += epochs * ((self.steps_per_epoch - 1) // checkpoint.every_steps) + rest // checkpoint.every_steps
        return count

    def idle_steps(self) -> int:
        """How many steps have rate 0, and change nothing. A warm-up begins with one; see `learning_rate`."""
        recipe = self.recipe
        return (
            1 if recipe.optimizer.lr and recipe.train.warmup_epochs else 0 if recipe.optimizer.lr else self.total_steps
        )

    def lines(self) -> list[tuple[str, str]]:
        """What will be done, as pairs of a subject and a text."""
        recipe, config, data = self.recipe, self.config, self.train
        count = self.parameter_count()
        start = ", ".join(str(layout.folder) for layout in self.layouts)
        if not start and recipe.model.pretrained_list():
            start = f"{', '.join(recipe.model.pretrained_list())}, which is not there"
        grouped = f" ({config.kv_heads} for keys and values)" if config.kv_heads != config.n_heads else ""
        saves = self.save_count()
        kept = min(saves, recipe.checkpoint.keep) if recipe.checkpoint.keep else saves
        every, never = recipe.checkpoint.every_steps, ""
        if every >= self.steps_per_epoch:
            epoch = count_text(self.steps_per_epoch, "step")
            never = f"; checkpoint.every_steps={every} saves none, as an epoch has {epoch}"
        lines = [
            ("recipe", recipe.name),
            (
                "model",
                f"{count_text(config.n_layers, 'layer')}, width {config.dim}, "
                f"{count_text(config.n_heads, 'head')}{grouped}, vocabulary {config.vocab_size}",
            ),
            *(("tokenizer", note) for note in tokenizer_notes(self.tokenizer, config.vocab_size)),
            ("weights", f"from {start}" if start else f"random (seed {recipe.train.seed})"),
            ("parameters", f"{count:,}, of which {self.trained_count():,} train (method {recipe.tuning.method})"),
            *self._quantised_line(),
            *self._vision_line(),
            (
                "data",
                f"{count_text(len(data), 'item')}, {count_text(data.tokens, 'token')}, "
                f"{data.label_tokens:,} of them trained"
                f"{_counted(self.report['truncated'], 'cut')}{_counted(self.report['dropped'], 'dropped')}"
                f"{_counted(self.report['skipped'], 'skipped')}; from {self._data_files()}",
            ),
            *self._unused_line(),
            *self._warnings_line(),
        ]
        if self.validation is not None:
            lines.append(("validation", count_text(len(self.validation), "item")))
        optimizer, train = recipe.optimizer, recipe.train
        warm_up = f"after a warm-up of {count_text(train.warmup_epochs, 'epoch')}, " if train.warmup_epochs else ""
        lines += [
            (
                "steps",
                f"{self.total_steps:,} of {count_text(recipe.train.global_batch_size, 'example')}; "
                f"{self.steps_per_epoch:,} in an epoch, {count_text(recipe.train.epochs, 'epoch')}, "
                f"{recipe.train.precision}",
            ),
            *self._idle_line(),
            (
                "learning rate",
                f"{optimizer.lr:g}, {warm_up}then along a cosine to {optimizer.min_lr:g}; "
                f"weight decay {optimizer.weight_decay:g}, gradients clipped at norm {optimizer.clip_grad_norm:g}",
            ),
            ("checkpoints", f"{saves} of {size_text(self.checkpoint_bytes())}, the newest {kept} kept{never}"),
        ]
        return lines

    def _idle_line(self) -> list[tuple[str, str]]:
        """Steps of rate 0, where they are a part of the run that counts."""
        idle = self.idle_steps()
        if idle <= MOST_IDLE * self.total_steps:
            return []
        return [
            (
                "warning",
                f"{idle} of the {count_text(self.total_steps, 'step')} ({idle / self.total_steps:.0%}) has rate 0 and "
                "changes nothing, as a warm-up begins at 0: set train.warmup_epochs=0, or take more steps with a "
                "smaller train.global_batch_size",
            )
        ]

    def _data_files(self) -> str:
        """Where the data comes from."""
        paths = [str(file.path) for file in self.train.files]
        return ", ".join(paths[:3]) + (f" and {len(paths) - 3:,} more files" if len(paths) > 3 else "")

    def _warnings_line(self) -> list[tuple[str, str]]:
        found = [f"{FINDINGS[kind].title}: {count:,}" for kind, count in self.report["warnings"].items()]
        return [("warnings", f"{', '.join(found)}; see data.json, or llama-acc convert-data check")] if found else []

    def _unused_line(self) -> list[tuple[str, str]]:
        """Keys of the data that are not used, of all files together."""
        unused: Counter[str] = Counter()
        for keys in {file["path"]: file["unused_keys"] for file in self.report["files"]}.values():
            unused.update(keys)
        return [("not used", unused_text(unused))] if unused else []

    def _vision_line(self) -> list[tuple[str, str]]:
        vision, recipe = self.config.vision, self.recipe
        if vision is None:
            return []
        tower = sum(math.prod(shape) for shape in vision.tower_shapes().values())
        images = int(self.train.image_counts.sum())
        text = f"encoder {vision.encoder}, stage {self.config.vision_training.stage}; "
        text += f"{tower:,} of the parameters are its tower, which is frozen; " if tower else "it trains; "
        text += f"{count_text(images, 'image')} of {count_text(vision.positions, 'position')} each, "
        text += recipe.data.images.transform
        if recipe.vision.cache_features:
            size = images * math.prod(vision.input_shape) * self.compute_dtype.itemsize
            text += f"; features are kept, up to {size_text(size)} ({size_text(free_bytes(home()))} are free)"
        return [("vision", text)]

    def _quantised_line(self) -> list[tuple[str, str]]:
        if self.recipe.tuning.quantize == "none":
            return []
        count, size = self.quantised()
        skip = self.recipe.tuning.quantize_skip
        which = "wq wk wv wo w1 w2 w3 of every block, output" + (f", but not {', '.join(skip)}" if skip else "")
        return [("quantised", f"{count:,} of them in NF4, {size_text(size)}: {which}; nothing else")]


def _counted(count: int, what: str) -> str:
    return f", {count:,} {what}" if count else ""
