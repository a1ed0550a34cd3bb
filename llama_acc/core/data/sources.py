"""From what a recipe's `data.sources` says to the files to read: names, folders, globs, LLaMA2-Accessory's YAML."""

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llama_acc.core.catalogue import is_address
from llama_acc.core.data.files import nearest_names
from llama_acc.core.data.readers import (
    FORMATS,
    YAML_SUFFIXES,
    data_files,
    is_data,
    raise_together,
)
from llama_acc.core.data.rows import SUFFIXES
from llama_acc.core.data.tar_shards import TAR_SUFFIX
from llama_acc.core.data.templates import TEMPLATES, ChatTemplate, get_template
from llama_acc.core.downloads import how_to_get, named_data
from llama_acc.core.errors import DataError, UserError, did_you_mean
from llama_acc.core.home import home
from llama_acc.core.hub import fetch_data
from llama_acc.core.input_files import read_yaml
from llama_acc.core.schema_problems import problems_of

SHIPPED = Path(__file__).parents[2] / "recipes"
# Of what LLaMA2-Accessory calls preprocess, the format here; captions are known by their keys.
_PREPROCESS = {"caption": "single_turn", "single_turn_llava": "single_turn_llava"}


@dataclass(frozen=True)
class Source:
    """Where data comes from: a file, glob, folder, downloaded name, or LLaMA2-Accessory's data YAML."""

    path: str
    format: str = "auto"
    template: str = "auto"
    ratio: float = 1.0
    root: str | None = None


@dataclass(frozen=True)
class FileSpec:
    """One file to read, and how.

    Attributes:
        path: the file.
        format: the kind of its items, or "auto".
        template: the prompt format, or "auto".
        ratio: how much of it is used.
        seed: makes its random choices differ from other files'.
        image_root: where relative paths of images begin.
    """

    path: Path
    format: str
    template: str
    ratio: float
    seed: tuple[int, int]
    image_root: Path


OTHERWISE = "give it with --data FILE"
"""What to do about a source of training data that is nowhere."""
Fetch = Callable[[str], list[Path]]
"""From an address, such as "hf:datasets/owner/name/train-*.jsonl", to its files, fetched where they are not yet."""


def expand(
    sources: Sequence[Source],
    recipe_folder: Path | None = None,
    fetch: Fetch = fetch_data,
    otherwise: str = OTHERWISE,
) -> list[FileSpec]:
    """All files of all sources.

    Args:
        sources: a recipe's.
        recipe_folder: where relative paths are looked for first.
        fetch: gets what has an address.
        otherwise: what to do about one that is nowhere, as a hint.

    Raises:
        RunError: the network failed.
        UserError: sources that are not there or say something unknown, all of them together.
    """
    specs: list[FileSpec] = []
    errors: list[UserError] = []
    for number, source in enumerate(sources):
        try:
            expanded = _expand_one(source, recipe_folder, fetch, otherwise)
        except UserError as error:
            errors.append(error)
            continue
        for i, (path, s, root) in enumerate(expanded):
            specs.append(FileSpec(path, s.format, s.template, s.ratio, (number, i), root))
    raise_together(errors)
    return specs


def check_sources(sources: Sequence[Source], recipe_folder: Path | None = None) -> None:
    """Finds what can be found wrong with sources at once, without fetching, drawing or reading any.

    Raises:
        UserError: sources that are not there or say something unknown, all of them together.
    """
    errors = []
    for source in sources:
        try:
            _check(source)
            if not (is_address(source.path) or source.path.startswith("drawn:")):
                resolve_data_path(source.path, recipe_folder)
        except UserError as error:
            errors.append(error)
    raise_together(errors)


def resolve_data_path(path: str, recipe_folder: Path | None = None, otherwise: str = OTHERWISE) -> Path:
    """Where a source's `path` is, if it is no address; a glob stays one.

    `shipped:NAME` comes with the package, `drawn:NAME` is drawn where it is not there yet. Else it is looked for
    beside the recipe, in the current folder and among the downloads.

    Raises:
        UserError: it is nowhere, or a download that is not finished or still to be converted.
    """
    if path.startswith("shipped:"):
        return _shipped(path.removeprefix("shipped:"))
    if path.startswith("drawn:"):
        return _drawn(path.removeprefix("drawn:"))
    given, downloads = Path(path).expanduser(), home() / "data"
    folders = [*([] if recipe_folder is None else [recipe_folder]), Path.cwd(), downloads]
    places = list(dict.fromkeys(folder / given for folder in folders))  # an absolute path is the only one
    for place in places:
        if place == downloads / given and not given.is_absolute() and (downloaded := named_data(path)) is not None:
            return downloaded
        if place.exists() or (glob.has_magic(str(place)) and glob.glob(str(place), recursive=True)):
            return place
    looked = "".join(f"\n  {place}" for place in places)
    near = next((hint for place in places if place.parent.is_dir() and (hint := nearest_names(place))), None)
    get = how_to_get(path, model=False)
    if near is not None and get is not None and get.startswith(near):
        near = None  # it is the name of a download that lies there
    hints = [hint for hint in (near, get, otherwise) if hint]
    raise UserError(f"there is no data {path!r}; looked for:{looked}", "; or ".join(hints).replace("?; or", "? Or"))


