"""What the user sees: results on standard output, everything else on standard error.

Nothing printed here acts on a terminal, wherever it comes from: a file's name, a key, a role.
"""

import itertools
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any, TypeVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from llama_acc.core.distributed import environment
from llama_acc.core.text import count_text, escape_control_chars, size_text

_SIGN_AFTER, SECONDS_BETWEEN_LINES = 1.0, 5.0
_ALL = 1e9  # seconds: of work whose parts take longer than half a minute, rich would forget the last one
_Watching = TypeVar("_Watching", bound="ByteProgress")


class _Stream(Console):
    """A console whose reader may leave: then results end, and what stands on the side is lost without a word."""

    def __init__(self, stderr: bool) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escapes what would act on a terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape_control_chars(segment.text), segment.style)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints; a result first clears away what says that the work goes on."""
        if not self.stderr:
            working(None)
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Called by rich in place of the error."""
        discard(self.file)
        if not self.stderr:
            raise SystemExit(0)


def discard(stream: IO[str]) -> None:
    """Lets a stream whose reader has left lead nowhere, so that Python does not complain when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


out = _Stream(stderr=False)
err = _Stream(stderr=True)


def shows_bars() -> bool:
    """Whether standard error is a terminal on which lines can be drawn anew."""
    return sys.stderr.isatty() and not err.is_dumb_terminal


class _Activity:
    """What is being done: a spinner on a terminal, elsewhere a line once it takes longer than a moment."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._text = ""
        self._live: Live | None = None
        self._timer: threading.Timer | None = None
        self._last_line: float | None = None  # None: this stage has none yet

    def show(self, key: str | None, text: str, after: float) -> None:
        """Shows a stage of this key, or the same one's new text; None ends it."""
        is_new, self._key, self._text = key != self._key, key, text
        if is_new and self._timer is not None:
            self._timer.cancel()
        if key is None:
            if self._live is not None:
                self._live.stop()
            self._live = None
        elif shows_bars():
            self._spin(Spinner("dots", Text(escape_control_chars(text), no_wrap=True, overflow="ellipsis")))
        elif is_new:
            self._last_line = None
            self._timer = threading.Timer(after, self._say, [key])
            self._timer.daemon = True
            self._timer.start()
        elif self._last_line is not None and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._say(key)

    def _spin(self, spinner: Spinner) -> None:
        if self._live is not None:
            self._live.update(spinner)
            return
        # Results go where they belong while it spins.
        self._live = Live(spinner, console=err, transient=True, redirect_stdout=False, refresh_per_second=8)
        self._live.start(refresh=True)

    def _say(self, key: str) -> None:
        if key == self._key:
            self._last_line = time.monotonic()
            note(self._text)


_activity = _Activity()


def working(text: str | None, key: str | None = None, after: float | None = None) -> None:
    """Says what is being done from now on; None: nothing that takes long.

    Args:
        text: such as "loading the model".
        key: tells stages apart whose text changes as they go on.
        after: seconds until it is said where there is no terminal; None: one.
    """
    if environment.is_main():
        _activity.show(None if text is None else key or text, text or "", _SIGN_AFTER if after is None else after)


