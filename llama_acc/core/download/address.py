"""Addresses as users write them: `hf:owner/name/file`, a page of Hugging Face or GitHub, or any https://."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from llama_acc.core.errors import UserError

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
        parts = urlsplit(self.url)
        where = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, where, parts.path, "", ""))


Address = HubAddress | WebAddress


def is_address(text: str) -> bool:
    """Whether a text is meant as an address, not as a name of the catalogue."""
    return text.startswith("hf:") or "://" in text


def parse_address(text: str) -> Address:
    """What an address means.

    Raises:
        UserError: it is none.
    """
    if text.startswith(("hf:", "hf://")):
        return _hub(text)
    if not text.startswith(("https://", "http://")):
        raise UserError(f"{text!r} is no address that can be fetched", "it begins with hf:, https:// or http://")
    parts = urlsplit(text)
    if not parts.hostname:
        raise UserError(f"{text!r} names no host")
    if parts.hostname in ("huggingface.co", "hf.co") and (page := _HUB_PAGE.fullmatch(unquote(parts.path))):
        kind: Kind = "dataset" if page["kind"] else "model"
        revision = None if page["revision"] in (None, "main") else page["revision"]
        return _checked(HubAddress(page["repo"], kind, revision, page["path"] or ""))
    if parts.hostname == "github.com" and (page := _GITHUB_PAGE.fullmatch(parts.path)):
        return WebAddress(f"https://raw.githubusercontent.com/{page['repo']}/{page['rest']}")
    address = WebAddress(text)
    if not address.file_name:
        raise UserError(f"{address} names no file", "give the address of a file: https://HOST/.../FILE")
    return address


def _hub(text: str) -> HubAddress:
    match = _HUB.fullmatch(text.rstrip("/"))
    if match is None:
        raise UserError(
            f"{text!r} is no address on Hugging Face",
            "write hf:OWNER/NAME, hf:OWNER/NAME/FILE or hf:datasets/OWNER/NAME/FOLDER/*.jsonl",
        )
    kinds: dict[str | None, Kind | None] = {"datasets/": "dataset", "models/": "model", None: None}
    return _checked(
        HubAddress(match["repo"], kinds[match["kind"]], match["revision"], (match["path"] or "").strip("/"))
    )


def _checked(address: HubAddress) -> HubAddress:
    if ".." in PurePosixPath(address.path).parts:
        raise UserError(f"{address} leads out of its repository")
    return address
