"""The log of a run: metrics.jsonl, from which TensorBoard's curves, loss.png and report.md are made."""

import io
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from llama_acc.core.atomic import remove, write_text_whole, write_whole
from llama_acc.core.text import count_text
from llama_acc.core.train.plan import Plan

Metrics = dict[str, Any]
_OF_A_STEP = ("loss", "lr", "tokens", "tokens_per_second", "peak_memory_gib")


class MetricsLog:
    """Appends to metrics.jsonl, and to TensorBoard's file. After a resume both continue from `step`.

    Lines that cannot be read are left out, and the file they are in is kept beside the new one. TensorBoard's file can
    be made again from the other: where it cannot be written, a run goes on without it. It is a TFRecord of Event
    messages, not written by `SummaryWriter`, whose thread prints tracebacks and keeps what it could not write.
    """

    def __init__(self, run: Path, step: int, note: Callable[[str], None]) -> None:
        """Opens the logs in the folder of a run of which `step` steps are done: later lines go, and at 0 all."""
        path, self._curves, self._note = run / "metrics.jsonl", run / "tensorboard", note
        lines, damaged = read_metrics(path)
        if damaged or (os.path.lexists(path) and not path.is_file()):
            names = (run / f"metrics.damaged{number or ''}.jsonl" for number in itertools.count())
            aside = next(name for name in names if not os.path.lexists(name))
            path.rename(aside)
            shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
            what = (
                f"has lines that cannot be read, left out: {len(damaged):,} ({shown})" if damaged else "is not a file"
            )
            note(f"{path} {what}; the unchanged file is {aside}")
        kept = [line for line in lines if 0 < step >= line["step"]]
        write_text_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._records: Any = None
        self._guarded(self._open_curves)
        for line in kept:
            self._add_to_curves(line)

    def write(self, line: Metrics) -> None:
        """Adds one line; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._add_to_curves(line)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._records is not None:
            self._guarded(self._records.close)
        self._file.close()

    def _guarded(self, work: Callable[[], Any]) -> None:
        """Ends the curves where the disk does not take them."""
        try:
            work()
        except OSError as error:
            self._records = None
            self._note(
                f"TensorBoard's curves end here ({error.strerror}); metrics.jsonl has all of them: {self._curves}"
            )

    def _open_curves(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._curves.is_symlink() or not self._curves.is_dir():
            remove(self._curves)
            self._curves.mkdir()
        for old in self._curves.glob("events.*"):
            remove(old)
        name = f"events.out.tfevents.{time.time():.0f}.{os.uname().nodename}.{os.getpid()}"
        self._records = RecordWriter((self._curves / name).open("xb"))
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def _add_to_curves(self, line: Metrics) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._records is None:
            return
        values = [Summary.Value(tag=key, simple_value=line[key]) for key in line if key not in ("step", "epoch")]
        event = Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values))
        records, data = self._records, event.SerializeToString()
        self._guarded(lambda: (records.write(data), records.flush()))


def read_metrics(path: Path) -> tuple[list[Metrics], list[int]]:
    """The lines of a metrics.jsonl that can be read, and the numbers of the others, from 1; none there is an empty one.

    A last line that was cut short by a kill is neither.
    """
    lines, damaged = [], []
    texts = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, text in enumerate(texts, start=1):
        line = _parse(text)
        if line is not None:
            lines.append(line)
        elif text.strip() and number < len(texts):
            damaged.append(number)
    return lines, damaged


def _parse(text: bytes) -> Metrics | None:
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

    figure = Figure(figsize=(8, 4.5), dpi=120)
    # Laying it out by what it holds would take longer than many a run's steps.
    figure.subplots_adjust(left=0.11, right=0.97, top=0.91, bottom=0.12)
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            marker = "o" if key == "validation_loss" or len(points) < 30 else ""
            axes.plot(*zip(*points, strict=True), "-" + marker, label=label, ms=3, lw=1.2)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss per label token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_whole(path, picture.getvalue())


def write_report(
    run: Path, plan: Plan, device: torch.device, seconds: float, state: str, done: Sequence[tuple[str, str]]
) -> None:
    """Writes loss.png and report.md from metrics.jsonl.

    Args:
        run: the run's folder.
        plan: what was to be done.
        device: where it was computed.
        seconds: time this process took, data and saving included.
        state: how it ended, a sentence.
        done: what was done, as pairs of a subject and a text.
    """
    metrics, _ = read_metrics(run / "metrics.jsonl")
    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return
    draw_loss(metrics, run / "loss.png", plan.name)

    def first_and_last(lines: list[Metrics], key: str) -> str:
        return f"{lines[0][key]:.4f} at step {lines[0]['step']}, {lines[-1][key]:.4f} at the end"

    rows = [
        *done,
        ("steps done", f"{steps[-1]['step']:,} of {plan.total_steps:,}"),
        ("loss", first_and_last(steps, "loss")),
    ]
    if validation := [line for line in metrics if "validation_loss" in line]:
        rows.append(("validation loss", first_and_last(validation, "validation_loss")))
    if several := [line["imbalance"] for line in steps if "imbalance" in line]:
        mean, most = sum(several) / len(several), max(several)
        rows.append(("imbalance", f"the fullest rank had {mean:.1%} more tokens than the mean one, {most:.1%} at most"))
    tokens = sum(line["tokens"] for line in steps)
    training = sum(line["tokens"] / line["tokens_per_second"] for line in steps)
    rows += [
        ("speed", f"{tokens / training:,.0f} tokens/s over {training:,.0f} s of training steps"),
        ("time", f"{seconds:,.0f} s for this process, data and saving included"),
        ("peak memory", f"{max(line['peak_memory_gib'] for line in steps):.2f} GiB"),
        ("device", f"{device_name(device)}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("written", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]
    table = "\n".join(f"| {name} | {text.replace('|', '&#124;')} |" for name, text in rows)
    text = f"# {plan.name}\n\n{state}\n\n| | |\n|---|---|\n{table}\n\n![loss](loss.png)\n"
    write_text_whole(run / "report.md", text)


def device_name(device: torch.device) -> str:
    """What people call a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {count_text(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type
