"""What can be downloaded and where it lies: names of the catalogue, addresses, folders. Opens no connection.

    LLAMA_ACC_HOME/data/NAME/        what `--data NAME` reads; NAME/raw/ holds what is to be converted first
    LLAMA_ACC_HOME/models/NAME/      what `--pretrained NAME` and `--ckpt NAME` load

A folder's `.llama-acc-download` records which addresses are complete: {address: {name of a file: its bytes}}. Files on
their way are below `.incoming/`. Addresses: `hf:owner/name/file`, a page of Hugging Face or GitHub, or any https://.
"""

import contextlib
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, model_validator

from llama_acc.core.errors import UserError, did_you_mean, listed
from llama_acc.core.input_files import home

CATALOGUE = Path(__file__).parents[1] / "recipes" / "downloads" / "catalogue.yaml"
INCOMING, RECORD = ".incoming", ".llama-acc-download"

Kind = Literal["model", "dataset"]
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REVISION = r"refs/(?:pr|convert)/[^/\s]+|[^/\s]+"
_HUB = re.compile(
    rf"hf:(?://)?(?P<kind>datasets/|models/)?(?!datasets/|models/)(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?(?:/(?P<path>\S+))?"
)
_HUB_PAGE = re.compile(
    rf"/(?P<kind>datasets/)?(?P<repo>{_PART}/{_PART})"
    rf"(?:/(?:blob|resolve|raw|tree)/(?P<revision>{_REVISION})(?:/(?P<path>.*))?)?/?"
)
_GITHUB_PAGE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/(?:blob|raw)/(?P<rest>[^/]+/.+)")
_LONGEST_NAME = 200  # bytes; file systems take 255, and a part's name has some of ours around it
_Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]+$")]
_RECORD = TypeAdapter(dict[str, dict[str, int]])


