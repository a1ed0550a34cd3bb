"""The log of a run: metrics.jsonl, from which TensorBoard, loss.png and the report are made."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_acc.core.checkpoint.files import write_text_whole

Metrics = dict[str, Any]


class MetricsLog:
    """Appends to metrics.jsonl and mirrors it to TensorBoard. After a resume both go on from `step`."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_text_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        for old in (run / "tensorboard").glob("events.*"):
            old.unlink()
        self._writer = SummaryWriter(run / "tensorboard")
        for line in kept:
            self._mirror(line)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Metrics) -> None:
        """Adds one line; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._mirror(line)

    def _mirror(self, line: Metrics) -> None:
        for key, value in line.items():
            if key not in ("step", "epoch"):
                self._writer.add_scalar(key, value, line["step"])

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._writer.close()


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def draw_loss(metrics: list[Metrics], path: Path, title: str) -> None:
    """Draws training and validation loss over the optimizer steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    training = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    validation = [(line["step"], line["validation_loss"]) for line in metrics if "validation_loss" in line]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
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
    FigureCanvasAgg(figure).print_png(str(path))