def _shipped(name: str) -> Path:
    path = SHIPPED / name
    if not path.exists() or SHIPPED.resolve() not in path.resolve().parents:
        raise UserError(f"no data {name!r} comes with llama-acc", nearest_names(path))
    return path


def _drawn(name: str) -> Path:
    from llama_acc.core.data.drawings import SPLITS, drawn_shard

    if name not in SPLITS:
        hint = did_you_mean(name, SPLITS) or f"there are: {', '.join(f'drawn:{split}' for split in SPLITS)}"
        raise UserError(f"no drawings are called {name!r}", hint)
    return drawn_shard(name)


def _expand_one(
    source: Source, recipe_folder: Path | None, fetch: Fetch, otherwise: str
) -> list[tuple[Path, Source, Path]]:
    """The files of a source, how to read each, and where its images are."""
    _check(source)
    if is_address(source.path):
        return _files(source, _fetched(source.path, fetch), recipe_folder)
    path = resolve_data_path(source.path, recipe_folder, otherwise)
    if path.suffix.lower() not in YAML_SUFFIXES:
        return _files(source, data_files(path), recipe_folder)
    found = []
    for entry in _accessory_sources(path, source):
        remote = is_address(entry.path)
        files = _fetched(entry.path, fetch) if remote else data_files(resolve_data_path(entry.path, path.parent))
        found += _files(entry, files, path.parent)
    return found


def _fetched(address: str, fetch: Fetch) -> list[Path]:
    """The data files among all that an address means."""
    files = fetch(address)
    found = [file for file in files if is_data(file)]
    if not found:
        names = ", ".join(file.name for file in files[:5])
        raise UserError(f"{address} holds no data files, but {names}", f"it should hold {', '.join(SUFFIXES)} files")
    return found


def _files(source: Source, files: list[Path], folder: Path | None) -> list[tuple[Path, Source, Path]]:
    root = None if source.root is None else resolve_image_root(source.root, folder)
    # A shard's images are its own members.
    return [(f, source, f.parent if root is None or f.suffix.lower() == TAR_SUFFIX else root) for f in files]


def resolve_image_root(root: str, folder: Path | None) -> Path:
    """The folder that relative paths of images begin at; it is looked for as data is, but need not be there."""
    given = Path(root).expanduser()
    places = [place / given for place in (*([] if folder is None else [folder]), Path.cwd(), home() / "data")]
    return next((place for place in places if place.is_dir()), places[0])


def _check(source: Source) -> None:
    if source.format not in FORMATS:
        hint = did_you_mean(source.format, FORMATS) or f"it is one of: {', '.join(FORMATS)}"
        raise UserError(f"{source.path}: unknown format {source.format!r}", hint)
    if source.template not in ("auto", ChatTemplate.name):
        get_template(source.template)
    if not 0 < source.ratio <= 1:
        raise UserError(f"{source.path}: ratio should be above 0 and at most 1, but is {source.ratio}")


class _MetaEntry(BaseModel):
    """An entry of LLaMA2-Accessory's `META`, where the bare instruction is called "None"."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str
    type: Literal["text", "image_text"]
    preprocess: Literal["caption", "single_turn_llava"] | None = None
    prompt_type: str | None = None
    ratio: float = Field(1.0, gt=0, le=1)
    root: str | None = None

    @field_validator("prompt_type")
    @classmethod
    def _known(cls, prompt_type: str | None) -> str:
        name = "none" if prompt_type in (None, "None") else str(prompt_type)
        if name not in TEMPLATES:
            raise ValueError(f"unknown prompt_type {name!r}: it is one of {', '.join(TEMPLATES)}")
        return name


def _accessory_sources(path: Path, outer: Source) -> list[Source]:
    """LLaMA2-Accessory's `META: [{path, type, ...}]`. Its paths are looked for beside the YAML file too."""
    content = read_yaml(path)
    if not isinstance(content, dict) or list(content) != ["META"]:
        raise UserError(f"{path} is not a data file of LLaMA2-Accessory: it should have one key, META")
    if not isinstance(content["META"], list) or not content["META"]:
        raise UserError(f"{path}: META should be a list of files")
    problems: list[str] = []
    sources = []
    for number, values in enumerate(content["META"], start=1):
        try:
            entry = _MetaEntry.model_validate(values)
        except ValidationError as error:
            found = problems_of(error, lambda key: did_you_mean(key, _MetaEntry.model_fields))
            problems += [f"{path}: META entry {number}: {problem}" for problem in found]
            continue
        format = _PREPROCESS.get(entry.preprocess or "", outer.format)
        sources.append(
            Source(
                entry.path,
                format,
                entry.prompt_type if entry.prompt_type is not None else outer.template,
                entry.ratio * outer.ratio,
                entry.root or outer.root,
            )
        )
    if problems:
        raise DataError(problems)
    return sources
