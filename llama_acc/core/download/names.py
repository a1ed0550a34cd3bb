"""Downloads by name: where they are, and what to type for those that are not there.

    LLAMA_ACC_HOME/data/NAME/        what `--data NAME` reads; NAME/raw/ holds what is to be converted first
    LLAMA_ACC_HOME/models/NAME/      what `--pretrained NAME` and `--ckpt NAME` load

Imports neither torch nor the network's clients: data and checkpoints are looked for before either is needed.
"""

from pathlib import Path

from llama_acc.core.download.address import HubAddress, is_address, parse_address
from llama_acc.core.download.catalogue import Entry, catalogue, find_entry, names_of_repository
from llama_acc.core.download.record import Record
from llama_acc.core.errors import UserError, did_you_mean
from llama_acc.core.home import home

RAW = "raw"


def folder_of(entry: Entry) -> Path:
    """Where an entry's files lie."""
    return home() / ("models" if entry.is_model else "data") / entry.name


def raw_folder_of(entry: Entry) -> Path:
    """Where an entry's files are downloaded to: aside, if they are to be converted."""
    return folder_of(entry) / RAW if entry.convert else folder_of(entry)


def is_here(entry: Entry) -> bool:
    """Whether all of an entry was downloaded."""
    folder = raw_folder_of(entry)
    keys = [parse_address(file.get).identity for file in entry.files]
    return folder.is_dir() and all(Record(folder).finished(key) is not None for key in keys)


def converted_file(name: str) -> Path:
    """Where an entry's converted data belongs, to be found by `--data NAME`."""
    return home() / "data" / name / f"{name}.jsonl"


def raw_files(name: str) -> list[Path]:
    """The downloaded files of an entry that is to be converted.

    Raises:
        UserError: no such entry, or it is not downloaded yet.
    """
    entry = find_entry(name)
    folder = raw_folder_of(entry)
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not found or unfinished(folder):
        raise UserError(f"{name} is not downloaded: {_state(folder)}", f"type: llama-acc download {name}")
    return found


def named_model(name: str) -> Path | None:
    """The folder of a downloaded model, by its name or its `hf:` address; None if it is not there.

    Raises:
        UserError: its download has not come to its end.
    """
    place = home() / "models" / _folder_name(name)
    return _finished(place, name) if place.is_dir() else None


def named_data(name: str) -> Path | None:
    """The folder or file of downloaded data, by its name or address; None if it is not there.

    Raises:
        UserError: its download has not come to its end, or it is still to be converted.
    """
    place = home() / "data" / _folder_name(name)
    if not place.exists():
        return None
    entry = catalogue().get(name)
    if entry is not None and entry.convert and not _holds_files(place):
        raw_files(name)
        raise UserError(
            f"{name} is downloaded to {raw_folder_of(entry)}, but not converted yet",
            f"type: {entry.conversion}",
        )
    return _finished(place, name)


def how_to_get(name: str, model: bool) -> str | None:
    """What to type for a name that is not there, if it is one that can be downloaded."""
    if is_address(name):
        return f"type: llama-acc download {name}"
    known = [key for key, entry in catalogue().items() if entry.is_model == model]
    if name in known:
        return f"type: llama-acc download {name}"
    if same := [key for key in names_of_repository(name) if key in known]:
        return f"type: llama-acc download {same[0]}, and give that name"
    question = did_you_mean(name, known)
    return f"{question} (`llama-acc download --list` shows what can be downloaded)" if question else None


def unfinished(folder: Path) -> list[Path]:
    """Parts of files whose download was interrupted."""
    return sorted(folder.rglob(".*.part")) if folder.is_dir() else []


def _finished(place: Path, name: str) -> Path:
    if parts := unfinished(place):
        names = ", ".join(part.name[1:].removesuffix(".part") for part in parts[:3])
        raise UserError(f"the download of {name} is not finished: {names}", f"go on with: llama-acc download {name}")
    return place


def _folder_name(name: str) -> str:
    if not is_address(name):
        return name
    address = parse_address(name)
    return address.folder if isinstance(address, HubAddress) else address.file_name


def _holds_files(folder: Path) -> bool:
    return any(path.is_file() and not path.name.startswith(".") for path in folder.iterdir())


def _state(folder: Path) -> str:
    return f"{folder} is not finished" if unfinished(folder) else f"there is nothing in {folder}"
