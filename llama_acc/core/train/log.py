"""The log of a run: metrics.jsonl, from which TensorBoard's curves, loss.png and report.md are made."""

import io
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from llama_acc.core.atomic import remove, write_text_whole, write_whole
from llama_acc.core.checkpoint.save import free_bytes
from llama_acc.core.data.findings import KINDS as FINDINGS
from llama_acc.core.data.items import unused_text
from llama_acc.core.input_files import home
from llama_acc.core.model.transformer import parameter_count
from llama_acc.core.model.vision import tower_shapes
from llama_acc.core.text import count_text, size_text
from llama_acc.core.tokenizer import tokenizer_notes
from llama_acc.core.train.plan import Plan

Metrics = dict[str, Any]
_MOST_IDLE = 0.05  # part of a run's steps that may have rate 0 without a warning
_OF_A_STEP = ("loss", "lr", "tokens", "tokens_per_second", "peak_memory_gib")


class MetricsLog:
    """Appends to metrics.jsonl and mirrors it to TensorBoard. After a resume both continue from `step`.

    Lines that cannot be read are left out, and the file they are in is kept beside the new one.
    """

    def __init__(self, run: Path, step: int, note: Callable[[str], None]) -> None:
        """Args:
        run: the run's folder.
        step: how many steps are done; later lines go, and at 0 all.
        note: receives a line where something was not as it should be.
        """
        self.path = run / "metrics.jsonl"
        log = read_metrics(self.path)
        if log.damaged or (os.path.lexists(self.path) and not self.path.is_file()):
            aside = _unused(run / "metrics.damaged.jsonl")
            self.path.rename(aside)
            note(f"{self.path} {_complaint(log.damaged)}; the unchanged file is {aside}")
        kept = [line for line in log.lines if 0 < step >= line["step"]]
        write_text_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._curves = Curves(run / "tensorboard", note)
        for line in kept:
            self._curves.add(line)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Metrics) -> None:
        """Adds one line; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._curves.add(line)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._curves.close()
        self._file.close()


def _unused(path: Path) -> Path:
    """The path, with a number where there is something already."""
    tries = (path.with_stem(f"{path.stem}-{number}") for number in range(2, 10_000))
    return path if not os.path.lexists(path) else next(other for other in tries if not os.path.lexists(other))


class Curves:
    """TensorBoard's file of what is in metrics.jsonl, from which it can be made again: where it cannot be written, a
    run goes on without it.

    An event file is a TFRecord of Event messages. It is written here and not by `SummaryWriter`, whose thread prints
    tracebacks and keeps what it could not write.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self._folder, self._note, self._records = folder, note, None
        try:
            self._records = self._begin()
        except OSError as error:
            self._give_up(error)

    def _begin(self) -> Any:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._folder.is_symlink() or not self._folder.is_dir():
            remove(self._folder)
            self._folder.mkdir()
        for old in self._folder.glob("events.*"):
            remove(old)
        name = f"events.out.tfevents.{time.time():.0f}.{os.uname().nodename}.{os.getpid()}"
        records = RecordWriter((self._folder / name).open("xb"))
        records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        return records

    def add(self, line: Metrics) -> None:
        """Adds a line of metrics.jsonl."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._records is None:
            return
        values = [
            Summary.Value(tag=key, simple_value=value) for key, value in line.items() if key not in ("step", "epoch")
        ]
        event = Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values))
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._note(f"TensorBoard's curves end here ({error.strerror}); metrics.jsonl has all of them: {self._folder}")

    def close(self) -> None:
        """Ends the file."""
        records, self._records = self._records, None
        if records is not None:
            try:
                records.close()
            except OSError as error:  # what was not written before
                self._give_up(error)


class Log(NamedTuple):
    """What is in a metrics.jsonl.

    Attributes:
        lines: those that can be read.
        damaged: the numbers of the others, from 1; not of a last one that was cut short by a kill.
    """

    lines: list[Metrics]
    damaged: list[int]


def _complaint(damaged: list[int]) -> str:
    if not damaged:
        return "is not a file"
    shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
    return f"has lines that cannot be read, left out: {len(damaged):,} ({shown})"


def read_metrics(path: Path) -> Log:
    """Reads a metrics.jsonl as far as that can be done; none there is an empty one."""
    if not path.is_file():
        return Log([], [])
    lines, damaged = [], []
    *whole, last = path.read_bytes().split(b"\n")
    for number, text in enumerate([*whole, last], start=1):
        line = _metrics(text)
        if line is not None:
            lines.append(line)
        elif text.strip() and number <= len(whole):
            damaged.append(number)
    return Log(lines, damaged)


def _metrics(text: bytes) -> Metrics | None:
    """A line's numbers, with all that is needed of a step or a validation; None = it is no such line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    if not all(type(value) is float or (type(value) is int and abs(value) < 2**63) for value in line.values()):
        return None
    is_step = all(key in line for key in _OF_A_STEP) and line["tokens_per_second"] > 0
    return line if is_step or "validation_loss" in line else None


