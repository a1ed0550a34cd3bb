"""Ctrl-C and SIGTERM end a run after it has saved; a second one ends it at once."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from llama_acc.core.distributed import environment

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Keeps both signals from processes of this toolkit that are started meanwhile, until they handle them: a Python
    that just begins would end with a traceback. What this process gets comes a moment later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interrupted(BaseException):
    """The run was asked to stop, and has saved. `exit_code` is what the command returns."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received
        self.exit_code = EXIT_CODES[received]


class StopRequest:
    """Set when a signal came in."""

    received: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_signal(note: Callable[[str], None]) -> Iterator[StopRequest]:
    """Collects SIGINT and SIGTERM while the block runs; a second signal ends the process at once. `note` shows a line
    to the user when the first one comes in."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        again = request.received is not None
        request.received = request.received or signal.Signals(number)
        if again and not environment.is_launched():  # a launcher ends this process itself
            os._exit(EXIT_CODES[signal.Signals(number)])
        if not again and environment.is_stopped_by_user():
            # Where standard error is broken, or just being written to, saving still comes first.
            with contextlib.suppress(Exception):
                name = request.received.name
                note(f"{name}: saving after this step, then stopping; again to stop at once without saving")

    try:
        previous = {number: signal.signal(number, handle) for number in EXIT_CODES}
    except ValueError:  # not the main thread: the caller handles signals
        previous = {}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
