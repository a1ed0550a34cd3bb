"""Hugging Face: what a repository holds, and the bytes of its files.

huggingface_hub asks the questions: it knows the token, the mirror in HF_ENDPOINT, the cache and the errors. The bytes
are fetched here, since it begins an interrupted file anew (2.4): over xet by hf_xet, else over HTTP from the file's
address, in both cases from the byte on that is missing.
"""

import contextlib
import fnmatch
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoFile
from huggingface_hub.utils import hf_raise_for_status, logging

from llama_acc.core.download import xet
from llama_acc.core.download.address import HubAddress, Kind
from llama_acc.core.download.catalogue import catalogue
from llama_acc.core.download.http import (
    REACH_SECONDS,
    TRANSIENT,
    Stream,
    Transient,
    make_client,
    open_url,
    retry_after,
    unreachable,
    within,
)
from llama_acc.core.download.remote import Digest, Remote
from llama_acc.core.download.transfer import Patience
from llama_acc.core.errors import LlamaAccError, RunError, UserError, did_you_mean, listed

_SAME_WEIGHTS = re.compile(
    r".*(\.bin|\.bin\.index\.json|\.h5|\.msgpack|\.ot|\.gguf|\.onnx|\.tflite|\.mlmodel)|original/.*|(onnx|openvino|coreml)/.*"
)
_CACHE_BLOCK = 1 << 20


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `digest` is its SHA-256 if it is kept as a large file, else git's identity of it."""

    path: str
    size: int
    digest: Digest
    xet_hash: str | None = None


@dataclass(frozen=True)
class HubListing:
    """Files of a repository at one commit, sorted; `left_out` were not asked for by name and hold nothing new."""

    address: HubAddress
    kind: Kind
    commit: str
    gated: bool
    files: tuple[HubFile, ...]
    left_out: tuple[str, ...] = ()


