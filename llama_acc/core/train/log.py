"""The log of a run: metrics.jsonl and samples.jsonl, from which trackers' curves, loss.png and report.md are made."""

import io
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from textwrap import indent
from types import MappingProxyType
from typing import Any

import torch

from llama_acc.core.atomic import write_text_whole, write_whole
from llama_acc.core.interrupt import Interrupted
from llama_acc.core.text import count_text, escape_control_chars
from llama_acc.core.train.plan import Plan
from llama_acc.core.train.runs import METRICS, SAMPLES, Metrics, is_metrics, is_sample, read_lines, read_metrics
from llama_acc.core.train.trackers import Trackers


class MetricsLog:
    """Appends to metrics.jsonl and samples.jsonl, and to trackers. After a resume all continue from `step`."""

    def __init__(
        self,
        run: Path,
        step: int,
        note: Callable[[str], None],
        trackers: Sequence[str] = ("tensorboard",),
        recipe: Mapping[str, Any] = MappingProxyType({}),
        samples: bool = False,
    ) -> None:
        """Opens the logs in the folder of a run of which `step` steps are done: later lines go, and at 0 all."""
        # First, as once the log is cut, it does not say any more what trackers were given.
        self._trackers = Trackers(run, trackers, recipe, read_metrics(run / METRICS)[0], note)
        self._metrics = _LinesFile(run / METRICS, step, is_metrics, note)
        self._samples = None
        if samples or os.path.lexists(run / SAMPLES):
            self._samples = _LinesFile(run / SAMPLES, step, is_sample, note)
            for sampled, lines in itertools.groupby(self._samples.kept, lambda line: line["step"]):
                self._trackers.log_text(sampled, _samples_text(lines))
        for line in self._metrics.kept:
            self._trackers.log(line)

    def write(self, line: Metrics) -> None:
        """Adds one line; it is on its way to the disk when this returns."""
        self._metrics.append([line])
        self._trackers.log(line)

    def write_samples(self, step: int, answers: Mapping[str, str]) -> None:
        """Adds the answer to each prompt after so many steps."""
        assert self._samples is not None
        lines = [{"step": step, "prompt": prompt, "answer": answer} for prompt, answer in answers.items()]
        self._samples.append(lines)
        self._trackers.log_text(step, _samples_text(lines))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._trackers.close("FINISHED" if kind is None else "KILLED" if kind is Interrupted else "FAILED")
        for lines in (self._metrics, self._samples):
            if lines is not None:
                lines.file.close()


class _LinesFile:
    """A file of JSON lines, cut back to a step and continued. Lines that cannot be read are left out, and the file they
    are in is kept beside the new one."""

    def __init__(self, path: Path, step: int, is_whole: Callable[[Metrics], bool], note: Callable[[str], None]) -> None:
        lines, damaged = read_lines(path, is_whole)
        if damaged or (os.path.lexists(path) and not path.is_file()):
            names = (path.with_suffix(f".damaged{number or ''}.jsonl") for number in itertools.count())
            aside = next(name for name in names if not os.path.lexists(name))
            path.rename(aside)
            shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
            what = (
                f"has lines that cannot be read, left out: {len(damaged):,} ({shown})" if damaged else "is not a file"
            )
            note(f"{path} {what}; the unchanged file is {aside}")
        self.kept = [line for line in lines if 0 < step >= line["step"]]  # the lines that were there and are
        write_text_whole(path, _json_lines(self.kept))
        self.file = path.open("a", encoding="utf-8")

    def append(self, lines: Sequence[Metrics]) -> None:
        self.file.write(_json_lines(lines))
        self.file.flush()


def _json_lines(lines: Sequence[Metrics]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _samples_text(lines: Iterable[Metrics]) -> str:
    """Samples in Markdown, as blocks of code, so that nothing in them is markup."""
    parts = []
    for prompt, answers in itertools.groupby(lines, lambda line: line["prompt"]):
        parts.append(f"Prompt:\n\n{_block(prompt)}")
        parts += [f"Answer after step {line['step']:,}:\n\n{_block(line['answer'])}" for line in answers]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    return indent(escape_control_chars(text), " " * 4, lambda line: True)


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

    `seconds` is what this process took, data and saving included; `state`, how it ended, a sentence; `done`, what was
    done, as pairs of a subject and a text.
    """
    metrics, _ = read_metrics(run / METRICS)
    steps = [line for line in metrics if "loss" in line]
    if not steps:
        return
    draw_loss(metrics, run / "loss.png", plan.recipe.name)

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
    text = f"# {plan.recipe.name}\n\n{state}\n\n| | |\n|---|---|\n{table}\n\n![loss](loss.png)\n"
    answers: dict[str, list[Metrics]] = {}
    for line in read_lines(run / SAMPLES, is_sample)[0]:
        answers.setdefault(line["prompt"], []).append(line)
    if answers:
        ends = [line for lines in answers.values() for line in (lines[0], lines[-1])[: len(lines)]]
        text += f"\n## Samples\n\nThe first and the last of samples.jsonl.\n\n{_samples_text(ends)}"
    write_text_whole(run / "report.md", text)


def device_name(device: torch.device) -> str:
    """What people call a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {count_text(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type
