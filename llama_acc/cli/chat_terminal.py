"""A conversation on a terminal: questions of one line or a pasted page, answers rendered as Markdown as they come."""

import itertools
import sys
import termios
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from llama_acc.cli import console
from llama_acc.core.text import escape_control_chars

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

# HTML is shown, not interpreted: an answer about <b> is to keep it.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
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
        lines = console.render_lines(self._markdown, options.update(height=None), pad=False)
        filled = [number for number, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        lines = lines[filled[0] : filled[-1] + 1] if filled else []
        for line in lines[-max(1, console.size.height - 2) :] if self._grows else lines:
            yield from line
            yield Segment.line()


def stream_markdown(pieces: Iterable[str]) -> None:
    """Prints an answer on standard output as it comes; a block stays as it is once the next one has begun."""
    text, next_frame, gap = "", 0.0, ""

    def settle(blocks: Iterable[str]) -> None:
        nonlocal gap
        for block in blocks:
            console.out.print(gap, _Answer(block), sep="", end="", soft_wrap=False)
            gap = "\n"

    try:
        with Live(console=console.out, auto_refresh=False, transient=True, vertical_overflow="visible") as live:
            for piece in pieces:
                text += escape_control_chars(piece)
                now = time.monotonic()
                if now < next_frame:
                    continue
                *done, text = _blocks(text) or [text]
                if done:
                    live.update("", refresh=True)
                    settle(done)
                live.update(_Answer(text, grows=True), refresh=True)
                after = time.monotonic()
                next_frame = after + max(_FRAME, (after - now) / _SHARE_OF_TIME)
    finally:
        settle(_blocks(text))


def _blocks(text: str) -> list[str]:
    """A text's paragraphs, lists, tables and so on, each with its line ends."""
    lines = text.splitlines(keepends=True)
    begins = [token.map[0] for token in _PARSER.parse(text) if not token.level and token.nesting >= 0 and token.map]
    return ["".join(lines[begin:end]) for begin, end in itertools.pairwise([*begins, len(lines)])]


def question_reader() -> Callable[[], str]:
    """What asks for a question: Enter sends it, a paste keeps its lines, the arrow keys edit and recall.

    It raises EOFError for Ctrl-D.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import ColorDepth
    from prompt_toolkit.output.vt100 import Vt100_Output

    stream: Any = sys.stdout if sys.stdout.isatty() else sys.stderr
    output = Vt100_Output.from_pty(stream, default_color_depth=ColorDepth.DEPTH_1_BIT)
    output.enable_cpr = False  # a terminal that does not answer where its cursor is would only be warned of
    session: PromptSession[str] = PromptSession(
        "> ", multiline=True, key_bindings=_keys(), prompt_continuation="  ", reserve_space_for_menu=0, output=output
    )
    settings = termios.tcgetattr(sys.stdin)

    def ask() -> str:
        try:
            return session.prompt()
        finally:
            # A signal may end the prompt between any two of its own lines, also those that give the terminal back.
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)

    return ask


def _keys() -> "KeyBindings":
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

    return keys