def draw_loss(metrics: list[Metrics], path: Path, title: str) -> None:
    """Draws training and validation loss over the optimizer steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    training = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in metrics if "validation_loss" in line]
    figure = Figure(figsize=(8, 4.5), dpi=120)
    # Laying it out by what it holds would take longer than many a run's steps.
    figure.subplots_adjust(left=0.11, right=0.97, top=0.91, bottom=0.12)
    axes = figure.add_subplot()
    few = len(training) < 30
    for points, label, style in ((training, "training", "-"), (validation, "validation", "o-")):
        if points:
            axes.plot(
                *zip(*points, strict=True), style + ("o" if few and style == "-" else ""), label=label, ms=3, lw=1.2
            )
    axes.set(title=title, xlabel="optimizer step", ylabel="loss per label token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if validation:
        axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_whole(path, picture.getvalue())


def write_report(run: Path, plan: Plan, device: torch.device, seconds: float, state: str) -> None:
    """Writes loss.png and report.md from metrics.jsonl.

    Args:
        run: the run's folder.
        plan: what was to be done.
        device: where it was computed.
        seconds: time this process took, data and saving included.
        state: how it ended, a sentence.
    """
    metrics = read_metrics(run / "metrics.jsonl").lines
    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return
    draw_loss(metrics, run / "loss.png", plan.recipe.name)
    tokens = sum(line["tokens"] for line in steps)
    training_seconds = sum(line["tokens"] / line["tokens_per_second"] for line in steps)
    rows = [
        *describe_plan(plan),
        ("steps done", f"{steps[-1]['step']:,} of {plan.total_steps:,}"),
        ("loss", _first_and_last(steps, "loss")),
    ]
    if validation := [line for line in metrics if "validation_loss" in line]:
        rows.append(("validation loss", _first_and_last(validation, "validation_loss")))
    if several := [line["imbalance"] for line in steps if "imbalance" in line]:
        mean, most = sum(several) / len(several), max(several)
        text = f"the fullest rank had {mean:.1%} more tokens than the mean one, {most:.1%} at most"
        rows.append(("imbalance", text))
    rows += [
        ("speed", f"{tokens / training_seconds:,.0f} tokens/s over {training_seconds:,.0f} s of training steps"),
        ("time", f"{seconds:,.0f} s for this process, data and saving included"),
        ("peak memory", f"{max(line['peak_memory_gib'] for line in steps):.2f} GiB"),
        ("device", f"{device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("written", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    table = "\n".join(f"| {name} | {text.replace('|', '&#124;')} |" for name, text in rows)
    text = f"# {plan.recipe.name}\n\n{state}\n\n| | |\n|---|---|\n{table}\n\n![loss](loss.png)\n"
    write_text_whole(run / "report.md", text)


def _first_and_last(lines: list[Metrics], key: str) -> str:
    return f"{lines[0][key]:.4f} at step {lines[0]['step']}, {lines[-1][key]:.4f} at the end"


def device_name(device: torch.device) -> str:
    """What people call a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {count_text(torch.get_num_threads(), 'thread')}"
    return device.type


