"""A run as it shows on a console: in words what it will do, which is the head of report.md too, then how far it is."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from llama_acc.cli import console
from llama_acc.core.input_files import home
from llama_acc.core.text import count_text, escape_control_chars, size_text
from llama_acc.core.train.runs import Callback

if TYPE_CHECKING:
    from llama_acc.core.train.plan import Plan

_MOST_IDLE = 0.05  # part of a run's steps that may have rate 0 without a warning


class _TimeLeft(ProgressColumn):
    """The time until a task's `ends`, which goes down between two steps."""

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        return Text("" if ends is None else f"{console.duration(max(0.0, ends - time.monotonic()))} left")


class RunConsole(Callback):
    """Watches a run: a bar on a terminal, a line every few seconds otherwise."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._first: float | None = None  # when the first step was done
        self._tokens = 0  # of the steps behind it

    def __enter__(self) -> "RunConsole":
        return self

    def __exit__(self, *exc_info: object) -> None:
        console.working(None)
        if self._progress is not None:
            self._progress.stop()

    def note(self, text: str) -> None:
        """A line on the side."""
        console.note(text)

    def fetch(self, address: str) -> list[Path]:
        """With bars, as `llama-acc download` shows it."""
        from llama_acc.cli.download import fetch_shown

        return fetch_shown(address)

    def progress(self, label: str, done: int = 0, total: int = 0) -> None:
        """What is being done."""
        text = f"{label}: {done:,} done, {done / total:.0%}" if total else label
        if self._progress is not None:
            self._progress.update(self._task, facts=text)
        else:
            console.working(text, label)

    def plan(self, plan: "Plan") -> list[tuple[str, str]]:
        """What will be done."""
        console.working(None)
        lines = describe_plan(plan)
        console.pairs(lines)
        self._last_line = 0.0
        if console.shows_bars():
            facts = TextColumn("{task.fields[facts]}", markup=False)
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), facts, _TimeLeft())
            self._progress = Progress(*columns, console=console.err)
            self._task = self._progress.add_task("train", total=plan.total_steps, facts="", ends=None)
            self._progress.start()
        return lines

    def step(self, metrics: dict[str, Any], plan: "Plan") -> None:
        """Moves the bar, or prints a line now and then; always at the last step."""
        console.working(None)
        facts = (
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"{metrics['peak_memory_gib']:.2f} GiB"
        )
        now, left, is_last = time.monotonic(), self._left(metrics, plan), metrics["step"] == plan.total_steps
        if self._progress is not None:
            ends = None if left is None else now + left
            self._progress.update(self._task, completed=metrics["step"], facts=facts, ends=ends)
        elif is_last or now - self._last_line >= console.SECONDS_BETWEEN_LINES:
            self._last_line = now
            ending = "" if left is None or is_last else f"  {console.duration(left)} left"
            console.err.print(f"step {metrics['step']}/{plan.total_steps}  {facts}{ending}", markup=False)

    def _left(self, metrics: dict[str, Any], plan: "Plan") -> float | None:
        """Seconds to the end, from the second step on.

        Steps differ in length: the tokens since the first step have taken so long, and so will those that are left.
        """
        if self._first is None:
            self._first = time.monotonic()
            return None
        self._tokens += metrics["tokens"]
        speed = self._tokens / max(time.monotonic() - self._first, 1e-9)
        return (plan.total_steps - metrics["step"]) * plan.train.tokens / plan.steps_per_epoch / speed

    def validation(self, metrics: dict[str, Any]) -> None:
        """The loss on held-out items."""
        console.err.print(f"step {metrics['step']}: validation loss {metrics['validation_loss']:.4f}", markup=False)

    def samples(self, step: int, answers: Mapping[str, str]) -> None:
        """A line for each answer; samples.jsonl has all of them."""
        for prompt, answer in answers.items():
            lines = (" ".join(text.split()) for text in (prompt, answer))
            shown = " -> ".join(line if len(line) <= 60 else f"{line[:57]}..." for line in lines)
            console.err.print(f"step {step}: {shown}", markup=False)

    def saved(self, checkpoint: Path) -> None:
        """Where a checkpoint is."""
        console.err.print(f"saved {checkpoint}", markup=False)


def describe_plan(plan: "Plan") -> list[tuple[str, str]]:
    """What a run will do: pairs of a subject and a text."""
    from llama_acc.core.checkpoint.streaming import block_sizes
    from llama_acc.core.distributed.groups import Parallel
    from llama_acc.core.model.config import size_name
    from llama_acc.core.model.nf4 import nbytes
    from llama_acc.core.model.transformer import parameter_count, quantizable, shapes_of
    from llama_acc.core.tokenizer import tokenizer_notes
    from llama_acc.core.train.trainer import model_for_training

    recipe, config, checkpoint = plan.recipe, plan.config, plan.saving
    optimizer, train, skip = recipe.optimizer, recipe.train, plan.settings.quantize_skip
    weights = f"random (seed {plan.seed})"
    if plan.layouts:
        weights = f"from {', '.join(str(layout.folder) for layout in plan.layouts)}"
    elif names := recipe.model.pretrained_list():
        weights = f"from {', '.join(names)} (not found)"
    grouped = f" ({config.kv_heads} for keys and values)" if config.kv_heads != config.n_heads else ""
    shape = f"{count_text(config.n_layers, 'layer')}, width {config.dim}, {count_text(config.n_heads, 'head')}{grouped}"
    if known := size_name(config) or config.family.removeprefix("llama"):
        shape = f"{known}, {shape}"
    method = recipe.tuning.method
    lines = [
        ("recipe", plan.recipe.name),
        ("model", f"{shape}, vocabulary {config.vocab_size}"),
        *(("tokenizer", note) for note in tokenizer_notes(plan.tokenizer, config.vocab_size)),
        ("weights", weights),
        ("parameters", f"{parameter_count(config):,}, of which {plan.trained_count():,} train (method {method})"),
    ]
    if skip is not None:
        shapes = [shapes_of(config)[name] for name in quantizable(config, skip)]
        number, size = sum(map(math.prod, shapes)), sum(nbytes(*shape) for shape in shapes)
        which = "wq wk wv wo w1 w2 w3 of every block, output" + (f", but not {', '.join(skip)}" if skip else "")
        lines.append(("quantized", f"{number:,} of them in NF4, {size_text(size)}: {which}; nothing else"))
    if plan.settings.stream_base:
        sizes = block_sizes(model_for_training(config, plan.settings, Parallel()))
        text = f"{size_text(sum(sizes))} of the blocks stay in their files, {size_text(2 * max(sizes))} are in memory"
        lines.append(("streamed", f"{text} at a time: two blocks"))
    if config.vision is not None:
        lines.append(("vision", _vision_text(plan)))
    lines += _data_lines(plan)
    steps = f"{plan.total_steps:,} of {count_text(train.global_batch_size, 'example')}; {plan.steps_per_epoch:,} in "
    precision: str = train.precision
    if plan.settings.frozen_dtype is not None:
        precision += ", computed in float32: this CPU has no instructions for bf16"
    lines.append(("steps", f"{steps}an epoch, {count_text(train.epochs, 'epoch')}, {precision}"))
    if plan.chosen:
        lines.append(("micro-batches", plan.chosen))
    idle = plan.idle_steps()
    if idle > _MOST_IDLE * plan.total_steps:
        text = f"{idle} of the {count_text(plan.total_steps, 'step')} ({idle / plan.total_steps:.0%}) has rate 0 and "
        text += "changes nothing, as a warm-up begins at 0: set train.warmup_epochs=0, or take more steps with a "
        lines.append(("warning", f"{text}smaller train.global_batch_size"))
    warm_up = f"after a warm-up of {count_text(train.warmup_epochs, 'epoch')}, " if train.warmup_epochs else ""
    rate = f"{optimizer.lr:g}, {warm_up}then along a cosine to {optimizer.min_lr:g}; weight decay "
    rate += f"{optimizer.weight_decay:g}, gradients clipped at norm {optimizer.clip_grad_norm:g}"
    saves = plan.save_count()
    kept = f"{saves} of {size_text(plan.checkpoint_bytes())}, the newest {min(saves, checkpoint.keep or saves)} kept"
    if checkpoint.every_steps >= plan.steps_per_epoch:
        epoch = count_text(plan.steps_per_epoch, "step")
        kept += f"; checkpoint.every_steps={checkpoint.every_steps} saves none, as an epoch has {epoch}"
    return [*lines, ("learning rate", rate), ("checkpoints", kept)]


def _data_lines(plan: "Plan") -> list[tuple[str, str]]:
    from llama_acc.core.data.findings import KINDS
    from llama_acc.core.data.keys import unused_text
    from llama_acc.core.data.templates import answer_ends

    data, report = plan.train, plan.report
    paths = [str(file.path) for file in data.files]
    files = ", ".join(paths[:3]) + (f" and {len(paths) - 3:,} more files" if len(paths) > 3 else "")
    counts = ((report["truncated"], "cut"), (report["dropped"], "dropped"), (report["skipped"], "skipped"))
    less = "".join(f", {number:,} {what}" for number, what in counts if number)
    size = f"{count_text(len(data), 'item')}, {count_text(data.tokens, 'token')}, {data.label_tokens:,} of them trained"
    if plan.items_per_epoch != len(data):
        less += f"; an epoch uses {plan.items_per_epoch:,}"
    template = ", ".join(dict.fromkeys(file.template.shown for file in data.files))
    if split := sum(file.split for file in data.files):
        dialogues = count_text(split, "dialogue")
        template += f"; {dialogues} in one example for each reply, as it writes earlier turns otherwise"
    lines = [("data", f"{size}{less}; from {files}"), ("template", template)]
    stops = map(escape_control_chars, answer_ends(data.template, plan.tokenizer))
    lines.append(("answers end", f"at {', '.join(stops)}"))
    if texts := [file for file in data.files if file.documents]:
        items, count = count_text(sum(file.items for file in texts), "item"), sum(file.documents for file in texts)
        most = f"at most {plan.recipe.data.max_tokens} tokens"
        lines.append(("plain text", f"{items} are pieces, of {most}, of {count_text(count, 'document')}"))
    unused: Counter[str] = Counter()  # of all sources of a file the same
    for keys in {file["path"]: file["unused_keys"] for file in report["files"]}.values():
        unused.update(keys)
    if unused:
        lines.append(("not used", unused_text(unused)))
    if warnings := [f"{KINDS[kind].title}: {number:,}" for kind, number in report["warnings"].items()]:
        lines.append(("warnings", f"{', '.join(warnings)}; see data.json, or `llama-acc convert-data check FILE`"))
    if plan.validation is not None:
        ends = f"; {count_text(plan.patience, 'validation')} without a better loss end the run" if plan.patience else ""
        lines.append(("validation", count_text(len(plan.validation), "item") + ends))
    return lines


def _vision_text(plan: "Plan") -> str:
    from llama_acc.core.checkpoint.save import free_bytes
    from llama_acc.core.model.vision import tower_shapes

    vision = plan.config.vision
    assert vision is not None
    tower = sum(math.prod(shape) for shape in tower_shapes(vision).values())
    images = int(plan.train.image_counts.sum())
    text = f"encoder {vision.encoder}, stage {plan.config.vision_training.stage}; "
    text += f"{tower:,} of the parameters are its tower, which is frozen; " if tower else "it trains; "
    text += f"{count_text(images, 'image')} of {count_text(vision.positions, 'position')} each, {plan.images.transform}"
    if plan.recipe.vision.cache_features:
        size = images * math.prod(vision.input_shape) * plan.settings.dtype.itemsize
        text += f"; features are kept, up to {size_text(size)} ({size_text(free_bytes(home()))} are free)"
    return text
