"""Ctrl-C and SIGTERM end any command with 130 or 143 and without a traceback, wherever they fall.

Before a command begins and after its end there is nothing to clean up: the process ends at once. While it runs, a
signal becomes an exception (KeyboardInterrupt, SystemExit), so that it cleans up behind itself. Python raises that
between any two lines of anybody's code, so:

- within an import it waits a second for its end: it would come out as an ImportError, or of half a C extension;
- where a bare `except`, or a callback whose errors are dropped, has swallowed it, it is raised again;
- whatever a command that got a signal ends with, such as a file that "is damaged" as its reading was broken off, is
  not reported.

A second signal ends the process at once. Training has its own handlers (`core.interrupt`), which save.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from llama_acc.core.interrupt import EXIT_CODES

_LOOK_AGAIN, _IMPORT_PATIENCE = 0.01, 1.0  # seconds
_IMPORTING = "<frozen importlib._bootstrap>"
_received: signal.Signals | None = None
_since = 0.0
_is_running = False


def watch() -> None:
    """Handles both signals from now on. One that is ignored, as `nohup` and a shell's `&` have it, stays so."""
    for number in EXIT_CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    signal.signal(signal.SIGALRM, _look_again)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)


@contextlib.contextmanager
def command() -> Iterator[None]:
    """While it lasts a signal is an exception; see above."""
    global _is_running
    _is_running = True
    try:
        yield
        if _received is not None:  # the command was faster
            raise KeyboardInterrupt
    finally:
        _is_running = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def received(error: BaseException) -> signal.Signals | None:
    """The signal that a command's error comes of; None if it is one of its own."""
    return _received or (signal.SIGINT if _is_among((KeyboardInterrupt,), error) else None)


def forget() -> None:
    """Goes on after a signal that was no request to end the command. To be called where its exception is handled."""
    global _received
    _received = None
    signal.setitimer(signal.ITIMER_REAL, 0)


def _handle(number: int, frame: FrameType | None) -> None:
    global _received, _since
    if _received is not None or not _is_running:
        os._exit(EXIT_CODES[signal.Signals(number)])
    _received, _since = signal.Signals(number), time.monotonic()
    _look_again(number, frame)


def _look_again(number: int, frame: FrameType | None) -> None:
    if _received is None:
        return
    signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN)
    is_early = time.monotonic() < _since + _IMPORT_PATIENCE
    if (is_early and _is_importing(frame)) or _is_among((KeyboardInterrupt, SystemExit), sys.exc_info()[1]):
        return
    raise KeyboardInterrupt if _received == signal.SIGINT else SystemExit(EXIT_CODES[_received])


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != _IMPORTING:
        frame = frame.f_back
    return frame is not None


def _is_among(kinds: tuple[type[BaseException], ...], error: BaseException | None) -> bool:
    """Whether an error, or one it came of, is of some kinds."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error is not None
