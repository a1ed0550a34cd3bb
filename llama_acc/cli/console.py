"""What the user sees: results on standard output, everything else on standard error.

Nothing printed here acts on a terminal, wherever it comes from: a file's name, a key, a role.
"""

import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

import rich.progress
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.rule import Rule
from rich.segment import Segment
from rich.spinner import Spinner
from rich.text import Text

from llama_acc.core.distributed import environment
from llama_acc.core.text import count_text, escape_control_chars, size_text

if TYPE_CHECKING:
    from llama_acc.core.data.preview import Piece, Shown
    from llama_acc.core.generate.chat import ShownToken

_SIGN_AFTER, SECONDS_BETWEEN_LINES = 1.0, 5.0
_ALL = 1e9  # seconds: of work whose parts take longer than half a minute, rich would forget the last one


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
            spinner = Spinner("dots", Text(escape_control_chars(text), no_wrap=True, overflow="ellipsis"))
            if self._live is not None:
                self._live.update(spinner)
                return
            # Results go where they belong while it spins.
            self._live = Live(spinner, console=err, transient=True, redirect_stdout=False, refresh_per_second=8)
            self._live.start(refresh=True)
        elif is_new:
            self._last_line = None
            self._timer = threading.Timer(after, self._say, [key])
            self._timer.daemon = True
            self._timer.start()
        elif self._last_line is not None and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._say(key)

    def _say(self, key: str) -> None:
        if key == self._key:
            self._last_line = time.monotonic()
            note(self._text)


_activity = _Activity()


def working(text: str | None, key: str | None = None, after: float | None = None) -> None:
    """Says what is being done from now on; None: nothing that takes long. `key` tells stages apart whose text changes
    as they go on; after so many seconds (`after`; None: one) it is said where there is no terminal."""
    if environment.is_main():
        _activity.show(None if text is None else key or text, text or "", _SIGN_AFTER if after is None else after)