@dataclass
class Hub:
    """Hugging Face, or the mirror HF_ENDPOINT names, for one download.

    Attributes:
        given_token: of the command line; without it, huggingface_hub's: HF_TOKEN, or that of `hf auth login`.
        client: for the bytes.
        tell: hears of what is tried again.
        patience: with failures that may pass.
    """

    given_token: str | None = None
    client: httpx2.Client = field(default_factory=make_client)
    tell: Callable[[str], None] = lambda text: None
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        logging.set_verbosity_error()
        constants.HF_HUB_DISABLE_TELEMETRY = True  # it would ask and tell the hub what program runs us
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.token = self.given_token or (None if _implicit_token_is_off() else get_token())
        check_token(self.token)
        self._api = HfApi(endpoint=self.endpoint, token=self.token or False, library_name="llama-acc")
        self._known: dict[tuple[str, Kind, str | None], tuple[str, bool]] = {}

    @property
    def host(self) -> str:
        """Whom it asks, and gives the token."""
        return urlsplit(self.endpoint).hostname or self.endpoint

    def list_files(self, address: HubAddress) -> HubListing:
        """The files an address means.

        Raises:
            UserError: no such repository, revision or file, or no access.
            RunError: the network.
        """
        kind, commit, gated = self._commit(address)
        with self._explained(address):
            files = self._matching(address, kind, commit)
        if not files:
            raise self._no_such_file(address, kind, commit)
        kept, left_out = _without_copies(files) if kind == "model" and not address.path else (files, [])
        return HubListing(address, kind, commit, gated, tuple(kept), tuple(left_out))

    def remotes(self, listing: HubListing, names: dict[str, str], known: Sequence[Digest] = ()) -> list[Remote]:
        """The files of a listing, to be fetched as `names` (by their path there) says; `known` also has to be met."""
        return [self._remote(listing, file, names.get(file.path, file.path), known) for file in listing.files]

    def _remote(self, listing: HubListing, file: HubFile, name: str, known: Sequence[Digest]) -> Remote:
        source = HubAddress(listing.address.repo, listing.kind, listing.commit, file.path)
        digests = tuple(dict.fromkeys([file.digest, *known]))
        content = _Bytes(self, source, file)
        return Remote(name, str(source), file.size, digests, content.open, give_up_copy=content.give_up_copy)

    def _commit(self, address: HubAddress) -> tuple[Kind, str, bool]:
        """What kind of repository it is, its commit, and whether it is gated. A model, if both exist."""
        kinds: list[Kind] = [address.kind] if address.kind else ["model", "dataset"]
        for kind in kinds:
            key = (address.repo, kind, address.revision)
            if key not in self._known:
                try:
                    with self._explained(address):
                        self._known[key] = self._ask_commit(address, kind)
                except _NoRepository:
                    continue
            return kind, *self._known[key]
        raise self._no_such_repository(address)

    def _ask_commit(self, address: HubAddress, kind: Kind) -> tuple[str, bool]:
        """A commit, and whether the repository is gated. huggingface_hub repeats all its other questions, not this."""
        tries = 0
        while True:
            tries += 1
            try:
                info = within(REACH_SECONDS, self.host, lambda: self._repo_info(address, kind))
                return str(info.sha), bool(getattr(info, "gated", False))
            except HfHubHTTPError as error:
                status = error.response.status_code
                wait = self.patience.wait(tries, retry_after(error.response.headers.get("retry-after")))
                if status not in TRANSIENT or tries == self.patience.tries or wait > self.patience.longest_asked:
                    raise
                self.tell(f"{self.host} answers {status}; trying again in {wait:.3g} s")
                time.sleep(wait)

    def _repo_info(self, address: HubAddress, kind: Kind) -> ModelInfo | DatasetInfo:
        limit = REACH_SECONDS - 1
        if kind == "model":
            return self._api.model_info(address.repo, revision=address.revision, timeout=limit)
        return self._api.dataset_info(address.repo, revision=address.revision, timeout=limit)

    def _matching(self, address: HubAddress, kind: Kind, commit: str) -> list[HubFile]:
        if not address.path:
            return self._tree(address.repo, kind, commit, "", recursive=True)
        if address.is_glob:
            inside = self._tree(address.repo, kind, commit, address.fixed_folder, recursive=True)
            return [file for file in inside if fnmatch.fnmatchcase(file.path, address.path)]
        beside = self._tree(address.repo, kind, commit, address.fixed_folder, recursive=False)
        exact = [file for file in beside if file.path == address.path]
        return exact or self._tree(address.repo, kind, commit, address.path, recursive=True)

    def _tree(self, repo: str, kind: Kind, commit: str, folder: str, recursive: bool) -> list[HubFile]:
        """The files in a folder, sorted; none, if there is no such folder."""
        entries = self._api.list_repo_tree(repo, folder or None, recursive=recursive, revision=commit, repo_type=kind)
        try:
            return sorted((_hub_file(entry) for entry in entries if isinstance(entry, RepoFile)), key=lambda f: f.path)
        except RemoteEntryNotFoundError:
            return []

    def _no_such_file(self, address: HubAddress, kind: Kind, commit: str) -> UserError:
        with self._explained(address):
            paths = [file.path for file in self._tree(address.repo, kind, commit, "", recursive=True)]
        deeper = [path for path in paths if PurePosixPath(path).name == PurePosixPath(address.path).name]
        near = f"did you mean {deeper[0]!r}?" if deeper else did_you_mean(address.path, paths)
        some = f"it holds:\n{listed(paths, most=8)}"
        return UserError(f"{address.repo} holds nothing named {address.path} (404)", near or some)

    def _no_such_repository(self, address: HubAddress) -> UserError:
        owner = address.repo.partition("/")[0]
        known = [file.get for entry in catalogue().values() for file in entry.files]
        repos = {match[1] for get in known if (match := re.match(r"hf:(?:datasets/)?([^/]+/[^/]+)", get))}
        with contextlib.suppress(HfHubHTTPError, httpx2.HTTPError):
            repos |= {str(model.id) for model in self._api.list_models(author=owner, limit=200)}
            repos |= {str(data.id) for data in self._api.list_datasets(author=owner, limit=200)}
        near = did_you_mean(address.repo, repos)
        private = "private one is seen with a token of its owner only: --token, HF_TOKEN or `hf auth login`"
        hint = f"{near} A {private}" if near else f"a {private}"
        return UserError(f"{self.host} has no {address.repo} (404)", hint)

    @contextlib.contextmanager
    def _explained(self, address: HubAddress) -> Iterator[None]:
        """Turns huggingface_hub's errors into ours."""
        try:
            yield
        except HfHubHTTPError as error:
            raise self.refusal(address, error) from error
        except OfflineModeIsEnabled as error:
            raise UserError("HF_HUB_OFFLINE is set: nothing is asked of the network", "unset it") from error
        except httpx2.HTTPError as error:
            raise unreachable(error, self.endpoint) from error

    def refusal(self, address: HubAddress, error: HfHubHTTPError) -> LlamaAccError:
        """What an answer of 4xx or 5xx means."""
        code = error.response.status_code
        if isinstance(error, GatedRepoError):
            return self._gated(address)
        if code == 401 and self.token is not None and not isinstance(error, RepositoryNotFoundError):
            return UserError(f"{self.host} does not know the token (401)", f"make a new one: {self._token_page()}")
        if isinstance(error, RepositoryNotFoundError):
            return _NoRepository(f"{self.host} has no {address.repo} ({code})")
        if isinstance(error, RevisionNotFoundError):
            return UserError(f"{address.repo} has no revision {address.revision} ({code})", "leave @REVISION out")
        if code in (401, 403):
            return UserError(f"{self.host} does not give out {address} ({code})", f"{self._say_token()}")
        if code in (404, 410):
            return UserError(f"{self.host} has no {address} ({code})")
        return RunError(f"{self.host} answers {code} for {address}", "try again later")

    def _gated(self, address: HubAddress) -> UserError:
        prefix = "datasets/" if address.kind == "dataset" else ""
        page = f"{self.endpoint}/{prefix}{address.repo}"
        if self.token is None:
            return UserError(
                f"{address.repo} is gated: its owner wants to be asked first, and no token was sent",
                f"ask on {page}, make a token on {self._token_page()}, and {self._say_token()}",
            )
        return UserError(
            f"{address.repo} is gated, and the token's owner has no access to it (yet)",
            f"ask on {page} with the token's account; an answer may take days. The token needs read access to gated "
            "repositories",
        )

    def _token_page(self) -> str:
        return f"{self.endpoint}/settings/tokens"

    def _say_token(self) -> str:
        return "give it in HF_TOKEN, once with `hf auth login`, or to `llama-acc download` with --token"


