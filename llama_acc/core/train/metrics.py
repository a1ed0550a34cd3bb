"""The log of a run: metrics.jsonl, from which TensorBoard, loss.png and the report are made."""

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from llama_acc.core.atomic import remove, write_text_whole, write_whole

Metrics = dict[str, Any]
_OF_A_STEP = ("loss", "lr", "tokens", "tokens_per_second", "peak_memory_gib")


class MetricsLog:
    """Appends to metrics.jsonl and mirrors it to TensorBoard. After a resume both go on from `step`.

    Lines that cannot be read are left out, and the file they are in is kept beside the new one.
    """

    def __init__(self, run: Path, step: int, tell: Callable[[str], None]) -> None:
        """Args:
        run: the run's folder.
        step: how many steps are done; later lines go, and at 0 all.
        tell: is given a line where something was not as it should be.
        """
        self.path = run / "metrics.jsonl"
        log = read_metrics(self.path)
        if log.damaged or (os.path.lexists(self.path) and not self.path.is_file()):
            aside = _unused(run / "metrics.damaged.jsonl")
            self.path.rename(aside)
            tell(f"{log.complaint(self.path)}; the file as it was is {aside}")
        kept = [line for line in log.lines if 0 < step >= line["step"]]
        write_text_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._curves = Curves(run / "tensorboard", tell)
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

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self._folder, self._tell, self._records = folder, tell, None
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
        self._tell(f"TensorBoard's curves end here ({error.strerror}); metrics.jsonl has all of them: {self._folder}")

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

    def complaint(self, path: Path) -> str:
        """What to say of the damage."""
        if not self.damaged:
            return f"{path} is no file"
        shown = ", ".join(map(str, self.damaged[:5])) + (", ..." if len(self.damaged) > 5 else "")
        return f"{path}: left out, as they cannot be read: {len(self.damaged):,} of its lines ({shown})"


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
