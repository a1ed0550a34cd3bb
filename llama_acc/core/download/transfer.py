"""One file: resumed, tried again, checked, and under its name only when it is whole.

While it arrives it is `.NAME.part`; `.NAME.part-info` says what it is a part of.
"""

import contextlib
import errno
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llama_acc.core.checkpoint.files import sync, write_text_whole
from llama_acc.core.download.http import Transient
from llama_acc.core.download.remote import Remote
from llama_acc.core.errors import RunError

GO_ON = "what has arrived is kept: the same command goes on from there"


class Watch(Protocol):
    """Is told how a download goes, by several threads."""

    def begin(self, files: int, total: int | None) -> None:
        """So many files, and bytes of them if known, are to be fetched."""

    def receiving(self, name: str, done: int, total: int | None) -> None:
        """So much of a file is here."""

    def working(self, doing: str, name: str, done: int, total: int) -> None:
        """So many bytes of it have been worked on otherwise: "checking" it, say."""

    def finished(self, name: str) -> None:
        """A file is whole and has its name."""

    def note(self, text: str) -> None:
        """Something on the side."""


class Stopped(Exception):
    """Another file failed, or the user stopped: this one is left where it is."""


class _Mismatch(Exception):
    """What arrived is not what should have."""


@dataclass(frozen=True)
class Patience:
    """How often a failure that may pass is tried again, without a byte in between, and after how long.

    Attributes:
        tries: in all.
        first_wait: seconds; doubled each time.
        longest_wait: seconds.
        longest_asked: seconds a server may ask to wait.
    """

    tries: int = 6
    first_wait: float = 1.0
    longest_wait: float = 30.0
    longest_asked: float = 300.0

    def wait(self, tries: int, asked: float | None) -> float:
        """Seconds before the next try."""
        return min(self.first_wait * 2 ** (tries - 1), self.longest_wait) if asked is None else asked


def fetch(remote: Remote, folder: Path, watch: Watch, stop: threading.Event, patience: Patience | None = None) -> None:
    """Fetches a file into `folder`.

    Raises:
        UserError: it is refused.
        RunError: the network, the disk, or it is not what it should be.
        Stopped: `stop` was set.
    """
    target = folder / remote.name
    part = Part(target, remote.identity)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(remote, part, watch, stop, patience or Patience())
        part.path.touch()  # there may have been no byte to write
        sync(part.path)
        part.path.rename(target)
        part.forget()
        sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"the disk is full: {target.parent}", f"make room; {GO_ON}") from error
        raise RunError(f"cannot write {target}: {error.strerror}") from error
    watch.finished(remote.name)


def _fetch(remote: Remote, part: "Part", watch: Watch, stop: threading.Event, patience: Patience) -> None:
    resumed = part.size > 0
    while True:
        try:
            _receive_patiently(remote, part, watch, stop, patience)
            _check(remote, part, watch)
            return
        except _Mismatch as mismatch:
            part.start_over()
            if (copy := remote.give_up_copy()) is not None:
                watch.note(f"{remote.name}: {mismatch}; the copy in {copy} is damaged: delete it. Fetching it anew")
                continue
            if not resumed:
                hint = "nothing of yours was touched, and what arrived was thrown away"
                raise RunError(f"{remote.name}: {mismatch}", hint) from None
            # What an earlier try left may be at fault, so it is fetched once more from the beginning.
            watch.note(f"{remote.name}: {mismatch}; fetching it anew")
            resumed = False


def _receive_patiently(remote: Remote, part: "Part", watch: Watch, stop: threading.Event, patience: Patience) -> None:
    tries = 0
    while True:
        before = part.size
        try:
            _receive(remote, part, watch, stop)
            return
        except Transient as error:
            tries = 1 if part.size > before else tries + 1
            if tries >= patience.tries:
                raise RunError(f"{remote.name}: {error}; tried {tries} times", GO_ON) from error
            if error.wait is not None and error.wait > patience.longest_asked:
                raise RunError(f"{remote.name}: {error}, and asks to wait {error.wait:.0f} s", GO_ON) from error
            pause = patience.wait(tries, error.wait)
            watch.note(f"{remote.name}: {error}; trying again in {pause:.3g} s")
            if stop.wait(pause):
                raise Stopped from None


def _receive(remote: Remote, part: "Part", watch: Watch, stop: threading.Event) -> None:
    """Appends what is missing to the part, as far as the connection holds."""
    done = part.size
    if remote.size is not None and done == remote.size:
        return
    with remote.open(done, part.validator) as stream:
        if stream.offset != done:
            part.start_over()
            done = stream.offset
        if done and part.validator is None and not remote.digests and stream.total != part.total:
            part.start_over()
            raise Transient("it has changed meanwhile, and is fetched anew")
        total = remote.size if stream.total is None else stream.total
        if remote.size is not None and total != remote.size:
            raise _Mismatch(f"{remote.source} is {total:,} bytes long, and should be {remote.size:,}")
        part.begin(stream.validator, stream.total)
        with part.path.open("ab", buffering=0) as file:
            for chunk in stream.chunks:
                file.write(chunk)
                done += len(chunk)
                if stop.is_set():
                    raise Stopped
                if total is not None and done > total:
                    raise _Mismatch(f"more than the {total:,} bytes it should have arrived")
                watch.receiving(remote.name, done, total)
    if total is not None and done < total:
        raise Transient("the connection ended too early")


def _check(remote: Remote, part: "Part", watch: Watch) -> None:
    size = part.size
    for expected in remote.digests:
        found = expected.of(part.path, lambda done: watch.working("checking", remote.name, done, size))
        if found != expected:
            raise _Mismatch(f"what arrived has {found}, but {expected} was expected")


class Part:
    """What has arrived of a file."""

    def __init__(self, target: Path, identity: str) -> None:
        """A part of something else than `identity` is thrown away."""
        self.path = target.with_name(f".{target.name}.part")
        self._info = target.with_name(f".{target.name}.part-info")
        self._identity = identity
        known = self._read()
        self.validator: str | None = known.get("validator")
        self.total: int | None = known.get("total")
        if known.get("identity") != identity and self.path.exists():
            self.start_over()

    @property
    def size(self) -> int:
        """Bytes that are here."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def begin(self, validator: str | None, total: int | None) -> None:
        """Bytes will be appended, of what the server knows by `validator`, in all `total`."""
        if not self._info.exists() or (validator, total) != (self.validator, self.total):
            self.validator, self.total = validator, total
            known = {"identity": self._identity, "validator": validator, "total": total}
            write_text_whole(self._info, json.dumps(known))

    def start_over(self) -> None:
        """Throws away what is here."""
        self.validator = self.total = None
        self.path.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Removes what is known of it."""
        self._info.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._info.read_text(encoding="utf-8"))
            if isinstance(known, dict):
                return known
        return {}