class _NoRepository(UserError):
    """There is none of this name and kind, or it is private."""


def check_token(token: str | None) -> None:
    """Refuses what cannot be a token, without showing it.

    Raises:
        UserError: it has characters that a header cannot carry.
    """
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            "the token holds white space or characters that no token has",
            "is a shell variable not set, or a line break copied? It looks like hf_...",
        )


def _implicit_token_is_off() -> bool:
    return os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in ("1", "ON", "YES", "TRUE")


def _hub_file(entry: RepoFile) -> HubFile:
    digest = Digest("sha256", entry.lfs.sha256) if entry.lfs else Digest("git", entry.blob_id)
    return HubFile(entry.path, entry.size, digest, entry.xet_hash)


def _without_copies(files: list[HubFile]) -> tuple[list[HubFile], list[str]]:
    """A whole model without the same weights in other formats, where it has them as safetensors."""
    if not any(re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file.path) for file in files):
        return files, []
    copies = {file.path for file in files if _SAME_WEIGHTS.fullmatch(file.path)}
    return [file for file in files if file.path not in copies], sorted(copies)


class _Bytes:
    """A file's bytes: from huggingface_hub's cache, over xet, or over HTTP."""

    def __init__(self, hub: Hub, source: HubAddress, file: HubFile) -> None:
        self._hub, self._source, self._file = hub, source, file
        self._xet_is_worth_a_try = file.xet_hash is not None and xet.is_available()
        self._copy_is_good = True
        self._copy: Path | None = None  # what bytes came from

    @contextlib.contextmanager
    def open(self, offset: int, validator: str | None) -> Iterator[Stream]:
        """See `remote.Open`."""
        if (cached := self._cached()) is not None:
            self._copy = cached
            with cached.open("rb") as file:
                file.seek(offset)
                yield Stream(offset, self._file.size, None, iter(lambda: file.read(_CACHE_BLOCK), b""))
            return
        if self._xet_is_worth_a_try:
            # Whatever keeps it from working, a firewall perhaps, the next try goes over HTTP.
            self._xet_is_worth_a_try = False
            yield Stream(offset, self._file.size, None, self._over_xet(offset))
            return
        with open_url(self._hub.client, self._url(), offset, None, self._authorization(), self._refusal) as stream:
            yield stream

    def give_up_copy(self) -> Path | None:
        """See `remote.Remote`."""
        copy, self._copy = self._copy, None
        self._copy_is_good = self._copy_is_good and copy is None
        return copy

    def _over_xet(self, offset: int) -> Iterator[bytes]:
        repo, kind, commit = self._source.repo, self._source.kind, self._source.revision
        url = f"{self._hub.endpoint}/api/{kind}s/{repo}/xet-read-token/{commit}"
        assert self._file.xet_hash is not None
        return xet.chunks(self._file.xet_hash, self._file.size, offset, url, self._authorization())

    def _cached(self) -> Path | None:
        if not self._copy_is_good:
            return None
        found = try_to_load_from_cache(
            self._source.repo, self._source.path, revision=self._source.revision, repo_type=self._source.kind
        )
        path = Path(found) if isinstance(found, str) else None
        return path if path is not None and path.stat().st_size == self._file.size else None

    def _url(self) -> str:
        return hf_hub_url(
            self._source.repo,
            self._source.path,
            repo_type=self._source.kind,
            revision=self._source.revision,
            endpoint=self._hub.endpoint,
        )

    def _authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._hub.token}"} if self._hub.token else {}

    def _refusal(self, response: httpx2.Response) -> LlamaAccError:
        address = HubAddress(self._source.repo, self._source.kind, None, self._source.path)
        if response.url.host != self._hub.host:
            return RunError(f"{response.url.host}, which keeps {address}, answers {response.status_code}")
        try:
            hf_raise_for_status(response)
        except HfHubHTTPError as error:
            return self._hub.refusal(address, error)
        raise Transient(f"{self._hub.host} answers {response.status_code}")
