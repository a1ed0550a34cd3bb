"""Talking to Hugging Face by huggingface_hub, and to any other host with its HTTP client.

What goes wrong there becomes an error of ours that says what to do. Imported when it is needed.
"""

import contextlib
import fnmatch
import functools
import ipaddress
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from llama_acc.core.catalogue import HubAddress, Kind, catalogue
from llama_acc.core.distributed.environment import in_background
from llama_acc.core.errors import LlamaAccError, RunError, UserError, did_you_mean, listed

if TYPE_CHECKING:
    import httpx2

Progress = Callable[[str, int, int | None], None]
"""(what is worked on, bytes done, bytes in all if known); called by several threads."""
Note = Callable[[str], None]
_T = TypeVar("_T")

RESUME_HINT = "files that came whole are kept: the same command fetches the rest"
REACH_SECONDS = 7.0
"""Within this time a host has to be found and to answer for the first time; else we are off-line."""
# Of a whole model that has its weights as safetensors, what holds the same weights again.
_SAME_WEIGHTS = re.compile(
    r".*(\.bin|\.bin\.index\.json|\.h5|\.msgpack|\.ot|\.gguf|\.onnx|\.tflite|\.mlmodel)|original/.*|(onnx|openvino|coreml)/.*"
    r"|consolidated\.safetensors"
)
_TOKEN_HINT = "give it in HF_TOKEN, once with `hf auth login`, or to `llama-acc download` with --token"


def within(seconds: float, host: str, ask: Callable[[], _T]) -> _T:
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
    """An event hook of httpx: a public host may not send us on to this machine or its network."""
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
    """huggingface_hub's client: proxies, redirects (to other hosts without the Authorization header), time limits.

    It stays the one it uses. By itself, huggingface_hub closes the client of all threads when a host refuses a
    connection: files on their way would end with it, and the next client would not have our hook.
    """
    from huggingface_hub import constants, get_session, set_client_factory
    from huggingface_hub.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # its warnings show signed addresses
    constants.HF_HUB_DISABLE_TELEMETRY = True
    constants.DOWNLOAD_CHUNK_SIZE = 2**18  # with 10 MB, a slow connection shows nothing for minutes
    client = get_session()
    client.event_hooks = {**client.event_hooks, "response": [refuse_redirect_inwards]}
    client.close = lambda: None  # type: ignore[method-assign]
    set_client_factory(lambda: client)
    return client


@contextlib.contextmanager
def explained(
    source: object, host: str, refusal: Callable[[Any], LlamaAccError], resume: str = RESUME_HINT
) -> Iterator[None]:
    """Turn the errors of huggingface_hub and its client, asked for a source, into ours. `refusal` makes the one for an
    answer of 4xx or 5xx; `resume` says what to do after the network failed."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        # Of a question that failed while a file was on its way, the reason is the cause.
        hiding = errors.LocalEntryNotFoundError | ValueError | RuntimeError
        hides_reason = isinstance(error, hiding) and error.__cause__ is not None
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
        hint = f"{resume}. If chunk storage (xet) is kept from you, set HF_HUB_DISABLE_XET=1"
        raise RunError(f"{source}: {str(reason).partition(chr(10))[0] or type(reason).__name__}", hint) from error


class _NoRepository(UserError):
    """There is none of this name and kind, or it is private."""


class HuggingFace:
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
        self.api: HfApi = HfApi(endpoint=self.endpoint, token=self.token or False, library_name="llama-acc")

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
            ask = functools.partial(self.api.repo_info, address.repo, repo_type=kind, revision=address.revision)
            with contextlib.suppress(_NoRepository), self._explained(address):
                info = within(REACH_SECONDS, self.host, functools.partial(ask, timeout=REACH_SECONDS - 1))
                return kind, str(info.sha)
        raise self._no_such_repository(address)

    def _tree(self, address: HubAddress, kind: Kind, commit: str, folder: str) -> list[tuple[str, int, str]]:
        """All files in a folder, sorted; none, if there is no such folder."""
        from huggingface_hub.errors import RemoteEntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        ask = functools.partial(self.api.list_repo_tree, address.repo, folder or None, revision=commit)
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
                    tqdm_class=progress_bar(name, size, progress),
                )
            Path(came).rename(part)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _explained(self, address: HubAddress) -> contextlib.AbstractContextManager[None]:
        return explained(address, self.host, functools.partial(self._refusal, address))

    def _no_such_repository(self, address: HubAddress) -> UserError:
        import httpx2

        known = [file.get for entry in catalogue().values() for file in entry.files]
        repos = {match[1] for get in known if (match := re.match(r"hf:(?:datasets/)?([^/]+/[^/]+)", get))}
        with contextlib.suppress(httpx2.HTTPError):
            for listing in (self.api.list_models, self.api.list_datasets):
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


def progress_bar(name: str, size: int | None, progress: Progress) -> Any:
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
