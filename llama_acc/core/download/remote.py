"""A file that can be fetched: what is known of it, and how its bytes are asked for."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from llama_acc.core.download.http import Stream

_BLOCK = 1 << 20


class Digest(NamedTuple):
    """What a file's content has to give: SHA-256, or git's identity of a blob."""

    kind: Literal["sha256", "git"]
    hex: str

    def of(self, path: Path, tell: Callable[[int], None] = lambda done: None) -> "Digest":
        """The same of a file. `tell` hears of the bytes read so far."""
        digest = hashlib.sha256() if self.kind == "sha256" else hashlib.sha1(usedforsecurity=False)
        if self.kind == "git":
            digest.update(b"blob %d\0" % path.stat().st_size)
        done = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                done += len(block)
                tell(done)
        return Digest(self.kind, digest.hexdigest())

    def __str__(self) -> str:
        return f"{'SHA-256' if self.kind == 'sha256' else 'git blob'} {self.hex}"


Open = Callable[[int, str | None], AbstractContextManager[Stream]]
"""Bytes from an offset on; the second argument is the validator of what is here already, if there is one."""


@dataclass(frozen=True)
class Remote:
    """A file to fetch.

    Attributes:
        name: its path below the folder it is fetched into, with slashes.
        source: where from, as it may be told and written down: nothing secret in it.
        size: bytes it has to have, if known.
        digests: what its content has to give; may be empty.
        open: asks for its bytes.
        known_as: tells it from others, where the source does not.
        about: bytes it seems to have, where `size` is not known.
        give_up_copy: to be called when what came is not what it should be: if it came from a copy on this machine, the
            next bytes will not, and it says where that is.
    """

    name: str
    source: str
    size: int | None
    digests: tuple[Digest, ...]
    open: Open
    known_as: str | None = None
    about: int | None = None
    give_up_copy: Callable[[], Path | None] = lambda: None

    @property
    def likely_size(self) -> int | None:
        """Bytes to plan with."""
        return self.about if self.size is None else self.size

    @property
    def identity(self) -> str:
        """By which a part that is here already is known to be one of it."""
        return str(self.digests[0]) if self.digests else self.known_as or self.source
