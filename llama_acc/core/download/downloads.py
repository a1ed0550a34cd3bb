"""`llama-acc download`: from names and addresses to files that `--data` and `--pretrained` find."""

import contextlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import httpx2

from llama_acc.core.download.address import HubAddress, WebAddress, is_address, parse_address
from llama_acc.core.download.catalogue import Entry, File, find_entry
from llama_acc.core.download.finish import bytes_to_convert, finish
from llama_acc.core.download.http import make_client
from llama_acc.core.download.hub import Hub, HubListing
from llama_acc.core.download.job import fetch_all
from llama_acc.core.download.names import raw_folder_of
from llama_acc.core.download.record import Record
from llama_acc.core.download.remote import Digest, Remote
from llama_acc.core.download.transfer import Patience, Watch
from llama_acc.core.download.web import web_remote
from llama_acc.core.errors import UserError, listed
from llama_acc.core.home import home


@dataclass(frozen=True)
class Wanted:
    """One thing to download.

    Attributes:
        name: as it was typed.
        entry: of the catalogue; None for an address.
        files: what to fetch.
        to: the folder the user wants it in.
    """

    name: str
    entry: Entry | None
    files: tuple[File, ...]
    to: Path | None


@dataclass(frozen=True)
class Downloaded:
    """What came of it.

    Attributes:
        wanted: what was asked for.
        is_model: `--pretrained` takes it, not `--data`.
        folder: where it is.
        files: all of it.
        fetched: those of them that were not there before.
        converted: what was made of them for `--data`, if they cannot be read as they are.
    """

    wanted: Wanted
    is_model: bool
    folder: Path
    files: tuple[Path, ...]
    fetched: tuple[Path, ...]
    converted: Path | None = None


def understand(names: Sequence[str], to: Path | None) -> list[Wanted]:
    """What names and addresses mean; nothing is asked of the network.

    Raises:
        UserError: those that mean nothing, together.
    """
    found: list[Wanted] = []
    errors: list[UserError] = []
    folders = _folders(set(names))
    for name in dict.fromkeys(names):
        place = None if to is None else to / folders.get(name, "")
        try:
            found.append(_understand(name, place))
        except UserError as error:
            errors.append(error)
    if len(errors) > 1:
        raise UserError(f"{len(errors)} names are not known:\n{listed([e.message for e in errors])}", errors[0].hint)
    if errors:
        raise errors[0]
    return found


def _understand(name: str, to: Path | None) -> Wanted:
    if is_address(name):
        parse_address(name)
        return Wanted(name, None, (File(get=name),), to)
    entry = find_entry(name)
    return Wanted(name, entry, entry.files, to)


def asks_the_hub(wanted: Wanted) -> bool:
    """Whether something of it is at Hugging Face."""
    return any(isinstance(parse_address(file.get), HubAddress) for file in wanted.files)


def _folders(names: Collection[str]) -> dict[str, str]:
    """A folder for each of several things that go into one place: by the last part of its name, if that is one's alone.

    What is not understood has none; parts of one repository share theirs.
    """
    known: dict[str, tuple[str, ...]] = {}
    for name in names if len(names) > 1 else ():
        with contextlib.suppress(UserError):
            known[name] = _called(name)
    of = Counter(called[-1] for called in set(known.values()))
    return {name: called[-1] if of[called[-1]] == 1 else "--".join(called) for name, called in known.items()}


def _called(name: str) -> tuple[str, ...]:
    """What tells it from others, the shortest last."""
    address = parse_address(name) if is_address(name) else None
    if address is None:
        return (name,)
    if isinstance(address, WebAddress):
        path = PurePosixPath(unquote(urlsplit(address.url).path))
        return (address.host, *path.parent.parts[1:], path.stem)
    kind = (f"{address.kind}s",) if address.kind else ()
    revision = (address.revision.replace("/", "-"),) if address.revision else ()
    return (*kind, *revision, *address.repo.split("/"))