class File(BaseModel):
    """One address of an entry; the head of catalogue.yaml says what its fields mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    get: str
    name: str | None = None
    bytes: int | None = None
    sha256: Annotated[_Hex, StringConstraints(min_length=64, max_length=64)] | None = None
    git_blob: Annotated[_Hex, StringConstraints(min_length=40, max_length=40)] | None = None


class Entry(BaseModel):
    """A name of the catalogue; the head of catalogue.yaml says what its fields mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["data", "images", "model", "vision"]
    what: str
    page: str
    license: str
    size: str | None = None
    gated: bool = False
    recipe: str | None = None
    convert: str | None = None
    all_forms: bool = False
    template: str | None = None
    llama_type: str | None = None
    note: str | None = None
    files: tuple[File, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _whole_model(cls, values: dict[str, Any]) -> dict[str, Any]:
        repository = values["page"].removeprefix("https://huggingface.co/")
        return {"files": [{"get": f"hf:models/{repository}"}], **values}

    @property
    def is_model(self) -> bool:
        """Whether it is found by `--pretrained` and `--ckpt`, not by `--data`."""
        return self.kind in ("model", "vision")

    @property
    def folder(self) -> Path:
        """Where its name is looked for."""
        return home() / ("models" if self.is_model else "data") / self.name

    @property
    def raw_folder(self) -> Path:
        """Where it is downloaded to: aside, if it is to be converted."""
        return self.folder / "raw" if self.convert else self.folder

    @property
    def is_here(self) -> bool:
        """Whether all of it was downloaded."""
        return files_here(self.raw_folder, self.files) is not None


@functools.cache
def catalogue() -> dict[str, Entry]:
    """Every entry by its name, in the catalogue's order."""
    raw = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    return {name: Entry(name=name, **values) for name, values in raw.items()}


def find_entry(name: str) -> Entry:
    """The entry of a name."""
    found = catalogue().get(name)
    if found is None:
        near = did_you_mean(name.lower(), catalogue())
        lists = "`llama-acc download --list` shows every name; an address also does: hf:OWNER/NAME or https://..."
        is_repository = re.fullmatch(r"[\w.-]+/[\w./-]+", name)
        raise UserError(
            f"the catalogue has no {name[:80]!r}" + (f": {near}" if near else ""),
            f"of Hugging Face, type: llama-acc download hf:{name}" if is_repository else lists,
        )
    return found


# Addresses


@dataclass(frozen=True)
class HubAddress:
    """Something on Hugging Face: a repository, a folder or a file of it, or a glob of files."""

    repo: str  # "owner/name"
    kind: Kind | None = None  # None = found out
    revision: str | None = None  # branch, tag or commit; None = the main branch
    path: str = ""  # file, folder or glob; "" = all of it

    @property
    def folder(self) -> str:
        """Where it lands under data/ or models/."""
        return self.repo + (f"@{self.revision}" if self.revision else "")

    @property
    def fixed_folder(self) -> str:
        """The folder in the repository that everything meant lies in: a glob's part before its first pattern."""
        return re.split(r"[*?[]", self.path, maxsplit=1)[0].rpartition("/")[0]

    @property
    def identity(self) -> str:
        """What tells it from others."""
        return str(self)

    def __str__(self) -> str:
        kind = "datasets/" if self.kind == "dataset" else ""
        return f"hf:{kind}{self.folder}" + (f"/{self.path}" if self.path else "")


@dataclass(frozen=True)
class WebAddress:
    """A file at a plain address; `url` may hold a user, password and query, which `str()` does not show."""

    url: str

    @property
    def file_name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name

    @property
    def host(self) -> str:
        """The host it is asked from."""
        return urlsplit(self.url).hostname or ""

    @property
    def identity(self) -> str:
        """What tells it from others, without its secrets."""
        shown = str(self)
        return shown if shown == self.url else f"{shown} {hashlib.sha256(self.url.encode()).hexdigest()[:16]}"

    def __str__(self) -> str:
        return without_secrets(self.url)


Address = HubAddress | WebAddress


def is_address(text: str) -> bool:
    """Whether a text is meant as an address, not as a name of the catalogue."""
    return text.startswith("hf:") or "://" in text


def without_secrets(text: str) -> str:
    """A name or address as it may be shown or written down: without user, password, query and fragment."""
    if "://" not in text:
        return text
    scheme, _, rest = text.partition("://")
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def parse_address(text: str) -> Address:
    """Parse an address."""
    shown = without_secrets(text)
    if text.startswith("hf:"):
        match = _HUB.fullmatch(text.rstrip("/"))
        if match is None:
            hint = "write hf:OWNER/NAME, hf:OWNER/NAME/FILE or hf:datasets/OWNER/NAME/FOLDER/*.jsonl"
            raise UserError(f"{shown!r} is not an address on Hugging Face", hint)
        kinds: dict[str | None, Kind | None] = {"datasets/": "dataset", "models/": "model", None: None}
        path = (match["path"] or "").strip("/")
        return _checked(HubAddress(match["repo"], kinds[match["kind"]], match["revision"], path))
    if not text.startswith(("https://", "http://")):
        raise UserError(f"{shown!r} is not an address that can be fetched", "it begins with hf:, https:// or http://")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:  # of brackets, the port, or a label over 63 characters
        raise UserError(f"{shown!r} is not an address: {error}") from None
    if not host or re.search(r"\s", host):
        raise UserError(f"{shown!r} names no host")
    if host in ("huggingface.co", "hf.co") and (page := _HUB_PAGE.fullmatch(unquote(parts.path))):
        revision = None if page["revision"] in (None, "main") else page["revision"]
        return _checked(HubAddress(page["repo"], "dataset" if page["kind"] else "model", revision, page["path"] or ""))
    if host == "github.com" and (page := _GITHUB_PAGE.fullmatch(parts.path)):
        return WebAddress(f"https://raw.githubusercontent.com/{page['repo']}/{page['rest']}")
    address = WebAddress(text)
    if not address.file_name:
        raise UserError(f"{address} names no file", "give the address of a file: https://HOST/.../FILE")
    if len(address.file_name.encode()) > _LONGEST_NAME:
        raise UserError(f"the file name in {host}'s address is longer than {_LONGEST_NAME} bytes")
    return address


def _checked(address: HubAddress) -> HubAddress:
    if ".." in PurePosixPath(address.path).parts:
        raise UserError(f"{address} leads out of its repository")
    if any(len(part.encode()) > _LONGEST_NAME for part in f"{address.repo}/{address.path}".split("/")):
        raise UserError(f"a name in {str(address)[:60]}... is longer than {_LONGEST_NAME} bytes")
    # As huggingface_hub's validate_repo_id has it, which is slow to import.
    if len(address.repo) > 96 or "--" in address.repo or ".." in address.repo or address.repo.endswith(("-", ".")):
        raise UserError(f"{address.repo!r} cannot be a repository's name on Hugging Face")
    return address


# What is to be downloaded


@dataclass(frozen=True)
class DownloadRequest:
    """One thing to download."""

    name: str  # as it was typed, without what may be secret
    entry: Entry | None  # None: it is an address
    files: tuple[File, ...]
    to: Path | None  # the folder the user wants it in


def resolve(names: Sequence[str], to: Path | None) -> list[DownloadRequest]:
    """What names and addresses mean. Of several, each goes into a folder of its own below `to`.

    Raises:
        UserError: those that mean nothing, together.
    """
    requests: list[DownloadRequest] = []
    errors: list[UserError] = []
    for name in dict.fromkeys(names):
        try:
            entry = None if is_address(name) else find_entry(name)
            files = (File(get=name),) if entry is None else entry.files
            shown = without_secrets(name)
            own = re.sub(r"[^\w.@-]+", "--", shown.partition(":")[2] or name).strip("-")
            requests.append(DownloadRequest(shown, entry, files, to and (to / own if len(set(names)) > 1 else to)))
        except UserError as error:
            errors.append(error)
    if len(errors) > 1:
        raise UserError(f"{len(errors)} names are not known:\n{listed([e.message for e in errors])}", errors[0].hint)
    if errors:
        raise errors[0]
    return requests


# What was downloaded


def named_model(name: str) -> Path | None:
    """The folder of a downloaded model, by its name or its `hf:` address; None if it is not there."""
    return _complete(home() / "models" / _local_name(name), name)


def hub_name(name: str) -> str | None:
    """OWNER/NAME on Hugging Face of a model: of its address, or where its folder came from; None = unknown."""
    folder = Path(name).expanduser()
    folder = folder if folder.is_dir() else home() / "models" / _local_name(name)
    addresses = [parse_address(text) for text in (name, *read_record(folder)) if text.startswith("hf:")]
    models = [found for found in addresses if isinstance(found, HubAddress) and found.kind != "dataset"]
    repos = {found.repo for found in models}
    return repos.pop() if len(repos) == 1 and not any(found.revision for found in models) else None


def named_data(name: str) -> Path | None:
    """The folder or file of downloaded data, by its name or address; None if it is not there."""
    place, entry = home() / "data" / _local_name(name), catalogue().get(name)
    is_raw = entry is not None and entry.convert and place.is_dir()
    if is_raw and not any(path.is_file() for path in place.iterdir() if path.name[0] != "."):
        assert entry is not None
        raw_files(name)
        convert = f"type: llama-acc convert-data {entry.convert} {name}" + " --all-forms" * entry.all_forms
        raise UserError(f"{name} is downloaded to {entry.raw_folder}, but not converted yet", convert)
    return _complete(place, name)


def raw_files(name: str) -> list[Path]:
    """The downloaded files of an entry that is to be converted."""
    folder = find_entry(name).raw_folder
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not found or (folder / INCOMING).is_dir():
        state = f"{folder} is incomplete" if found else f"there is nothing in {folder}"
        raise UserError(f"{name} is not downloaded: {state}", f"type: llama-acc download {name}")
    return found


def converted_file(name: str) -> Path:
    """The file of an entry's converted data, which `--data NAME` finds."""
    return home() / "data" / name / f"{name}.jsonl"


def how_to_get(name: str, model: bool) -> str | None:
    """What to type for a name that is not there, if it is one that can be downloaded."""
    if is_address(name):
        return f"type: llama-acc download {without_secrets(name)}"
    known = {key: entry for key, entry in catalogue().items() if entry.is_model == model}
    if name in known:
        return f"type: llama-acc download {name}"
    if same := [key for key, entry in known.items() if entry.page == f"https://huggingface.co/{name}"]:
        return f"type: llama-acc download {same[0]}, and give that name"
    question = did_you_mean(name, known)
    return f"{question} (`llama-acc download --list` shows what can be downloaded)" if question else None


def _complete(place: Path, name: str) -> Path | None:
    if (place / INCOMING).is_dir():
        shown = without_secrets(name)
        raise UserError(f"the download of {shown} is incomplete", f"go on with: llama-acc download {shown}")
    return place if place.exists() else None


def _local_name(name: str) -> str:
    if not is_address(name):
        return name
    address = parse_address(name)
    return address.folder if isinstance(address, HubAddress) else address.file_name


def read_record(folder: Path) -> dict[str, dict[str, int]]:
    """A folder's record. One that cannot be read counts as none: files are then compared with what they should be."""
    with contextlib.suppress(OSError, ValueError):
        return _RECORD.validate_json((folder / RECORD).read_bytes())
    return {}


def files_here(folder: Path, files: Sequence[File]) -> list[Path] | None:
    """The files of addresses that are complete and still here, going by their sizes; None if one of them is not."""
    record, found = read_record(folder), dict[Path, int]()
    for file in files:
        known = record.get(parse_address(file.get).identity)
        if known is None:
            return None
        found |= {folder / name: size for name, size in known.items()}
    is_here = all(path.is_file() and path.stat().st_size == size for path, size in found.items())
    return list(found) if is_here else None
