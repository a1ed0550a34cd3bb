"""A terminal to run a command in, typed into and read by a test."""

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from types import TracebackType

from tests.cli.commands import COMMAND, PATIENCE, environment


class Terminal:
    """`llama-acc` with a terminal of its own for all three streams. `seen` is everything it showed."""

    def __init__(self, *arguments: object, term: str = "dumb", columns: int = 120, **changes: str) -> None:
        variables = environment(TERM=term, COLUMNS=str(columns), **changes)
        self.seen = ""
        self._read = 0
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execve(COMMAND[0], [*COMMAND, *map(str, arguments)], variables)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._terminal)

    def type(self, text: str) -> None:
        """Presses keys; "\\x03" is Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self._terminal, text.encode())

    def ask(self, text: str) -> None:
        """Types where a line can be edited; an xterm is told then how to mark a paste."""
        self.expect("\x1b[?2004h")
        self.type(text)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    def echoes(self) -> bool:
        """Whether it shows what is typed, as a shell expects it."""
        return bool(termios.tcgetattr(self._terminal)[3] & termios.ECHO)

    def interrupt(self, then: str) -> None:
        """Presses Ctrl-C, and again where nothing comes of it, until `then` shows up.

        Python's input() does not notice one that comes just before it begins to wait.
        """
        silent = True
        while self.seen.find(then, self._read) < 0:
            if silent:
                self.type("\x03")
            silent = not select.select([self._terminal], [], [], 2.0)[0]
            assert silent or self._more(), f"it ended without {then!r}: {self.seen!r}"
        self.expect(then)

    def expect(self, text: str) -> str:
        """Waits until `text` shows up behind what was expected before; returns what came before it."""
        deadline = time.monotonic() + PATIENCE
        while (place := self.seen.find(text, self._read)) < 0:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.seen!r}"
            assert self._more(), f"it ended without {text!r}: {self.seen!r}"
        before, self._read = self.seen[self._read : place], place + len(text)
        return before

    def end(self) -> int:
        """Waits for its end and returns the exit code."""
        while self._more():
            pass
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def _more(self) -> bool:
        ready, _, _ = select.select([self._terminal], [], [], PATIENCE)
        assert ready, f"it hangs: {self.seen!r}"
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # Linux tells of the end so
            data = b""
        self.seen += data.decode("utf-8", "replace")
        return bool(data)