@dataclass
class Downloader:
    """Downloads; keeps one connection pool and what it learns of repositories.

    Attributes:
        token: for Hugging Face, of the command line.
        watch: is told how it goes.
        patience: with failures that may pass.
    """

    token: str | None
    watch: Watch
    patience: Patience = field(default_factory=Patience)
    client: httpx2.Client = field(default_factory=make_client)
    _hub: Hub | None = None

    @property
    def hub(self) -> Hub:
        """Hugging Face; asked only if something of it is wanted."""
        if self._hub is None:
            self._hub = Hub(self.token, self.client, self.watch.note, self.patience)
        return self._hub

    def download(self, wanted: Wanted) -> Downloaded:
        """Fetches what is not there yet.

        Raises:
            UserError: it is unknown, gated or absent, a file is in the way, or the disk is too small.
            RunError: the network or the disk failed.
        """
        done = self._already(wanted)
        if done is not None:
            return done
        listings = [self._listing(file) for file in wanted.files]
        is_model = (
            wanted.entry.is_model if wanted.entry else any(ls is not None and ls.kind == "model" for ls in listings)
        )
        folder = _folder(wanted, is_model)
        remotes = [self._remotes(wanted, file, ls) for file, ls in zip(wanted.files, listings, strict=True)]
        every = [remote for group in remotes for remote in group]
        files, fetched = fetch_all(
            every,
            folder,
            self.watch,
            self.patience,
            meant={
                parse_address(file.get).identity: [remote.name for remote in group]
                for file, group in zip(wanted.files, remotes, strict=True)
            },
            besides=bytes_to_convert(wanted.entry, sum(remote.likely_size or 0 for remote in every)),
        )
        self._tell_left_out(listings)
        return self._finished(wanted, is_model, folder, tuple(files), tuple(fetched))

    def _finished(
        self, wanted: Wanted, is_model: bool, folder: Path, files: tuple[Path, ...], fetched: tuple[Path, ...]
    ) -> Downloaded:
        converted = finish(wanted.entry, folder, files, wanted.to, self.watch) if wanted.entry else None
        return Downloaded(wanted, is_model, folder, files, fetched, converted)

    def _already(self, wanted: Wanted) -> Downloaded | None:
        """What was downloaded before, found without the network."""
        for is_model in _kinds(wanted):
            folder = _folder(wanted, is_model)
            found = (
                [Record(folder).finished(parse_address(file.get).identity) for file in wanted.files]
                if folder.is_dir()
                else [None]
            )
            if all(files is not None for files in found):
                files = tuple(path for group in found for path in group or ())
                return self._finished(wanted, is_model, folder, files, ())
        return None

    def _listing(self, file: File) -> HubListing | None:
        address = parse_address(file.get)
        return self.hub.list_files(address) if isinstance(address, HubAddress) else None

    def _remotes(self, wanted: Wanted, file: File, listing: HubListing | None) -> list[Remote]:
        digests = [Digest("sha256", file.sha256)] if file.sha256 else []
        digests += [Digest("git", file.git_blob)] if file.git_blob and not digests else []
        if listing is not None:
            return self.hub.remotes(listing, _names(wanted, file, listing), digests)
        address = parse_address(file.get)
        assert isinstance(address, WebAddress)
        name = file.name or address.file_name
        return [web_remote(self.client, address, name, file.bytes, tuple(digests))]

    def _tell_left_out(self, listings: Sequence[HubListing | None]) -> None:
        for listing in listings:
            if listing is not None and listing.left_out:
                some = ", ".join(listing.left_out[:4]) + (", ..." if len(listing.left_out) > 4 else "")
                self.watch.note(f"left out, as the same weights are there as safetensors: {some}")


def _kinds(wanted: Wanted) -> list[bool]:
    """Whether it may be a model, as far as is known without asking."""
    if wanted.entry is not None:
        return [wanted.entry.is_model]
    address = parse_address(wanted.name)
    kind = address.kind if isinstance(address, HubAddress) else "dataset"
    return [True, False] if kind is None else [kind == "model"]


def _folder(wanted: Wanted, is_model: bool) -> Path:
    if wanted.to is not None:
        return wanted.to
    if wanted.entry is not None:
        return raw_folder_of(wanted.entry)
    place = home() / ("models" if is_model else "data")
    address = parse_address(wanted.name)
    return place / address.folder if isinstance(address, HubAddress) else place


def _names(wanted: Wanted, file: File, listing: HubListing) -> dict[str, str]:
    """What the files of a repository are called here: the catalogue's flat, an address's as there."""
    paths = [found.path for found in listing.files]
    if file.name is not None:
        return {paths[0]: file.name}
    if wanted.entry is not None:
        return {path: PurePosixPath(path).name for path in paths}
    if wanted.to is not None:
        folder = _common_folder(listing.address, paths)
        return {path: path.removeprefix(f"{folder}/") if folder else path for path in paths}
    return {path: path for path in paths}


def _common_folder(address: HubAddress, paths: Sequence[str]) -> str:
    """The folder an address means, or the one its file or glob is in."""
    is_folder = address.path and not address.is_glob and address.path not in paths
    return address.path if is_folder else address.fixed_folder


def fetch_data(address: str, watch: Watch, token: str | None = None) -> list[Path]:
    """The files of an address as they are here, sorted; what is missing is fetched.

    For `data.sources` that name a remote data set, such as `hf:datasets/owner/name/train-*.jsonl`. What was fetched
    before is found without the network.

    Raises:
        UserError: it is unknown, gated or absent, or the disk is too small.
        RunError: the network or the disk failed.
    """
    (wanted,) = understand([address], None)
    return sorted(Downloader(token, watch).download(wanted).files)


def list_data(address: str, token: str | None = None) -> HubListing:
    """What an `hf:` address means, by its names, sizes and digests; nothing is fetched.

    Raises:
        UserError: it is unknown or absent.
        RunError: the network.
    """
    parsed = parse_address(address)
    if not isinstance(parsed, HubAddress):
        raise UserError(f"{address} is no address on Hugging Face", "it begins with hf:")
    return Hub(token).list_files(parsed)