def describe_plan(plan: Plan) -> list[tuple[str, str]]:
    """What will be done, as pairs of a subject and a text: the head of report.md, and what the command line shows."""
    recipe, config, data, report = plan.recipe, plan.config, plan.train, plan.report
    optimizer, train, checkpoint = recipe.optimizer, recipe.train, recipe.checkpoint
    count = parameter_count(config)
    weights = f"random (seed {train.seed})"
    if plan.layouts:
        weights = f"from {', '.join(str(layout.folder) for layout in plan.layouts)}"
    elif names := recipe.model.pretrained_list():
        weights = f"from {', '.join(names)} (not found)"
    grouped = f" ({config.kv_heads} for keys and values)" if config.kv_heads != config.n_heads else ""
    counts = ((report["truncated"], "cut"), (report["dropped"], "dropped"), (report["skipped"], "skipped"))
    paths = [str(file.path) for file in data.files]
    files = ", ".join(paths[:3]) + (f" and {len(paths) - 3:,} more files" if len(paths) > 3 else "")
    lines = [
        ("recipe", recipe.name),
        (
            "model",
            f"{count_text(config.n_layers, 'layer')}, width {config.dim}, "
            f"{count_text(config.n_heads, 'head')}{grouped}, vocabulary {config.vocab_size}",
        ),
        *(("tokenizer", note) for note in tokenizer_notes(plan.tokenizer, config.vocab_size)),
        ("weights", weights),
        ("parameters", f"{count:,}, of which {plan.trained_count():,} train (method {recipe.tuning.method})"),
    ]
    if plan.settings.quantize_skip is not None:
        number, size = plan.quantized()
        which = "wq wk wv wo w1 w2 w3 of every block, output"
        which += f", but not {', '.join(plan.settings.quantize_skip)}" if plan.settings.quantize_skip else ""
        lines.append(("quantized", f"{number:,} of them in NF4, {size_text(size)}: {which}; nothing else"))
    if config.vision is not None:
        lines.append(("vision", _describe_vision(plan)))
    lines.append(
        (
            "data",
            f"{count_text(len(data), 'item')}, {count_text(data.tokens, 'token')}, {data.label_tokens:,} of them "
            f"trained{''.join(f', {number:,} {what}' for number, what in counts if number)}; from {files}",
        )
    )
    unused: Counter[str] = Counter()  # of all sources of a file the same
    for keys in {file["path"]: file["unused_keys"] for file in report["files"]}.values():
        unused.update(keys)
    if unused:
        lines.append(("not used", unused_text(unused)))
    if warnings := [f"{FINDINGS[kind].title}: {number:,}" for kind, number in report["warnings"].items()]:
        lines.append(("warnings", f"{', '.join(warnings)}; see data.json, or `llama-acc convert-data check FILE`"))
    if plan.validation is not None:
        lines.append(("validation", count_text(len(plan.validation), "item")))
    lines.append(
        (
            "steps",
            f"{plan.total_steps:,} of {count_text(train.global_batch_size, 'example')}; {plan.steps_per_epoch:,} in "
            f"an epoch, {count_text(train.epochs, 'epoch')}, {train.precision}",
        )
    )
    idle = plan.idle_steps()
    if idle > _MOST_IDLE * plan.total_steps:
        text = f"{idle} of the {count_text(plan.total_steps, 'step')} ({idle / plan.total_steps:.0%}) has rate 0 and "
        text += "changes nothing, as a warm-up begins at 0: set train.warmup_epochs=0, or take more steps with a "
        lines.append(("warning", f"{text}smaller train.global_batch_size"))
    warm_up = f"after a warm-up of {count_text(train.warmup_epochs, 'epoch')}, " if train.warmup_epochs else ""
    saves, never = plan.save_count(), ""
    if checkpoint.every_steps >= plan.steps_per_epoch:
        epoch = count_text(plan.steps_per_epoch, "step")
        never = f"; checkpoint.every_steps={checkpoint.every_steps} saves none, as an epoch has {epoch}"
    lines += [
        (
            "learning rate",
            f"{optimizer.lr:g}, {warm_up}then along a cosine to {optimizer.min_lr:g}; "
            f"weight decay {optimizer.weight_decay:g}, gradients clipped at norm {optimizer.clip_grad_norm:g}",
        ),
        (
            "checkpoints",
            f"{saves} of {size_text(plan.checkpoint_bytes())}, the newest "
            f"{min(saves, checkpoint.keep or saves)} kept{never}",
        ),
    ]
    return lines


def _describe_vision(plan: Plan) -> str:
    vision, recipe = plan.config.vision, plan.recipe
    assert vision is not None
    tower = sum(math.prod(shape) for shape in tower_shapes(vision).values())
    images = int(plan.train.image_counts.sum())
    text = f"encoder {vision.encoder}, stage {plan.config.vision_training.stage}; "
    text += f"{tower:,} of the parameters are its tower, which is frozen; " if tower else "it trains; "
    text += f"{count_text(images, 'image')} of {count_text(vision.positions, 'position')} each, "
    text += recipe.data.images.transform
    if recipe.vision.cache_features:
        size = images * math.prod(vision.input_shape) * plan.settings.dtype.itemsize
        text += f"; features are kept, up to {size_text(size)} ({size_text(free_bytes(home()))} are free)"
    return text
