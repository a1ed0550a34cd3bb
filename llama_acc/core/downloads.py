"""Where downloads lie, what came whole, and what names and addresses mean. Nothing here opens a connection.

    LLAMA_ACC_HOME/data/NAME/        what `--data NAME` reads; NAME/raw/ holds what is to be converted first
    LLAMA_ACC_HOME/models/NAME/      what `--pretrained NAME` and `--ckpt NAME` load

A folder's `.llama-acc-download` is its record of what came whole; what is on its way is below `.incoming/`.
"""

import contextlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from llama_acc.core.atomic import write_text_whole
from llama_acc.core.catalogue import (
    Entry,
    File,
    HubAddress,
    WebAddress,
    catalogue,
    find_entry,
    is_address,
    names_of_repository,
    parse_address,
    without_secrets,
)
from llama_acc.core.errors import UserError, did_you_mean, listed
from llama_acc.core.input_files import home

RAW = "raw"
INCOMING = ".incoming"
RECORD = ".llama-acc-download"
_FORMAT_VERSION = 1
_writing = threading.Lock()


# Where downloads lie


def folder_of(entry: Entry) -> Path:
    """The folder of an entry's files."""
    return home() / ("models" if entry.is_model else "data") / entry.name


def raw_folder_of(entry: Entry) -> Path:
    """The folder an entry is downloaded to: aside, if it is to be converted."""
    return folder_of(entry) / RAW if entry.convert else folder_of(entry)


def is_here(entry: Entry) -> bool:
    """Whether all of an entry was downloaded."""
    return files_here(raw_folder_of(entry), entry.files) is not None


def converted_file(name: str) -> Path:
    """The file of an entry's converted data, which `--data NAME` finds."""
    return home() / "data" / name / f"{name}.jsonl"


def raw_files(name: str) -> list[Path]:
    """The downloaded files of an entry that is to be converted.

    Raises:
        UserError: no such entry, or it is not downloaded yet.
    """
    folder = raw_folder_of(find_entry(name))
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not found or (folder / INCOMING).is_dir():
        state = f"{folder} is incomplete" if found else f"there is nothing in {folder}"
        raise UserError(f"{name} is not downloaded: {state}", f"type: llama-acc download {name}")
    return found


def named_model(name: str) -> Path | None:
    """The folder of a downloaded model, by its name or its `hf:` address; None if it is not there.

    Raises:
        UserError: its download has not come to its end.
    """
    place = home() / "models" / _local_name(name)
    return _complete(place, name) if place.is_dir() else None


def named_data(name: str) -> Path | None:
    """The folder or file of downloaded data, by its name or address; None if it is not there.

    Raises:
        UserError: its download has not come to its end, or it is still to be converted.
    """
    place = home() / "data" / _local_name(name)
    if not place.exists():
        return None
    entry = catalogue().get(name)
    if entry is not None and entry.convert and not any(p.is_file() for p in place.iterdir() if p.name[0] != "."):
        raw_files(name)
        raise UserError(
            f"{name} is downloaded to {raw_folder_of(entry)}, but not converted yet", f"type: {entry.conversion}"
        )
    return _complete(place, name)


def how_to_get(name: str, model: bool) -> str | None:
    """What to type for a name that is not there, if it is one that can be downloaded."""
    if is_address(name):
        return f"type: llama-acc download {without_secrets(name)}"
    known = [key for key, entry in catalogue().items() if entry.is_model == model]
    if name in known:
        return f"type: llama-acc download {name}"
    if same := [key for key in names_of_repository(name) if key in known]:
        return f"type: llama-acc download {same[0]}, and give that name"
    question = did_you_mean(name, known)
    return f"{question} (`llama-acc download --list` shows what can be downloaded)" if question else None


def _complete(place: Path, name: str) -> Path:
    if (place / INCOMING).is_dir():
        shown = without_secrets(name)
        raise UserError(f"the download of {shown} is incomplete", f"go on with: llama-acc download {shown}")
    return place


def _local_name(name: str) -> str:
    if not is_address(name):
        return name
    address = parse_address(name)
    return address.folder if isinstance(address, HubAddress) else address.file_name


# The record: {"format_version": 1, "files": {name: {"bytes", "identity", "source"}}, "done": {address: [names]}}


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder. One that cannot be read counts as none: files are then compared with what they should be.

    Raises:
        UserError: a newer program wrote it.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if known["format_version"] > _FORMAT_VERSION:
            raise UserError(f"{folder / RECORD} was written by a newer version of llama-acc", "update it")
        return {"files": dict(known["files"]), "done": dict(known["done"])}
    return {"files": {}, "done": {}}


def add_to_record(folder: Path, files: dict[str, dict[str, Any]], done: dict[str, list[str]]) -> None:
    """Note files that are whole, and addresses of which all files are."""
    with _writing:
        known = read_record(folder)
        whole = {name: {"bytes": (folder / name).stat().st_size, **facts} for name, facts in files.items()}
        record = {"format_version": _FORMAT_VERSION, "files": known["files"] | whole, "done": known["done"] | done}
        write_text_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")


def is_untouched(folder: Path, name: str, record: dict[str, Any]) -> bool:
    """Whether a file is here as it came, going by its size."""
    path = folder / name
    return name in record["files"] and path.is_file() and path.stat().st_size == record["files"][name]["bytes"]


def files_here(folder: Path, files: Sequence[File]) -> list[Path] | None:
    """The files of addresses that came whole and are still here; None if one of them is not."""
    record = read_record(folder)
    groups = [record["done"].get(parse_address(file.get).identity) for file in files]
    names = [name for group in groups for name in group or ()]
    is_complete = None not in groups and all(is_untouched(folder, name, record) for name in names)
    return [folder / name for name in names] if is_complete else None


# What is to be downloaded


@dataclass(frozen=True)
class DownloadRequest:
    """One thing to download.

    Attributes:
        name: as it was typed, without what may be secret.
        entry: of the catalogue; None for an address.
        files: what to fetch.
        to: the folder the user wants it in.
    """

    name: str
    entry: Entry | None
    files: tuple[File, ...]
    to: Path | None

    @property
    def asks_the_hub(self) -> bool:
        """Whether something of it is at Hugging Face."""
        return any(isinstance(parse_address(file.get), HubAddress) for file in self.files)


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
            folder = to if to is None or len(set(names)) == 1 else to / _own_folder(name)
            requests.append(DownloadRequest(without_secrets(name), entry, files, folder))
        except UserError as error:
            errors.append(error)
    if len(errors) > 1:
        raise UserError(f"{len(errors)} names are not known:\n{listed([e.message for e in errors])}", errors[0].hint)
    if errors:
        raise errors[0]
    return requests


def _own_folder(name: str) -> str:
    """A folder's name that differs for things that differ; files of one repository share theirs."""
    address = parse_address(name) if is_address(name) else name
    if isinstance(address, str):
        return address
    if isinstance(address, WebAddress):
        path = PurePosixPath(unquote(urlsplit(address.url).path))
        return "--".join((address.host, *path.parent.parts[1:], path.stem))
    return "--".join((f"{address.kind or 'model'}s", *address.folder.split("/")))
