"""Opens what the user names so that nothing can hang, and reads small JSON and YAML files within bounds.

Every reader of settings, shapes, templates and notes beside weights goes through `read_json` or `read_yaml`: a file of
another kind, or one that was made to harm, ends in a UserError whatever it holds. Imports no torch.
"""

import io
import json
import logging
import os
import select
import stat
from collections.abc import Callable
from errno import EISDIR, ENXIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_acc.core.errors import UserError

if TYPE_CHECKING:
    from yaml import SafeLoader

MAX_BYTES = 1 << 26
"""Of a small JSON file: the largest tokenizer.json takes half of that."""
MAX_YAML_BYTES = 1 << 20
MAX_DEPTH = 100
"""How deep lists and mappings may be nested."""
MAX_VALUES = 5_000_000
"""In one file. A few lines of YAML's aliases can stand for any number of values."""
MAX_INTEGER = 10**40
"""transformers writes 10**30 for "no limit"."""

PIPE_NOTE_SECONDS, PIPE_LIMIT_SECONDS = 10.0, 60.0
"""When a pipe that gives nothing is reported, and when it is given up."""

_logger = logging.getLogger("llama_acc")


def home() -> Path:
    """The folder of downloads and caches: `LLAMA_ACC_HOME`, else `llama-acc` in the XDG data folder."""
    chosen = os.environ.get("LLAMA_ACC_HOME")
    if chosen:
        return Path(chosen).expanduser()
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    # The XDG specification says a relative path there is to be ignored.
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "llama-acc"


def open_input(path: Path, *, pipes: bool = True) -> io.FileIO | io.BufferedReader:
    """Opens a regular file, or a pipe, for reading. A pipe may keep silent for a limited time only; where a file is
    read twice or out of order, pipes will not do.

    Raises:
        OSError: it is missing, cannot be read, or is a folder, socket or device; TimeoutError from a silent pipe.
    """
    mode = os.stat(path).st_mode  # a device may act on being opened
    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
        code, name = (EISDIR, "a folder") if stat.S_ISDIR(mode) else (ENXIO, "a socket or a device")
        raise OSError(code, f"it is {name}, not a file", str(path))
    if stat.S_ISFIFO(mode) and not pipes:
        raise OSError(ENXIO, "it is a pipe, and has to be a file: save what comes out of it first", str(path))
    # Otherwise a pipe without a writer is not even opened.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return io.BufferedReader(_Pipe(descriptor, path))
    os.set_blocking(descriptor, True)
    return io.FileIO(descriptor)


class _Pipe(io.RawIOBase):
    """A pipe's reading end that waits for its writer, but not for ever."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if not poll.poll(PIPE_NOTE_SECONDS * 1000):
            wait = PIPE_LIMIT_SECONDS - PIPE_NOTE_SECONDS
            _logger.warning("waiting for something to be written to the pipe %s, %g s more", self._path, wait)
            if not poll.poll(wait * 1000):
                raise TimeoutError(None, f"nothing was written to this pipe for {PIPE_LIMIT_SECONDS:g} s")
        return os.readv(self._descriptor, [buffer])

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """The content of a file of at most `most` bytes."""
    data = bytearray()
    try:
        with open_input(path) as file:
            while len(data) <= most and (piece := file.read(most + 1 - len(data))):
                data += piece
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > most:
        raise UserError(f"cannot read {path}: it is longer than {most >> 20} MiB, so it is a file of another kind")
    return bytes(data)


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """The UTF-8 text of a small file, without a byte order mark; UserErrors as `read_bytes`, or for another text."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 at byte {error.start}") from error


def read_json(path: Path) -> Any:
    """The value in a small JSON file; UserErrors as `read_text`, or if it is not JSON within the bounds above."""
    text = read_text(path)
    try:
        return _bounded(lambda: json.loads(text), str(path))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"cannot read {path}: it is not JSON: {place}: {error.msg}") from error


def read_object(path: Path, optional: bool = False) -> dict[str, Any]:
    """The mapping in a small JSON file, `optional`: empty where there is no file; UserErrors as `read_json`, or if it
    holds something else."""
    value = {} if optional and not path.exists() else read_json(path)
    if not isinstance(value, dict):
        raise UserError(f'cannot read {path}: it must hold a JSON object such as {{"key": value, ...}}')
    return value


def read_yaml(path: Path, loader: "type[SafeLoader] | None" = None) -> Any:
    """The value in a small YAML file; UserErrors as `read_json`, for YAML."""
    return parse_yaml(read_text(path, MAX_YAML_BYTES), str(path), loader)


def parse_yaml(text: str, name: str, loader: "type[SafeLoader] | None" = None) -> Any:
    """The value of a YAML text; see `read_yaml`. `name` is for messages."""
    import yaml  # takes a while

    try:
        return _bounded(lambda: yaml.load(text, loader or yaml.SafeLoader), name)
    except yaml.YAMLError as error:
        problem = str(error).replace("<unicode string>", name)
        raise UserError(f"cannot read {name}: it is not YAML: {problem}") from error


def _bounded(parse: Callable[[], Any], name: str) -> Any:
    """What a parser makes, level by level within the limits; what an alias stands for counts each time."""
    too_deep = UserError(f"cannot read {name}: lists or mappings are nested more than {MAX_DEPTH} deep")
    try:
        value = parse()
    except RecursionError as error:
        raise too_deep from error
    except json.JSONDecodeError:
        raise
    except (ValueError, OverflowError) as error:  # more digits than Python takes, dates that there are not
        raise UserError(f"cannot read {name}: {error}") from error
    level, depth, count = [value], 0, 1
    while level:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, int) and abs(item) > MAX_INTEGER:
                raise UserError(f"cannot read {name}: it holds a whole number of more than 40 digits")
            if isinstance(item, (dict, list, tuple, set)):
                if depth == MAX_DEPTH:
                    raise too_deep
                count += len(item)
                if count > MAX_VALUES:
                    raise UserError(f"cannot read {name}: it holds more than {MAX_VALUES:,} values")
                inner.extend(item.values() if isinstance(item, dict) else item)
        level, depth = inner, depth + 1
    return value
