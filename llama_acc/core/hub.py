"""Downloading: huggingface_hub fetches what is on Hugging Face, and with its HTTP client the files at plain addresses.

A file arrives below `.incoming/` of its folder, is compared with the size and hash known of it, and is renamed into
place. An interrupted file of Hugging Face is begun anew (huggingface_hub resumes within one process only), one of a
plain address is resumed. It is imported when it is needed.
"""

import contextlib
import fnmatch
import functools
import ipaddress
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed, wait
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from llama_acc.core import atomic
from llama_acc.core.catalogue import (
    INCOMING,
    RECORD,
    DownloadRequest,
    File,
    HubAddress,
    Kind,
    WebAddress,
    catalogue,
    files_here,
    parse_address,
    read_record,
    resolve,
)
from llama_acc.core.distributed.environment import in_background
from llama_acc.core.errors import LlamaAccError, RunError, UserError, did_you_mean, listed
from llama_acc.core.input_files import home
from llama_acc.core.text import size_text

if TYPE_CHECKING:
    import httpx2

Progress = Callable[[str, int, int | None], None]
"""(what is worked on, bytes done, bytes in all if known); called by several threads."""
Note = Callable[[str], None]
_T = TypeVar("_T")

RESUME_HINT = "files that came whole are kept: the same command fetches the rest"
REACH_SECONDS = 7.0
"""Within this time a host has to be found and to answer for the first time; else we are off-line."""
RETRY_WAITS = (2.0, 8.0, 32.0)
"""Seconds before a plain address is asked again where huggingface_hub's own client gave up."""
_AS_IT_IS = {"accept-encoding": "identity"}
"""Not compressed on the way: sizes and ranges are those of the file itself."""
_PARALLEL = 4
_LOCK = f"{RECORD}.lock"
# Of a whole model that has its weights as safetensors, what holds the same weights again.
_SAME_WEIGHTS = re.compile(
    r".*(\.bin|\.bin\.index\.json|\.h5|\.msgpack|\.ot|\.gguf|\.onnx|\.tflite|\.mlmodel)|original/.*|(onnx|openvino|coreml)/.*"
    r"|consolidated\.safetensors"
)
_TOKEN_HINT = "give it in HF_TOKEN, once with `hf auth login`, or to `llama-acc download` with --token"


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
        """Args:
        progress: is called as bytes arrive or are checked.
        note: is given lines for the user.
        token: for Hugging Face, from the command line.
        """
        self._progress, self._note, self._token = progress, note, token

    @functools.cached_property
    def _hub(self) -> "_Hub":
        return _Hub(self._token, self._note)

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
        """The files that are not here; one that is the right one is taken as it is, whoever put it there.

        Raises:
            UserError: other files are in the way.
        """
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


# The network


def _within(seconds: float, host: str, ask: Callable[[], _T]) -> _T:
    """The first question to a host, given up after `seconds`: looking up a name has no time limit of its own.

    Raises:
        RunError: no answer: we are off-line, or it is.
    """
    answer = in_background(ask)
    if not wait([answer], seconds).done:
        raise _unreachable(host, f"no answer within {seconds:g} s")
    return answer.result()


def _unreachable(host: str, why: object) -> RunError:
    """A host that did not answer the first question: we are off-line, or it is, or someone stands in between."""
    if "CERTIFICATE_VERIFY_FAILED" in str(why):
        hint = "does a firewall look into connections here? Name its certificate in SSL_CERT_FILE"
        return RunError(f"{host} does not prove to be {host}: {why}", hint)
    # Python puts the number of a system's error in front of its words.
    said = re.sub(r"^\[Errno -?\d+\] ", "", str(why)) or "no answer"
    hint = "is this machine on-line? A proxy is taken from HTTPS_PROXY, a mirror of Hugging Face from HF_ENDPOINT"
    return RunError(f"{host} cannot be reached: {said}", hint)


def refuse_redirect_inwards(response: "httpx2.Response") -> None:
    """An event hook of httpx: a public host may not send us on to this machine or its network.

    Raises:
        UserError: it does.
    """
    if not response.has_redirect_location:
        return
    here = response.request.url
    there = here.join(response.headers["location"])
    if there.host != here.host and _is_internal(there.host) and not _is_internal(here.host):
        raise UserError(
            f"{here.host} sends on to {there.host}, an address of this machine or its network: refused",
            "if it is what you want, give that address itself",
        )


def _is_internal(host: str) -> bool:
    """Whether a host's name or number is of a loopback, private or otherwise not public address."""
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False  # it cannot be reached either, or only a proxy knows it
    return any(not ipaddress.ip_address(address).is_global for address in found)


