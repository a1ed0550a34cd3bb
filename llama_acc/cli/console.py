"""What the user sees: results on standard output, everything else on standard error."""

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
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from llama_acc.core.distributed import environment
from llama_acc.core.units import count_text, size_text
from llama_acc.core.visible import visible

_SIGN_AFTER, SECONDS_BETWEEN_LINES = 1.0, 5.0
_ALL = 1e9  # seconds: of work whose parts take longer than half a minute, rich would forget the last one
_Watching = TypeVar("_Watching", bound="_WorkProgress")


class _Stream(Console):
    """A console whose reader may leave: then results end, and what stands on the side is lost without a word."""

    def __init__(self, stderr: bool) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Lets no text act on a terminal, wherever it comes from: a file's name, a key, a role."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

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
            self._timer = None
        if key is None:
            if self._live is not None:
                self._live.stop()
                self._live = None
        elif err.is_terminal and not err.is_dumb_terminal:
            self._spin(Text(visible(text), no_wrap=True, overflow="ellipsis"))
        elif is_new:
            self._last_line = None
            self._timer = threading.Timer(after, self._say, [key])
            self._timer.daemon = True
            self._timer.start()
        elif self._last_line is not None and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._say(key)

    def _spin(self, text: Text) -> None:
        if self._live is None:
            # Results go where they belong while it spins.
            self._live = Live(
                Spinner("dots", text), console=err, transient=True, redirect_stdout=False, refresh_per_second=8
            )
            self._live.start(refresh=True)
        else:
            self._live.update(Spinner("dots", text))

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


def stream(pieces: Iterable[str]) -> None:
    """Prints a text on standard output as it comes, and ends its line.

    A terminal gets no character that acts on it, and lines that break between words.
    """
    working(None)
    whole = itertools.chain(pieces, "\n")
    for piece in _between_words(map(visible, whole), out.width) if sys.stdout.isatty() else whole:
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
    print(visible(line) if sys.stdout.isatty() else line)


def error(message: str, hint: str | None = None) -> None:
    """Tells what is wrong, and what to type next."""
    err.print(Text.assemble(("error: ", "bold red"), visible(message)))
    if hint:
        err.print(Text.assemble(("hint: ", "bold"), visible(hint)))


def note(text: str, by_words: bool = False) -> None:
    """Tells something on the side; `by_words`: its lines break between words, as no command to copy stands in it."""
    err.print(Text(visible(text), style="dim" if err.is_terminal else ""), soft_wrap=not (by_words and err.is_terminal))


def pairs(lines: list[tuple[str, str]], console: Console | None = None, width: int = 0) -> None:
    """Prints subjects and texts in two columns, the first of them at least so wide."""
    width = max(width, *(len(subject) for subject, _ in lines))
    for subject, text in lines:
        (console or err).print(Text.assemble((f"{subject:<{width}}  ", "bold"), visible(text)))


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


class _WorkProgress:
    """Watches work: a bar on a terminal, a line every few seconds otherwise."""

    def __init__(self, count: ProgressColumn, *speed: ProgressColumn) -> None:
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line = time.monotonic()
        if sys.stderr.isatty() and not err.is_dumb_terminal:
            columns = (count, BarColumn(bar_width=24), *speed)
            ending = (TimeRemainingColumn(compact=True), TextColumn("left"))
            self._progress = Progress(
                TextColumn("{task.description}"),
                *columns,
                *ending,
                console=err,
                transient=True,
                speed_estimate_period=_ALL,
            )

    def __enter__(self: _Watching) -> _Watching:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _tell(self, what: str, done: int, total: int, line: str) -> None:
        if self._progress is not None:
            if self._task is None:
                working(None)
                self._progress.start()  # not before: another bar may be shown till then
                self._task = self._progress.add_task(what, total=total or None)
            self._progress.update(self._task, description=what, completed=done, total=total or None)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            note(line)


class ByteProgress(_WorkProgress):
    """Watches work on bytes."""

    def __init__(self) -> None:
        super().__init__(DownloadColumn(binary_units=True), TransferSpeedColumn())

    def tell(self, what: str, done: int, total: int) -> None:
        """`what` is being done, so many bytes of all are done; 0 in all: nobody knows how many."""
        of_all = f" of {size_text(total)}" if total else ""
        self._tell(what, done, total, f"{what}: {size_text(done)}{of_all}")


class EncodingProgress(_WorkProgress):
    """Watches the encoding of data files, of which it is not known how many items they have."""

    def __init__(self) -> None:
        super().__init__(TaskProgressColumn())

    def tell(self, file: str, items: int, fraction: float) -> None:
        """So many items of a file are encoded, which are about this part of it."""
        self._tell(f"encoding {file}", round(100 * fraction), 100, encoding_line(file, items, fraction))


def encoding_line(file: str, items: int, fraction: float) -> str:
    """How far the encoding of a file is."""
    return f"encoding {file}: {count_text(items, 'item')}, {fraction:.0%}"


class CountProgress(_WorkProgress):
    """Watches work on things of one kind."""

    def __init__(self, done: str, thing: str) -> None:
        """Args:
        done: what is done to them, such as "answered".
        thing: such as "question".
        """
        super().__init__(MofNCompleteColumn())
        self._done, self._thing = done, thing

    def tell(self, done: int, total: int) -> None:
        """So many of all are done."""
        self._tell(self._done, done, total, f"{self._done} {done:,} of {count_text(total, self._thing)}")


def is_terminal() -> bool:
    """Whether a person types the input."""
    return sys.stdin.isatty()