class ByteProgress:
    """Watches work on bytes: a bar on a terminal, a line every few seconds otherwise."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line = time.monotonic()

    def __enter__(self: _Watching) -> _Watching:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def tell(self, label: str, done: int, total: int) -> None:
        """So much of all is done of what the label says; 0 in all: nobody knows how much."""
        working(None)
        if shows_bars():
            if self._progress is None:  # not before: another bar may be shown till then
                self._progress = Progress(
                    TextColumn("{task.description}"),
                    *self._columns(),
                    TimeRemainingColumn(compact=True),
                    TextColumn("left"),
                    console=err,
                    transient=True,
                    speed_estimate_period=_ALL,
                )
                self._progress.start()
                self._task = self._progress.add_task(label, total=total or None)
            self._progress.update(self._task, description=label, completed=done, total=total or None)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            note(self._line(label, done, total))

    def _columns(self) -> list[ProgressColumn]:
        return [DownloadColumn(binary_units=True), BarColumn(bar_width=24), TransferSpeedColumn()]

    def _line(self, label: str, done: int, total: int) -> str:
        return f"{label}: {size_text(done)}" + (f" of {size_text(total)}" if total else "")


class CountProgress(ByteProgress):
    """Watches work on things of one kind, such as questions that are answered."""

    def __init__(self, label: str, thing: str) -> None:
        super().__init__()
        self._label, self._thing = label, thing

    def count(self, done: int, total: int) -> None:
        """So many of all are done."""
        self.tell(self._label, done, total)

    def _columns(self) -> list[ProgressColumn]:
        return [MofNCompleteColumn(), BarColumn(bar_width=24)]

    def _line(self, label: str, done: int, total: int) -> str:
        return f"{label} {done:,} of {count_text(total, self._thing)}"


def stream(pieces: Iterable[str]) -> None:
    """Prints a text on standard output as it comes, and ends its line.

    A terminal gets no character that acts on it, and lines that break between words.
    """
    working(None)
    whole = itertools.chain(pieces, "\n")
    shown = _between_words(map(escape_control_chars, whole), out.width) if sys.stdout.isatty() else whole
    for piece in shown:
        sys.stdout.write(piece)
        sys.stdout.flush()


def _between_words(pieces: Iterable[str], width: int) -> Iterator[str]:
    """A text whose lines end before a word that would not fit. Characters of two columns may stand apart (Chinese)."""
    column, space, word = 0, "", ""
    for character in itertools.chain.from_iterable(pieces):
        is_word = not character.isspace() and cell_len(character) < 2
        if is_word:
            word += character
            if cell_len(word) < width:
                continue
        if word:
            # What is longer than a line is left to the terminal.
            broken = bool(column and (space or cell_len(word[0]) > 1)) and column + cell_len(space + word) > width
            yield "\n" + word if broken else space + word
            column = (0 if broken else column + cell_len(space)) + cell_len(word)
            column = (column - 1) % width + 1
            space, word = "", ""
        if character == "\n":
            yield "\n"
            column, space = 0, ""
        elif character.isspace():
            space += character
        elif not is_word:
            word = character


def command(line: str) -> None:
    """Prints what to type next on standard output."""
    print(escape_control_chars(line) if sys.stdout.isatty() else line)


def error(message: str, hint: str | None = None) -> None:
    """Says what is wrong, and what to type next."""
    err.print(Text.assemble(("error: ", "bold red"), escape_control_chars(message)))
    if hint:
        err.print(Text.assemble(("hint: ", "bold"), escape_control_chars(hint)))


def note(text: str, by_words: bool = False) -> None:
    """Says something on the side; `by_words`: its lines break between words, as no command to copy stands in it."""
    shown = Text(escape_control_chars(text), style="dim" if err.is_terminal else "")
    err.print(shown, soft_wrap=not (by_words and err.is_terminal))


def pairs(lines: list[tuple[str, str]], console: Console | None = None, width: int = 0) -> None:
    """Prints subjects and texts in two columns, the first of them at least so wide."""
    width = max(width, *(len(subject) for subject, _ in lines))
    for subject, text in lines:
        (console or err).print(Text.assemble((f"{subject:<{width}}  ", "bold"), escape_control_chars(text)))


def table(rows: list[list[str]]) -> None:
    """Prints a header and rows on standard output; the first column is of words, the others of numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, cells in enumerate(rows):
        row(cells, widths, "" if number else "bold")


def row(cells: list[str], widths: list[int], style: str = "") -> None:
    """Prints a row of a table."""
    first, *others = zip(cells, widths, strict=True)
    aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    out.print(Text("  ".join(aligned), style=style))


def duration(seconds: float) -> str:
    """Seconds as people say it: 45 s, 3 min 20 s, 5 h 12 min, 2 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    units = [(86400, "d"), (3600, "h"), (60, "min"), (1, "s")]
    first = next(i for i, (size, _) in enumerate(units) if whole >= size)
    (size, name), (next_size, next_name) = units[first], units[first + 1]
    return f"{whole // size} {name} {whole % size // next_size} {next_name}"


def is_terminal() -> bool:
    """Whether a person types the input."""
    return sys.stdin.isatty()
