"""Downloading, from Hugging Face and from plain addresses; see hugging_face.py for how they are asked.

A file arrives below `.incoming/` of its folder, is compared with the size and hash known of it, and is renamed into
place. An interrupted file of Hugging Face is begun anew (huggingface_hub resumes within one process only), one of a
plain address is resumed.
"""

import contextlib
import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from llama_acc.core import atomic
from llama_acc.core.catalogue import (
    INCOMING,
    RECORD,
    DownloadRequest,
    File,
    HubAddress,
    WebAddress,
    files_here,
    parse_address,
    read_record,
    resolve,
)
from llama_acc.core.distributed.environment import in_background
from llama_acc.core.errors import LlamaAccError, RunError, UserError, listed
from llama_acc.core.hugging_face import (
    REACH_SECONDS,
    RESUME_HINT,
    HuggingFace,
    Note,
    Progress,
    explained,
    http_client,
    progress_bar,
    within,
)
from llama_acc.core.input_files import home
from llama_acc.core.text import size_text

RETRY_WAITS = (2.0, 8.0, 32.0)
"""Seconds before a plain address is asked again where huggingface_hub's own client gave up."""
_AS_IT_IS = {"accept-encoding": "identity"}  # not compressed on the way: sizes and ranges are those of the file itself
_PARALLEL = 4
_LOCK = f"{RECORD}.lock"


class Downloaded(NamedTuple):
    """A finished download: where it is, all its files, and those of them that were not there before.

    A model is taken by `--pretrained`, anything else by `--data`.
    """

    request: DownloadRequest
    is_model: bool
    folder: Path
    files: tuple[Path, ...]
    fetched: tuple[Path, ...]


class _RemoteFile(NamedTuple):
    """A file to fetch: its path below the folder, where from (nothing secret in it), and what is known of it.

    `fetch` gets all of it into a file, with progress; True: without using what is there of it already.
    """

    name: str
    source: str
    size: int | None
    digests: Sequence[str]
    fetch: Callable[[Path, Progress, bool], None]


def fetch_data(address: str, progress: Progress = lambda *_: None, note: Note = lambda _: None) -> list[Path]:
    """The files of an address such as `hf:datasets/owner/name/train-*.jsonl`, sorted; what is missing is fetched.

    What was fetched before is found without the network.

    Raises:
        UserError: it is unknown, gated or absent, or the disk is too small.
        RunError: the network or the disk failed.
    """
    (request,) = resolve([address], None)
    return sorted(Downloader(progress, note).download(request).files)