def http_client() -> "httpx2.Client":
    """huggingface_hub's client: proxies, redirects (to other hosts without the Authorization header), time limits."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # its warnings show signed addresses
    constants.HF_HUB_DISABLE_TELEMETRY = True
    constants.DOWNLOAD_CHUNK_SIZE = 2**18  # with 10 MB, a slow connection shows nothing for minutes
    client = get_session()
    client.event_hooks = {**client.event_hooks, "response": [refuse_redirect_inwards]}
    return client


@contextlib.contextmanager
def _explained(source: object, host: str, refusal: Callable[[Any], LlamaAccError]) -> Iterator[None]:
    """Turn the errors of huggingface_hub and its client into ours.

    Args:
        source: what is asked for.
        host: who is asked.
        refusal: our error for an answer of 4xx or 5xx.
    """
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        # Of a question that failed while a file was fetched, the reason is the cause.
        hides_reason = isinstance(error, errors.LocalEntryNotFoundError | ValueError) and error.__cause__ is not None
        reason = error.__cause__ if hides_reason else error
        if isinstance(reason, errors.OfflineModeIsEnabled):
            raise UserError("HF_HUB_OFFLINE is set: nothing is asked of the network", "unset it") from error
        if isinstance(reason, errors.HfHubHTTPError):
            raise refusal(reason) from None  # it shows whole addresses
        unreached = httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError | ConnectionError
        if isinstance(reason, unreached):
            raise _unreachable(host, reason) from error
        if isinstance(reason, OSError) and reason.errno is not None:
            raise  # the disk
        # hf_xet's errors, too, are bare ones.
        hint = f"{RESUME_HINT}. If chunk storage (xet) is kept from you, set HF_HUB_DISABLE_XET=1"
        raise RunError(f"{source}: {str(reason).partition(chr(10))[0] or type(reason).__name__}", hint) from error


# Plain addresses


def _ask(address: WebAddress) -> tuple[int | None, str]:
    """The size that a host gives of a file, and its mark of the content (ETag or date); None and "" if it does not say.

    Raises:
        UserError: it is a web page.
        RunError: the network.
    """
    with _explained(address, address.host, functools.partial(_refusal, address)):
        ask = functools.partial(http_client().head, address.url, headers=_AS_IT_IS, timeout=REACH_SECONDS - 1)
        response = _within(REACH_SECONDS, address.host, ask)
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

    Raises:
        UserError: the server refuses.
        RunError: the network fails again and again.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get

    origin, known = part.with_name(f".{part.name}.from"), f"{address.identity}\n{mark}"
    if anew or not mark or not origin.is_file() or origin.read_text(encoding="utf-8") != known:
        part.unlink(missing_ok=True)
    origin.write_text(known, encoding="utf-8")
    headers, bar = _AS_IT_IS | ({"if-range": mark} if mark else {}), _progress_bar(part.name, size, progress)
    with _explained(address, address.host, functools.partial(_refusal, address)):
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


# Hugging Face


class _NoRepository(UserError):
    """There is none of this name and kind, or it is private."""


class _Hub:
    """Hugging Face, or the mirror HF_ENDPOINT names, by huggingface_hub."""

    def __init__(self, given_token: str | None, note: Note) -> None:
        from huggingface_hub import HfApi, get_token

        http_client()
        implicit = os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() not in ("1", "ON", "YES", "TRUE")
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.host = urlsplit(self.endpoint).hostname or self.endpoint
        self.token = given_token if given_token is not None else get_token() if implicit else None
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise UserError(
                "the token holds white space or characters that no token has",  # nor can a header
                "is a shell variable not set, or a line break copied? It looks like hf_...",
            )
        self._note = note
        self._api: HfApi = HfApi(endpoint=self.endpoint, token=self.token or False, library_name="llama-acc")

    def list_files(self, address: HubAddress) -> tuple[Kind, str, list[tuple[str, int, str]]]:
        """The kind of a repository, its commit, and the (path, size, digest) of each file an address means, sorted.

        Raises:
            UserError: no such repository, revision or file, or no access.
            RunError: the network.
        """
        kind, commit = self._commit(address)
        files = self._tree(address, kind, commit, address.fixed_folder)
        if address.path:
            inside = f"{address.path}/"
            files = [one for one in files if one[0].startswith(inside) or fnmatch.fnmatchcase(one[0], address.path)]
        if not files:
            paths = [path for path, *_ in self._tree(address, kind, commit, "")]
            deeper = [path for path in paths if PurePosixPath(path).name == PurePosixPath(address.path).name]
            near = f"did you mean {deeper[0]!r}?" if deeper else did_you_mean(address.path, paths)
            message = f"{address.repo} holds nothing named {address.path} (404)"
            raise UserError(message, near or f"it holds:\n{listed(paths, most=8)}")
        has_safetensors = any(re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", path) for path, *_ in files)
        left_out = [path for path, *_ in files if _SAME_WEIGHTS.fullmatch(path)]
        if kind == "model" and not address.path and has_safetensors and left_out:
            files = [file for file in files if file[0] not in left_out]
            some = ", ".join(left_out[:4]) + ", ..." * (len(left_out) > 4)
            self._note(f"left out, as the same weights are there as safetensors: {some}")
        return kind, commit, files

    def _commit(self, address: HubAddress) -> tuple[Kind, str]:
        """What kind of repository it is, and its commit. A model, if both exist."""
        kinds: list[Kind] = [address.kind] if address.kind else ["model", "dataset"]
        for kind in kinds:
            ask = functools.partial(self._api.repo_info, address.repo, repo_type=kind, revision=address.revision)
            with contextlib.suppress(_NoRepository), self._explained(address):
                info = _within(REACH_SECONDS, self.host, functools.partial(ask, timeout=REACH_SECONDS - 1))
                return kind, str(info.sha)
        raise self._no_such_repository(address)

    def _tree(self, address: HubAddress, kind: Kind, commit: str, folder: str) -> list[tuple[str, int, str]]:
        """All files in a folder, sorted; none, if there is no such folder."""
        from huggingface_hub.errors import RemoteEntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        ask = functools.partial(self._api.list_repo_tree, address.repo, folder or None, revision=commit)
        with self._explained(address), contextlib.suppress(RemoteEntryNotFoundError):
            return sorted(
                (entry.path, entry.size, f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}")
                for entry in ask(recursive=True, repo_type=kind)
                if isinstance(entry, RepoFile)
            )
        return []

    def fetch(self, source: HubAddress, name: str, size: int, part: Path, progress: Progress, anew: bool) -> None:
        """Fetch a file of a repository, by its commit, into `part`; `name` is for progress."""
        from huggingface_hub import hf_hub_download

        folder = part.with_name(f".{part.name}.hub")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with self._explained(source):
                came = hf_hub_download(
                    source.repo,
                    source.path,
                    repo_type=source.kind,
                    revision=source.revision,
                    local_dir=folder,
                    endpoint=self.endpoint,
                    token=self.token or False,
                    force_download=anew,
                    tqdm_class=_progress_bar(name, size, progress),
                )
            Path(came).rename(part)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _explained(self, address: HubAddress) -> contextlib.AbstractContextManager[None]:
        return _explained(address, self.host, functools.partial(self._refusal, address))

    def _no_such_repository(self, address: HubAddress) -> UserError:
        import httpx2

        known = [file.get for entry in catalogue().values() for file in entry.files]
        repos = {match[1] for get in known if (match := re.match(r"hf:(?:datasets/)?([^/]+/[^/]+)", get))}
        with contextlib.suppress(httpx2.HTTPError):
            for listing in (self._api.list_models, self._api.list_datasets):
                repos |= {str(found.id) for found in listing(author=address.repo.partition("/")[0], limit=200)}
        near = did_you_mean(address.repo, repos)
        private = "private one is seen with a token of its owner only: --token, HF_TOKEN or `hf auth login`"
        return UserError(f"{self.host} has no {address.repo} (404)", f"{near} A {private}" if near else f"a {private}")

    def _refusal(self, address: HubAddress, error: Any) -> LlamaAccError:
        """What an answer of 4xx or 5xx means."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        code, host, settings = error.response.status_code, error.response.url.host, f"{self.endpoint}/settings/tokens"
        if isinstance(error, GatedRepoError):
            page = f"{self.endpoint}/{'datasets/' * (address.kind == 'dataset')}{address.repo}"
            why = "no token was sent" if self.token is None else "the token's account has no access to it (yet)"
            return UserError(
                f"{address.repo} is gated: its owner wants to be asked first, and {why}",
                f"ask on {page}, make a token that may read gated repositories on {settings}, and {_TOKEN_HINT}",
            )
        if isinstance(error, RepositoryNotFoundError):
            return _NoRepository(f"{self.host} has no {address.repo} ({code})")
        if isinstance(error, RevisionNotFoundError):
            return UserError(f"{address.repo} has no revision {address.revision} ({code})", "leave @REVISION out")
        if code == 401 and self.token is not None:
            return UserError(f"{self.host} does not know the token (401)", f"make a new one: {settings}")
        if host == self.host and code in (401, 403, 404, 410):
            return UserError(f"{host} does not give out {address} ({code})", _TOKEN_HINT if code < 404 else None)
        return RunError(f"{host} answers {code} for {address}", f"try again later; {RESUME_HINT}")


def _progress_bar(name: str, size: int | None, progress: Progress) -> Any:
    """A class like tqdm's that tells `progress` of the bytes, which is what huggingface_hub asks for."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            # hf_xet tells of what arrives and of what is written: the second is the file.
            self._counts = not str(options.get("desc", "")).endswith("downloading bytes")
            self._done = int(options.get("initial") or 0)
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            if self._counts:
                progress(name, self._done, size)

    return Bar
