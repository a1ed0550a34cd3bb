"""A conversation on a terminal: questions of one line or a pasted page, answers rendered as Markdown as they come."""

import contextlib
import itertools
import os
import select
import sys
import termios
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from llama_acc.cli import console
from llama_acc.core.distributed import environment
from llama_acc.core.errors import UserError
from llama_acc.core.text import escape_control_chars

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

# HTML is shown, not interpreted: an answer about <b> is to keep it.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
_STDIN = 0
_FRAME = 0.05  # seconds between two looks of an answer that is still coming
_SHARE_OF_TIME = 0.1  # that drawing may take


class _Answer:
    """Markdown whose line breaks stay.

    `grows`: only its last lines, as many as the screen holds: what has scrolled away could not be drawn again.
    """

    def __init__(self, text: str, grows: bool = False) -> None:
        self._grows = grows
        self._markdown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
        self._markdown.parsed = _PARSER.parse(text)
        for token in self._markdown.parsed:
            for child in token.children or []:
                if child.type == "softbreak":
                    child.type = "hardbreak"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        options = options.update(height=None, no_wrap=False, overflow="fold")  # whatever the console has
        lines = console.render_lines(self._markdown, options, pad=False)
        filled = [number for number, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        lines = lines[filled[0] : filled[-1] + 1] if filled else []
        for line in lines[-max(1, console.size.height - 4) :] if self._grows else lines:
            yield from line
            yield Segment.line()


def stream_markdown(pieces: Iterable[str], status: Callable[[], str] = str) -> None:
    """Prints an answer on standard output as it comes; a block stays as it is once the next one has begun.

    `status`: of the answer so far, for a line below it as long as it comes.
    """
    text, next_frame, gap = "", 0.0, ""
    shown = Live(console=console.out, auto_refresh=False, transient=True, vertical_overflow="visible")
    with _without_echo(), shown as live:

        def draw(done: Iterable[str], rest: RenderableType) -> None:
            nonlocal gap
            with console.out:  # what it prints comes in one go, so that nothing is taken off the screen in between
                if done:
                    live.update("", refresh=True)
                for block in done:
                    console.out.print(gap, _Answer(block), sep="", end="", soft_wrap=False)
                    gap = "\n"
                live.update(rest, refresh=True)

        draw([], Text("...", style="dim"))
        try:
            for piece in pieces:
                text += escape_control_chars(piece)
                now = time.monotonic()
                if now < next_frame:
                    continue
                *done, text = _blocks(text) or [text]
                line = Text(f"\n{status()}", style="dim", no_wrap=True, overflow="ellipsis")
                draw(done, Group(_Answer(text, grows=True), line))
                after = time.monotonic()
                next_frame = after + max(_FRAME, (after - now) / _SHARE_OF_TIME)
        finally:
            draw(_blocks(text), "")


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """What is typed while an answer is drawn is not shown within it; it waits for the next question."""
    try:
        is_ours = os.tcgetpgrp(_STDIN) == os.getpgrp()  # another process may have the terminal in the foreground
    except OSError:
        is_ours = False  # there is none
    if not is_ours:
        yield
        return
    settings = termios.tcgetattr(_STDIN)
    try:
        quiet = [*settings[:3], settings[3] & ~termios.ECHO, *settings[4:]]
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, quiet)
        yield
    finally:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, settings)


def stop_by_key(pieces: Generator[str, None, None]) -> Generator[str, None, None]:
    """An answer that Ctrl-C ends between two tokens without a signal. What else is typed meanwhile is lost."""
    settings = termios.tcgetattr(_STDIN)
    characters = [*settings[6]]
    characters[termios.VINTR] = bytes([os.fpathconf(_STDIN, "PC_VDISABLE")])
    local = settings[3] & ~(termios.ECHO | termios.ICANON)
    try:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, [*settings[:3], local, *settings[4:6], characters])
        for piece in pieces:
            yield piece
            if select.select([_STDIN], [], [], 0)[0] and b"\x03" in os.read(_STDIN, 4096):
                pieces.close()
                return
    finally:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, settings)


def _blocks(text: str) -> list[str]:
    """A text's paragraphs, lists, tables and so on, each with its line ends."""
    lines = text.splitlines(keepends=True)
    begins = [token.map[0] for token in _PARSER.parse(text) if not token.level and token.nesting >= 0 and token.map]
    return ["".join(lines[begin:end]) for begin, end in itertools.pairwise([*begins, len(lines)])]


def question_reader(status: Callable[[], str], history: Path | None) -> Callable[[str], str]:
    """What asks for a question: Enter sends it, a paste keeps its lines, the arrow keys edit and recall.

    It is given a text that the question begins as, and raises EOFError for Ctrl-D. `status` is the line below the
    question, `history` where questions are kept for the next time, readable to the user alone; None: nowhere.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.output import ColorDepth
    from prompt_toolkit.output.vt100 import Vt100_Output
    from prompt_toolkit.styles import Style

    class Output(Vt100_Output):
        def get_rows_below_cursor_position(self) -> int:
            """As many as the status line needs: it is not shown before a terminal has said how many there are."""
            return 2

    if history is not None:
        try:
            os.close(os.open(history, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise UserError(f"cannot write {history}: {error.strerror}") from error
    stream: Any = sys.stdout if sys.stdout.isatty() else sys.stderr
    output = Output.from_pty(stream, default_color_depth=ColorDepth.DEPTH_1_BIT)
    output.enable_cpr = False  # a terminal that does not answer where its cursor is would only be warned of
    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        key_bindings=_keys(),
        prompt_continuation="  ",
        reserve_space_for_menu=0,
        bottom_toolbar=status,
        style=Style.from_dict({"bottom-toolbar": "noreverse dim"}),
        history=None if history is None else FileHistory(str(history)),
        # The other ranks hear of no key, and wait: they are to be let go.
        interrupt_exception=KeyboardInterrupt if environment.world_size() == 1 else EOFError,
        output=output,
    )
    settings = termios.tcgetattr(sys.stdin)

    def ask(text: str = "") -> str:
        try:
            return session.prompt(default=text)
        finally:
            # A signal may end the prompt between any two of its own lines, also those that give the terminal back.
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)

    return ask


def _keys() -> "KeyBindings":
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: "KeyPressEvent") -> None:
        # A terminal that does not mark a paste sends all of it at once: what is behind the Enter is already here.
        if event.key_processor.input_queue:
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def break_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=Condition(lambda: bool(get_app().current_buffer.text)))
    def clear(event: "KeyPressEvent") -> None:
        event.current_buffer.reset()

    return keys
