"""What a download shows: bars on a terminal, a line every few seconds otherwise."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llama_acc.cli import console
from llama_acc.core.units import size_text

_SECONDS_BETWEEN_LINES = 5.0


def fetch_shown(address: str) -> list[Path]:
    """The files that an address means; what is not there yet is fetched with bars."""
    from llama_acc.core.download.downloads import fetch_data

    with DownloadProgress() as progress:
        return fetch_data(address, progress)


class DownloadProgress:
    """Watches a download (see `core.download.transfer.Watch`): bytes, rate and time left, of each file and of all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        self._had: dict[str, int] = {}
        self._tasks: dict[str, TaskID] = {}
        self._count, self._finished, self._total = 0, 0, None  # type: tuple[int, int, int | None]
        self._since = self._last_line = clock()
        self._progress: Progress | None = None
        if sys.stderr.isatty() and not console.err.is_dumb_terminal:
            columns = (DownloadColumn(binary_units=True), BarColumn(bar_width=24), TransferSpeedColumn())
            ending = (TimeRemainingColumn(compact=True), TextColumn("left"))
            self._progress = Progress(
                TextColumn("{task.description}"), *columns, *ending, console=console.err, transient=True
            )

    def __enter__(self) -> "DownloadProgress":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, files: int, total: int | None) -> None:
        """So many files, and bytes of them if known, are to be fetched."""
        with self._lock:
            self._files.clear()
            self._had.clear()
            self._count, self._finished, self._total = files, 0, total
            self._since = self._last_line = self._clock()
            if self._progress is not None and "" in self._tasks:
                self._progress.remove_task(self._tasks.pop(""))  # of what was downloaded before
            if self._progress is not None and files > 1:
                self._tasks[""] = self._progress.add_task(f"{files} files", total=total)

    def receiving(self, name: str, done: int, total: int | None) -> None:
        """So much of a file is here."""
        with self._lock:
            self._had.setdefault(name, done)
            self._files[name] = done
            if self._progress is not None:
                self._bar(name, done, total)
                if "" in self._tasks:
                    self._progress.update(self._tasks[""], completed=sum(self._files.values()))
            else:
                self._line(self._summary)

    def working(self, doing: str, name: str, done: int, total: int) -> None:
        """So many bytes of it have been worked on otherwise: "checking" it, say."""
        with self._lock:
            if self._progress is not None:
                self._bar(f"{doing} {name}", done, total)
            else:
                self._line(lambda: f"{doing} {name}: {size_text(done)} of {size_text(total)}")

    def finished(self, name: str) -> None:
        """A file is whole and has its name."""
        with self._lock:
            self._finished += 1
            for label in (name, f"checking {name}"):
                if self._progress is not None and label in self._tasks:
                    self._progress.remove_task(self._tasks.pop(label))

    def note(self, text: str) -> None:
        """Something on the side."""
        console.note(text)

    def _bar(self, label: str, done: int, total: int | None) -> None:
        assert self._progress is not None
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=total, completed=done)
        self._progress.update(self._tasks[label], completed=done, total=total)

    def _line(self, text: Callable[[], str]) -> None:
        now = self._clock()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            console.note(text())

    def _summary(self) -> str:
        """What has come so far: of one file by its name, of several by their number."""
        done = sum(self._files.values())
        rate = (done - sum(self._had.values())) / max(self._clock() - self._since, 1e-9)
        name = next(iter(self._files)) if self._count == 1 else f"{self._finished} of {self._count} files"
        of_all = "" if self._total is None else f" of {size_text(self._total)}"
        left = ""
        if self._total is not None and rate > 0:
            left = f", {console.duration(max(self._total - done, 0) / rate)} left"
        return f"{name}: {size_text(done)}{of_all}, {size_text(round(rate))}/s{left}"
