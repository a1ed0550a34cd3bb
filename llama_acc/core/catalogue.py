"""What can be downloaded: the names of recipes/downloads/catalogue.yaml, and addresses as users write them.

Addresses: `hf:owner/name/file`, a page of Hugging Face or GitHub, or any https://.
"""

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from llama_acc.core.errors import UserError, did_you_mean

CATALOGUE = Path(__file__).parents[1] / "recipes" / "downloads" / "catalogue.yaml"

Kind = Literal["model", "dataset"]
_MAGIC = re.compile(r"[*?[]")
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


class File(BaseModel):
    """One address of an entry.

    Attributes:
        get: `hf:...` or `https://...`; a Hugging Face address may be a folder or a glob.
        name: what the file is called here, if not as there; may hold folders.
        bytes: its exact size.
        sha256: of its content.
        git_blob: git's identity of its content, as GitHub's listings give it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    get: str
    name: str | None = None
    bytes: int | None = None
    sha256: Annotated[_Hex, StringConstraints(min_length=64, max_length=64)] | None = None
    git_blob: Annotated[_Hex, StringConstraints(min_length=40, max_length=40)] | None = None


class Entry(BaseModel):
    """What is known of a name.

    Attributes:
        name: what to type.
        kind: data to train on, captions whose images have to be fetched, a language model, or a vision tower.
        what: one line.
        page: where it is described.
        license: as its page states it.
        size: as its page states it.
        gated: access has to be asked for on `page`.
        recipe: a shipped recipe that uses it.
        convert: the FORMAT of `llama-acc convert-data` that makes of it what `finetune` takes.
        all_forms: it is converted with --all-forms.
        template: the prompt format of a checkpoint that does not say it itself.
        llama_type: LLaMA2-Accessory's name of the architecture, for a checkpoint without meta.json.
        note: what else to know.
        files: what is fetched.
    """

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

    @property
    def conversion(self) -> str:
        """The command that converts it."""
        return f"llama-acc convert-data {self.convert} {self.name}" + " --all-forms" * self.all_forms

    @property
    def is_model(self) -> bool:
        """Whether it is found by `--pretrained` and `--ckpt`, not by `--data`."""
        return self.kind in ("model", "vision")


@functools.cache
def catalogue() -> dict[str, Entry]:
    """Every entry by its name, in the catalogue's order."""
    raw = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    return {name: Entry(name=name, **values) for name, values in raw.items()}


def find_entry(name: str) -> Entry:
    """The entry of a name.

    Raises:
        UserError: there is none; near names are suggested.
    """
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


def names_of_repository(repository: str) -> list[str]:
    """The entries that are a repository of Hugging Face ("owner/name") as a whole."""
    return [name for name, entry in catalogue().items() if entry.page == f"https://huggingface.co/{repository}"]


@dataclass(frozen=True)
class HubAddress:
    """Something on Hugging Face: a repository, a folder or a file of it, or a glob of files.

    Attributes:
        kind: model or data set; None = found out.
        repo: "owner/name".
        revision: branch, tag or commit; None = the main branch.
        path: file, folder or glob; "" = all of it.
    """

    repo: str
    kind: Kind | None = None
    revision: str | None = None
    path: str = ""

    @property
    def is_glob(self) -> bool:
        """Whether the path is a pattern."""
        return bool(_MAGIC.search(self.path))

    @property
    def folder(self) -> str:
        """Where it lands under data/ or models/."""
        return self.repo + (f"@{self.revision}" if self.revision else "")

    @property
    def fixed_folder(self) -> str:
        """The folder in the repository that everything meant lies in: a glob's part before its first pattern."""
        parts = PurePosixPath(self.path).parts[:-1]
        magic = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), len(parts))
        return "/".join(parts[:magic])

    @property
    def identity(self) -> str:
        """By which it can be told from others."""
        return str(self)

    def __str__(self) -> str:
        kind = "datasets/" if self.kind == "dataset" else ""
        return f"hf:{kind}{self.folder}" + (f"/{self.path}" if self.path else "")


@dataclass(frozen=True)
class WebAddress:
    """A file at a plain address; `url` may hold a name and password, which `__str__` does not show."""

    url: str

    @property
    def file_name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name

    @property
    def host(self) -> str:
        """Whom it is asked from."""
        return urlsplit(self.url).hostname or ""

    @property
    def identity(self) -> str:
        """By which it can be told from others, and which may be written down."""
        shown = str(self)
        return shown if shown == self.url else f"{shown} {hashlib.sha256(self.url.encode()).hexdigest()[:16]}"

    def __str__(self) -> str:
        """Without what may be secret: user, password, query."""
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
    """Parse an address.

    Raises:
        UserError: it cannot be one, or its file name is longer than file systems take.
    """
    if text.startswith(("hf:", "hf://")):
        return _hub(text)
    shown = without_secrets(text)
    if not text.startswith(("https://", "http://")):
        raise UserError(f"{shown!r} is not an address that can be fetched", "it begins with hf:, https:// or http://")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as error:  # of brackets, the port, or a label over 63 characters
        raise UserError(f"{shown!r} is not an address: {error}") from None
    if not host or re.search(r"\s", host):
        raise UserError(f"{shown!r} names no host")
    if host in ("huggingface.co", "hf.co") and (page := _HUB_PAGE.fullmatch(unquote(parts.path))):
        kind: Kind = "dataset" if page["kind"] else "model"
        revision = None if page["revision"] in (None, "main") else page["revision"]
        return _checked(HubAddress(page["repo"], kind, revision, page["path"] or ""))
    if host == "github.com" and (page := _GITHUB_PAGE.fullmatch(parts.path)):
        return WebAddress(f"https://raw.githubusercontent.com/{page['repo']}/{page['rest']}")
    address = WebAddress(text)
    if not address.file_name:
        raise UserError(f"{address} names no file", "give the address of a file: https://HOST/.../FILE")
    if len(address.file_name.encode()) > _LONGEST_NAME:
        raise UserError(f"the file name in {host}'s address is longer than {_LONGEST_NAME} bytes")
    return address


def _hub(text: str) -> HubAddress:
    match = _HUB.fullmatch(text.rstrip("/"))
    if match is None:
        raise UserError(
            f"{without_secrets(text)!r} is not an address on Hugging Face",
            "write hf:OWNER/NAME, hf:OWNER/NAME/FILE or hf:datasets/OWNER/NAME/FOLDER/*.jsonl",
        )
    kinds: dict[str | None, Kind | None] = {"datasets/": "dataset", "models/": "model", None: None}
    return _checked(
        HubAddress(match["repo"], kinds[match["kind"]], match["revision"], (match["path"] or "").strip("/"))
    )


def _checked(address: HubAddress) -> HubAddress:
    if ".." in PurePosixPath(address.path).parts:
        raise UserError(f"{address} leads out of its repository")
    if any(len(part.encode()) > _LONGEST_NAME for part in (*address.repo.split("/"), *address.path.split("/"))):
        raise UserError(f"a name in {str(address)[:60]}... is longer than {_LONGEST_NAME} bytes")
    # As huggingface_hub's validate_repo_id has it, which is slow to import.
    if len(address.repo) > 96 or "--" in address.repo or ".." in address.repo or address.repo.endswith(("-", ".")):
        raise UserError(f"{address.repo!r} cannot be a repository's name on Hugging Face")
    return address