class Downloader:
    """Downloads one thing after the other; a token is looked for once."""

    def __init__(self, progress: Progress, note: Note, token: str | None = None) -> None:
        """`progress` is called as bytes arrive or are checked; `token` is for Hugging Face, from the command line."""
        self._progress, self._note, self._token = progress, note, token

    @functools.cached_property
    def _hub(self) -> HuggingFace:
        return HuggingFace(self._token, self._note)

    def download(self, request: DownloadRequest) -> Downloaded:
        """Fetch what is not there yet.

        Raises:
            UserError: it is unknown, gated or absent, a file is in the way, or the disk is too small.
            RunError: the network or the disk failed.
        """
        places = _places(request)
        for is_model, folder in places.items():
            if (files := files_here(folder, request.files)) is not None:
                return Downloaded(request, is_model, folder, tuple(files), ())
        groups = [self._remote_files(request, file) for file in request.files]
        is_model = groups[0][0] if len(places) > 1 else next(iter(places))
        folder, remote = places[is_model], [file for _, group in groups for file in group]
        for file in remote:
            parts = PurePosixPath(file.name).parts
            if file.name.startswith("/") or ".." in parts or not parts or parts[0] in (RECORD, _LOCK, INCOMING):
                raise UserError(f"{file.source} would be called {file.name!r} here, which is not a name for a download")
        with _incoming(folder), locked(folder, self._note):
            missing = self._missing(remote, folder)
            needed, free = sum(file.size or 0 for file in missing), shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(
                    f"too little disk for {folder}: {size_text(needed)} are to come, {size_text(free)} are free",
                    "make room, or give a folder on another disk with --to DIR or LLAMA_ACC_HOME",
                )
            self._fetch_all(missing, folder)
            record = read_record(folder)
            for asked, (_, group) in zip(request.files, groups, strict=True):
                sizes = {file.name: (folder / file.name).stat().st_size for file in group}
                record[parse_address(asked.get).identity] = sizes
            atomic.write_text_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")
            shutil.rmtree(folder / INCOMING, ignore_errors=True)
        paths, fetched = (tuple(folder / file.name for file in files) for files in (remote, missing))
        return Downloaded(request, is_model, folder, paths, fetched)

    def _remote_files(self, request: DownloadRequest, asked: File) -> tuple[bool, list[_RemoteFile]]:
        """Whether they are a model's, and the files that an address means."""
        known = [f"sha256:{asked.sha256}"] if asked.sha256 else [f"git:{asked.git_blob}"] if asked.git_blob else []
        address = parse_address(asked.get)
        if isinstance(address, WebAddress):
            size, mark = _ask(address)
            fetch = functools.partial(_fetch_web, address, size, mark, self._note)
            return False, [
                _RemoteFile(asked.name or address.file_name, str(address), asked.bytes or size, known, fetch)
            ]
        kind, commit, found = self._hub.list_files(address)
        # The catalogue's files lie flat; those of an address as in the repository, or below --to without the folder
        # that all of them are in.
        inside = f"{address.fixed_folder}/" if request.to is not None and address.fixed_folder else ""
        files = []
        for path, size, digest in found:
            name = asked.name or (path.removeprefix(inside) if request.entry is None else PurePosixPath(path).name)
            source = HubAddress(address.repo, kind, commit, path)
            fetch = functools.partial(self._hub.fetch, source, name, size)
            files.append(_RemoteFile(name, str(source), size, list(dict.fromkeys([digest, *known])), fetch))
        return kind == "model", files

    def _missing(self, remote: Sequence[_RemoteFile], folder: Path) -> list[_RemoteFile]:
        """The files that are not here; one that is the right one is taken as it is, whoever put it there. Others in the
        way are a UserError."""
        recorded = {name for names in read_record(folder).values() for name in names}
        missing, in_the_way = [], []
        for file in remote:
            path = folder / file.name
            if not os.path.lexists(path):
                missing.append(file)
                continue
            problem = self._mismatch(file, path) if path.is_file() else "it is not a file"
            if problem is None and not file.digests and (file.name in recorded or file.size is None):
                problem = f"whether it is {file.source} cannot be known"
            if problem is not None:
                in_the_way.append(f"{path}: {problem}")
        if in_the_way:
            raise UserError(
                f"these files are here, and are not what would be fetched:\n{listed(in_the_way)}",
                "nothing was changed. Move them away, or give another folder with --to DIR",
            )
        return missing

    def _mismatch(self, file: _RemoteFile, path: Path) -> str | None:
        """How a file differs from the remote one; None if it does not, as far as can be known."""
        size = path.stat().st_size
        if file.size is not None and size != file.size:
            return f"it has {size:,} bytes, and {file.source} has {file.size:,}"
        for expected in file.digests:
            kind = expected.partition(":")[0]
            found = atomic.digest_of(path, kind, lambda done: self._progress(f"checking {file.name}", done, size))
            if f"{kind}:{found}" != expected:
                return f"it has {kind}:{found}, and {file.source} has {expected}"
        return None

    def _fetch_all(self, files: Sequence[_RemoteFile], folder: Path) -> None:
        """Fetch several side by side. A refusal ends it; a failure that may pass lets the others come to their end."""
        waiting, stopped, failed = iter(files), threading.Event(), list[RunError]()

        def progress(label: str, done: int, total: int | None) -> None:
            if stopped.is_set():
                raise _Stopped
            self._progress(label, done, total)

        def work() -> None:
            for file in waiting:
                try:
                    self._fetch(file, folder, progress)
                except RunError as error:
                    failed.append(error)

        try:
            for worker in as_completed([in_background(work) for _ in range(min(_PARALLEL, len(files)))]):
                worker.result()
        finally:
            stopped.set()
        if len(failed) > 1:
            messages = listed([error.message for error in failed])
            raise RunError(f"{len(failed)} files could not be fetched:\n{messages}", RESUME_HINT)
        if failed:
            raise failed[0]

    def _fetch(self, file: _RemoteFile, folder: Path, progress: Progress) -> None:
        """Fetch a file, compare it with what is known of it, and rename it into place."""
        part, target = folder / INCOMING / file.name, folder / file.name
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            for anew in (False, True):
                file.fetch(part, progress, anew)
                problem = self._mismatch(file, part)
                if problem is None:
                    break
                part.unlink()
                if anew:
                    raise RunError(f"{file.name}: {problem}", "it was thrown away; nothing of yours was touched")
                # What an earlier try or huggingface_hub's cache had of it may be at fault.
                self._note(f"{file.name}: {problem}; fetching it anew")
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic.publish(part, target)
        except OSError as error:
            raise RunError(f"cannot write {target}: {error.strerror or error}", RESUME_HINT) from error


