"""The files of one download, several at a time, into one folder."""

import queue
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from filelock import FileLock, Timeout

from llama_acc.core.download.record import NAME as RECORD
from llama_acc.core.download.record import Record
from llama_acc.core.download.remote import Remote
from llama_acc.core.download.transfer import GO_ON, Part, Patience, Stopped, Watch, fetch
from llama_acc.core.errors import LlamaAccError, RunError, UserError, listed
from llama_acc.core.units import size_text

PARALLEL = 4
_LOCK = ".llama-acc-lock"


def fetch_all(
    remotes: Sequence[Remote],
    folder: Path,
    watch: Watch,
    patience: Patience | None = None,
    *,
    meant: Mapping[str, Sequence[str]] = MappingProxyType({}),
    besides: int = 0,
) -> tuple[list[Path], list[Path]]:
    """Fetches what is not in `folder` yet.

    Args:
        remotes: the files.
        folder: where to.
        watch: is told how it goes.
        patience: with failures that may pass.
        meant: addresses, and the names of all files that each means: noted when they are there.
        besides: bytes that will be written when they are there.

    Returns:
        All the files, and those of them that were fetched now.

    Raises:
        UserError: a file of the user's is in the way, too little disk, or a refusal.
        RunError: the network or the disk.
    """
    _check_names(remotes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder, watch):
            record = Record(folder)
            missing = _missing(remotes, record, watch)
            _check_disk(missing, folder, besides if missing else 0)
            if missing:
                sizes = [remote.likely_size for remote in missing if remote.likely_size is not None]
                watch.begin(len(missing), sum(sizes) if len(sizes) == len(missing) else None)
                _in_parallel(missing, record, watch, patience)
            for address, names in meant.items():
                record.finish(address, names)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}", "give another folder with --to DIR") from error
    return [folder / remote.name for remote in remotes], [folder / remote.name for remote in missing]


def _check_names(remotes: Sequence[Remote]) -> None:
    """Refuses names, which servers give, that lead out of the folder or are those of our own files."""
    for remote in remotes:
        path = PurePosixPath(remote.name)
        if path.is_absolute() or not path.parts or ".." in path.parts or path.name in (RECORD, _LOCK):
            raise UserError(f"{remote.source} would be called {remote.name!r} here, which is no name for a download")


class alone:
    """Keeps a second download out of the same folder: it waits, then finds the files there."""

    def __init__(self, folder: Path, watch: Watch) -> None:
        self._folder, self._watch = folder, watch
        self._lock = FileLock(folder / _LOCK)

    def __enter__(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._watch.note(f"waiting for another download into {self._folder}")
            self._lock.acquire()
        except NotImplementedError:
            pass  # some network file systems have no locks: two downloads into one folder are then the user's affair

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


def _missing(remotes: Sequence[Remote], record: Record, watch: Watch) -> list[Remote]:
    missing, in_the_way = [], []
    for remote in remotes:
        path = record.folder / remote.name
        if record.holds(remote):
            continue
        if not path.exists():
            missing.append(remote)
        elif (problem := _difference(remote, path, record, watch)) is None:
            record.add(remote)
            watch.note(f"{path} was here already, and is what would be fetched")
        else:
            in_the_way.append(f"{path}: {problem}")
    if in_the_way:
        raise UserError(
            f"these files are here, and are not what would be fetched:\n{listed(in_the_way)}",
            "nothing was changed. Move them away, or give another folder with --to DIR",
        )
    return missing


def _difference(remote: Remote, path: Path, record: Record, watch: Watch) -> str | None:
    """How a file that is here differs from the remote one; None if it is the same as far as can be known."""
    if not path.is_file():
        return "it is no file"
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"it has {size:,} bytes, {remote.source} has {remote.size:,}"
    for expected in remote.digests:
        found = expected.of(path, lambda done: watch.working("checking", remote.name, done, size))
        if found != expected:
            return f"its {found} is not the {expected} of {remote.source}"
    if not remote.digests and (record.knows(remote.name) or remote.size is None):
        return f"whether it is {remote.source} cannot be known"
    return None


def _check_disk(remotes: Sequence[Remote], folder: Path, besides: int) -> None:
    needed = besides + sum(
        max(0, (remote.likely_size or 0) - Part(folder / remote.name, remote.identity).size) for remote in remotes
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"too little disk for {folder}: {size_text(needed)} are to come"
            + (f", {size_text(besides)} of them when it is converted" if besides else "")
            + f"; {size_text(free)} are free",
            "make room, or give a folder on another disk with --to DIR or LLAMA_ACC_HOME",
        )


def _in_parallel(remotes: Sequence[Remote], record: Record, watch: Watch, patience: Patience | None) -> None:
    """Fetches all; a refusal stops the others, a failure of one lets them come to their end."""
    stop, waiting, outcomes = threading.Event(), queue.SimpleQueue[Remote](), queue.SimpleQueue[Exception | None]()
    for remote in remotes:
        waiting.put(remote)
    # Daemons: after a Ctrl-C the program ends, even while one of them waits for a silent server.
    for _ in range(min(PARALLEL, len(remotes))):
        threading.Thread(target=_work, args=(waiting, outcomes, record, watch, stop, patience), daemon=True).start()
    errors: list[Exception] = []
    try:
        for _ in remotes:
            outcome = outcomes.get()
            if outcome is not None:
                errors.append(outcome)
                if not isinstance(outcome, RunError):
                    stop.set()
    finally:
        stop.set()
    _raise_worst(errors)


def _work(
    waiting: "queue.SimpleQueue[Remote]",
    outcomes: "queue.SimpleQueue[Exception | None]",
    record: Record,
    watch: Watch,
    stop: threading.Event,
    patience: Patience | None,
) -> None:
    while True:
        try:
            remote = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            if stop.is_set():
                raise Stopped
            fetch(remote, record.folder, watch, stop, patience)
            record.add(remote)
            outcomes.put(None)
        except Exception as error:  # whatever it is, the thread that waits raises it
            outcomes.put(error)


def _raise_worst(errors: Sequence[Exception]) -> None:
    """Raises what went wrong; several failures of one kind as one."""
    told = [error for error in errors if not isinstance(error, Stopped)]
    for error in told:
        if not isinstance(error, RunError):
            raise error
    if len(told) > 1:
        messages = [error.message for error in told if isinstance(error, LlamaAccError)]
        raise RunError(f"{len(told)} files did not come:\n{listed(messages)}", GO_ON)
    if told:
        raise told[0]
