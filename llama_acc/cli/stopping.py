"""SIGTERM as an exception, for commands that write something and clean up behind themselves."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def leave_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as an exception does, so that nothing unfinished stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