class Progress:
    """Shows how far work is: a bar for each label on a terminal, a line every few seconds otherwise.

    To be called, from any thread, with a label and how much of all is done: bytes, or things of the kind given. 0 or
    None in all: nobody knows how much.
    """

    def __init__(self, thing: str | None = None) -> None:
        self._amount: Callable[[int], str] = size_text if thing is None else lambda count: count_text(count, thing)
        by_bytes = (DownloadColumn(binary_units=True), BarColumn(bar_width=24), TransferSpeedColumn())
        self._bars = rich.progress.Progress(
            TextColumn("{task.description}"),
            *(by_bytes if thing is None else (MofNCompleteColumn(), BarColumn(bar_width=24))),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=err,
            transient=True,
            speed_estimate_period=_ALL,
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._lock, self._last_line = threading.Lock(), time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._tasks:
            self._bars.stop()

    def __call__(self, label: str, done: int, total: int | None) -> None:
        working(None)
        with self._lock:
            if shows_bars():
                if label not in self._tasks:
                    for task in self._bars.tasks:
                        task.visible = not task.finished
                    self._bars.start()  # not before: another bar may be shown till then
                    self._tasks[label] = self._bars.add_task(escape_control_chars(label), total=total or None)
                self._bars.update(self._tasks[label], completed=done, total=total or None)
            elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                note(f"{label}: {self._amount(done)}" + (f" of {self._amount(total)}" if total else ""))


def stream(pieces: Iterable[str]) -> None:
    """Prints a text on standard output as it comes, and ends its line. A terminal gets no character that acts on it."""
    working(None)
    whole = itertools.chain(pieces, "\n")
    for piece in map(escape_control_chars, whole) if sys.stdout.isatty() else whole:
        sys.stdout.write(piece)
        sys.stdout.flush()


def command(line: str) -> None:
    """Prints what to type next on standard output."""
    print(escape_control_chars(line) if sys.stdout.isatty() else line)


def error(message: str, hint: str | None = None) -> None:
    """Says what is wrong, and what to type next."""
    err.print(Text.assemble(("error: ", "bold red"), escape_control_chars(message)))
    if hint:
        err.print(Text.assemble(("hint: ", "bold"), escape_control_chars(hint)))


def note(text: str) -> None:
    """Says something on the side."""
    on_terminal = err.is_terminal
    err.print(Text(escape_control_chars(text), style="dim" if on_terminal else ""), soft_wrap=not on_terminal)


def heading(text: str) -> None:
    """Says on the side what follows."""
    err.print(Rule(Text(escape_control_chars(text), style="bold"), align="left", style="dim"), soft_wrap=False)


def pairs(lines: list[tuple[str, str]], console: Console | None = None, width: int = 0) -> None:
    """Prints subjects and texts in two columns, the first of them at least so wide."""
    width = max(width, *(len(subject) for subject, _ in lines))
    for subject, text in lines:
        (console or err).print(Text.assemble((f"{subject:<{width}}  ", "bold"), escape_control_chars(text)))


def table(rows: list[list[str]], align: str = "<>") -> None:
    """Prints a header and rows on standard output; `align` is that of the first columns, its last one of all others."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, cells in enumerate(rows):
        row(cells, widths, align, bold=not number)


def row(cells: list[str], widths: list[int], align: str = "<>", bold: bool = False) -> None:
    """Prints a row of a table."""
    sides = align.ljust(len(cells), align[-1])
    aligned = (f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True))
    out.print(Text("  ".join(aligned).rstrip(), style="bold" if bold else ""))


def duration(seconds: float) -> str:
    """Seconds as people say it: 45 s, 3 min 20 s, 5 h 12 min, 2 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    units = [(86400, "d"), (3600, "h"), (60, "min"), (1, "s")]
    first = next(i for i, (size, _) in enumerate(units) if whole >= size)
    (size, name), (next_size, next_name) = units[first], units[first + 1]
    return f"{whole // size} {name} {whole % size // next_size} {next_name}"


# Text as a model sees it: what is trained or written, and what is special, stands out


def show_items(items: "Iterable[Shown]") -> None:
    """Prints items on standard output. Where color cannot be seen, marks say what is trained."""
    color = out.is_terminal and not out.no_color
    legend = "trained tokens in green, special ones in magenta" if color else "trained tokens between ⟦ and ⟧"
    items = list(items)
    # Of BOS and EOS also where none is shown: a text in which they stand may be cut before its end.
    names = {"<s>", "</s>", *(piece.text for shown in items for piece in shown.pieces if piece.special)}
    for number, shown in enumerate(items, start=1):
        if number > 1:
            out.print()
        out.print(Text.assemble((f"example {number}: {shown.origin} ", "bold"), f"({legend})"))
        out.print(Text.assemble(*map(_colored, shown.pieces)) if color else _marked(shown.pieces, names))
        if shown.cut:
            out.print(Text(f"[cut: {count_text(shown.cut, 'token')} more]", style="yellow"))


def _colored(piece: "Piece") -> tuple[str, str]:
    if piece.special:
        return piece.text, "bold magenta" + " underline" * piece.trained
    return piece.text, "green" if piece.trained else "dim"


def _marked(pieces: "Iterable[Piece]", names: set[str]) -> Text:
    text, inside = "", False
    for piece in pieces:
        if piece.trained != inside:
            text += "⟦" if piece.trained else "⟧"
        inside, shown = piece.trained, piece.text
        # The name of a special token that only stands in the text is marked to differ from the token.
        for name in () if piece.special else names:
            shown = shown.replace(name, f"\\{name}")
        text += shown
    return Text(text + "⟧" * inside)


def show_tokens(tokens: "Sequence[ShownToken]") -> None:
    """Prints tokens on standard error, each with its id and, where it is known, its probability."""
    pictures = str.maketrans({" ": "\u00b7", "\t": "\u21e5", "\n": "\u21b5"})
    for heading, is_reply in (("the model was fed, with ids:", False), ("it wrote, with ids and probabilities:", True)):
        note(heading)
        text = Text()
        for token in tokens:
            if token.is_reply == is_reply:
                style = "bold magenta" if token.special else "green" if is_reply else ""
                likely = "" if token.logprobs is None else f"{math.exp(token.logprobs.own):.0%}"
                behind = "\n" if "\n" in token.text else "  "
                text.append(token.text.translate(pictures) or token.piece, style)
                text.append(f"({token.token}){likely}{behind}", "dim")
        text.rstrip()
        err.print(text, soft_wrap=False)
