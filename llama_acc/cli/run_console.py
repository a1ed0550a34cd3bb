"""A run as it shows on a console."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from llama_acc.cli import console
from llama_acc.core.train.callback import Callback

if TYPE_CHECKING:
    from llama_acc.core.train.plan import Plan


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
        from llama_acc.cli.plan_text import describe_plan

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