class _Stopped(Exception):
    """Another file was refused, or the user stopped."""


def _places(request: DownloadRequest) -> dict[bool, Path]:
    """Where it may land, by whether it is a model; the likelier first."""
    address = parse_address(request.files[0].get)
    if request.entry is not None:
        return {request.entry.is_model: request.to or request.entry.raw_folder}
    if isinstance(address, WebAddress):
        return {False: request.to or home() / "data"}
    return {
        is_model: request.to or home() / ("models" if is_model else "data") / address.folder
        for is_model in ([True, False] if address.kind is None else [address.kind == "model"])
    }


@contextlib.contextmanager
def _incoming(folder: Path) -> Iterator[None]:
    """Make a folder with its `.incoming/`; without content they go again."""
    try:
        (folder / INCOMING).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}", "give another with --to DIR") from error
    try:
        yield
    finally:
        for path in (folder / INCOMING, folder):
            with contextlib.suppress(OSError):
                path.rmdir()


def locked(folder: Path, note: Note) -> contextlib.AbstractContextManager[None]:
    """Keep a second download out of the same folder: it waits, then finds the files there."""
    return atomic.locked(folder / _LOCK, lambda: note(f"waiting for another download into {folder}"))


# Plain addresses


def _ask(address: WebAddress) -> tuple[int | None, str]:
    """The size that a host gives of a file, and its mark of the content (ETag or date); None and "" if it says none."""
    with explained(address, address.host, functools.partial(_refusal, address)):
        ask = functools.partial(http_client().head, address.url, headers=_AS_IT_IS, timeout=REACH_SECONDS - 1)
        response = within(REACH_SECONDS, address.host, ask)
    headers = response.headers if response.is_success else {}
    is_page = headers.get("content-type", "").startswith("text/html")
    if is_page and PurePosixPath(address.file_name).suffix not in (".html", ".htm", ""):
        hint = "give the address of the file itself: that of its button 'raw' or 'download'"
        raise UserError(f"{address} is a web page, not the file it shows", hint)
    size, etag = headers.get("content-length", ""), headers.get("etag", "")
    mark = headers.get("last-modified", "") if etag.startswith("W/") else etag or headers.get("last-modified", "")
    return int(size) if size.isdecimal() and int(size) else None, mark


def _fetch_web(
    address: WebAddress, size: int | None, mark: str, note: Note, part: Path, progress: Progress, anew: bool
) -> None:
    """Fetch a file, from the byte on that is missing if what is there of it is known to be of the same content.

    `.NAME.from` beside the part says what it is a part of: the address and the server's mark.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    origin, known = part.with_name(f".{part.name}.from"), f"{address.identity}\n{mark}"
    if anew or not mark or not origin.is_file() or origin.read_text(encoding="utf-8") != known:
        part.unlink(missing_ok=True)
    origin.write_text(known, encoding="utf-8")
    headers, bar = _AS_IT_IS | ({"if-range": mark} if mark else {}), progress_bar(part.name, size, progress)
    with explained(address, address.host, functools.partial(_refusal, address)):
        for seconds in (*RETRY_WAITS, None):
            try:
                with part.open("ab") as file:
                    if not file.tell() or file.tell() != size:
                        http_get(address.url, file, resume_size=file.tell(), headers=headers, tqdm_class=bar)
                break
            except (httpx2.TransportError, HfHubHTTPError) as error:
                if seconds is None or (isinstance(error, HfHubHTTPError) and error.response.status_code < 500):
                    raise
                note(f"{part.name}: {type(error).__name__}; trying again in {seconds:g} s")
                time.sleep(seconds)
    origin.unlink()


def _refusal(address: WebAddress, error: Any) -> LlamaAccError:
    """What an answer of 4xx or 5xx means."""
    code, host = error.response.status_code, error.response.url.host
    if code in (404, 410):
        return UserError(f"there is nothing at {address} ({code})", "check the address; does it open in a browser?")
    if code in (401, 403):
        hint = "it may want a login: fetch it with a browser, and give finetune the file"
        return UserError(f"{host} does not give out {address} ({code})", hint)
    return RunError(f"{host} refuses {address}: {code}", RESUME_HINT)
