"""From what a recipe's `data.sources` says to the files to read: names, folders, globs, LLaMA2-Accessory's YAML."""

import glob
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llama_acc.core.catalogue import how_to_get, is_address, named_data
from llama_acc.core.data.items import FORMATS, Adapt
from llama_acc.core.data.plain_text import PLAIN_SUFFIXES
from llama_acc.core.data.read import SUFFIXES, TAR_SUFFIX, data_suffix, nearest_names
from llama_acc.core.data.templates import CHAT_TEMPLATE, TEMPLATES, check_template, is_template_file
from llama_acc.core.errors import DataError, UserError, did_you_mean, raise_all, schema_problems
from llama_acc.core.hub import fetch_data
from llama_acc.core.input_files import home, open_input, read_json, read_yaml

SHIPPED = Path(__file__).parents[2] / "recipes"
MISSING_HINT = "give it with --data FILE"
"""What to do about training data that is not found."""
# What a folder holds about data: our manifest, and what the Hub and the library datasets put there.
_NO_DATA = re.compile(r"(manifest|dataset_infos?|dataset_dict)\.json$|readme|license", re.IGNORECASE)
_YAML_SUFFIXES = (".yaml", ".yml")
# Of what LLaMA2-Accessory calls preprocess, the format here; captions are known by their keys.
_PREPROCESS = {"caption": "single_turn", "single_turn_llava": "single_turn_llava"}

Fetch = Callable[[str], list[Path]]
"""From an address, such as "hf:datasets/owner/name/train-*.jsonl", to its files, fetched where they are not yet."""


@dataclass(frozen=True)
class Source:
    """Where data comes from: a file, glob, folder, downloaded name, or LLaMA2-Accessory's data YAML."""

    path: str
    format: str = "auto"
    template: str = "auto"
    ratio: float = 1.0
    weight: float = 1.0
    root: str | None = None
    train_on: str = "all"
    reasoning: str = "keep"
    folder: Path | None = None  # where relative paths are looked for first


@dataclass(frozen=True)
class FileSpec:
    """One file to read, and how."""

    path: Path
    format: str  # the kind of its items, or "auto"
    template: str  # the prompt format, or "auto"
    ratio: float  # how much of it is used
    weight: float  # how often in an epoch
    seed: tuple[int, int]  # makes its random choices differ from other files'
    image_root: Path  # where relative paths of images begin
    adapt: Adapt


def expand(
    sources: Sequence[Source],
    fetch: Fetch | None = fetch_data,
    missing_hint: str = MISSING_HINT,
) -> list[FileSpec]:
    """All files of all sources.

    `fetch` gets what has an address; None: nothing is fetched, only what is wrong is found. `missing_hint`: what to do
    about a source that is not found.

    Raises:
        RunError: the network failed.
        UserError: sources that are not found or say something unknown, all of them together.
    """
    specs: list[FileSpec] = []
    errors: list[UserError] = []
    for number, source in enumerate(sources):
        try:
            found = _expand_one(source, fetch, missing_hint)
            template = _template_of(source)
        except UserError as error:
            errors.append(error)
            continue
        for i, (path, s) in enumerate(found):
            # A shard's images are its own members.
            beside = s.root is None or path.suffix.lower() == TAR_SUFFIX
            root = path.parent if beside else resolve_image_root(str(s.root), s.folder)
            adapt = Adapt(s.train_on == "last", s.reasoning == "drop")
            place = (number, i)
            specs.append(FileSpec(path, s.format, template or s.template, s.ratio, s.weight, place, root, adapt))
    raise_all(errors)
    return specs


def data_files(path: str | Path) -> list[Path]:
    """The data files that a file name, folder or glob stands for, sorted."""
    path = Path(path).expanduser()
    if path.is_dir():
        inside = _data_among(sorted(path.iterdir()))
        for file in [*path.glob("data-*.arrow"), *(() if inside else path.glob("*/data-*.arrow"))]:
            folder = json.dumps(str(file.parent))
            program = f'from datasets import load_from_disk as load; load({folder}).to_parquet("NEW.parquet")'
            hint = f"write it as Parquet: python -c {shlex.quote(program)}"
            raise UserError(f"{path} is in Arrow's form, in which datasets' save_to_disk writes", hint)
        if not inside:
            folders = [
                str(folder) for folder in sorted(path.iterdir()) if folder.is_dir() and _data_among([*folder.iterdir()])
            ]
            hint = f"give {' or '.join(folders)}" if folders else f"it should hold {', '.join(SUFFIXES)} files"
            raise UserError(f"no data files in {path}", hint)
        return inside
    if path.exists():
        if not path.is_file() and not path.is_fifo():
            raise UserError(f"cannot read {path}: it is a device or a socket, not a file")
        return [path]
    if glob.has_magic(str(path)):
        matches = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
        if not matches:
            raise UserError(f"no file matches {path}")
        return matches
    raise UserError(f"there is no data file {path}", nearest_names(path))


def _data_among(files: Sequence[Path]) -> list[Path]:
    """The files that are data, of those nobody named, going by their names. Plain texts beside others are about the
    data."""
    found = [file for file in files if data_suffix(file) in SUFFIXES and not file.name.startswith(".")]
    found = [file for file in found if not _NO_DATA.match(file.name) and file.is_file()]
    return [file for file in found if data_suffix(file) not in PLAIN_SUFFIXES] or found


def resolve_data_path(path: str, folder: Path | None = None, missing_hint: str = MISSING_HINT) -> Path:
    """Where a source's `path` is, if it is no address; a glob stays one.

    `shipped:NAME` comes with the package. Else it is looked for in `folder`, beside the recipe; in the current one;
    and among the downloads.
    """
    kind, _, name = path.partition(":")
    if kind == "shipped":
        shipped = SHIPPED / name
        if not shipped.exists() or SHIPPED.resolve() not in shipped.resolve().parents:
            raise UserError(f"no data {name!r} comes with llama-acc", nearest_names(shipped))
        return shipped
    given, places = Path(path).expanduser(), _places(path, folder)
    for place in places:
        if place == home() / "data" / given and not given.is_absolute() and (named := named_data(path)) is not None:
            return named
        if place.exists() or (glob.has_magic(str(place)) and glob.glob(str(place), recursive=True)):
            return place
    looked = "".join(f"\n  {place}" for place in places)
    near = next((hint for place in places if place.parent.is_dir() and (hint := nearest_names(place))), None)
    get = how_to_get(path, model=False)
    if near is not None and get is not None and get.startswith(near):
        near = None  # it is the name of a download that lies there
    hints = [hint for hint in (near, get, missing_hint) if hint]
    raise UserError(f"there is no data {path!r}; looked for:{looked}", "; or ".join(hints).replace("?; or", "? Or"))


def resolve_image_root(root: str, folder: Path | None) -> Path:
    """The folder that relative paths of images begin at; it is looked for as data is, but need not be there."""
    places = _places(root, folder)
    return next((place for place in places if place.is_dir()), places[0])


def _template_of(source: Source) -> str | None:
    """The prompt format that is given as a file, which is looked for as data is; None: it is given by name."""
    if not is_template_file(source.template):
        return None
    places = _places(source.template, source.folder)
    if (found := next((place for place in places if place.is_file()), None)) is None:
        looked = "".join(f"\n  {place}" for place in places)
        raise UserError(f"there is no template {source.template!r}; looked for:{looked}", nearest_names(places[0]))
    return str(found)


def _places(path: str, folder: Path | None) -> list[Path]:
    """Where a path may be: beside the recipe, here, among the downloads; an absolute one is the only one."""
    folders = filter(None, (folder, Path.cwd(), home() / "data"))
    return list(dict.fromkeys(folder / Path(path).expanduser() for folder in folders))


def _expand_one(
    source: Source, fetch: Fetch | None, missing_hint: str, *, is_entry: bool = False
) -> list[tuple[Path, Source]]:
    """The files of a source, and how to read each."""
    if source.format not in FORMATS:
        hint = did_you_mean(source.format, FORMATS) or f"it is one of: {', '.join(FORMATS)}"
        raise UserError(f"{source.path}: unknown format {source.format!r}", hint)
    if source.template not in ("auto", CHAT_TEMPLATE) and not is_template_file(source.template):
        check_template(source.template)
    if is_address(source.path):
        files = [] if fetch is None else fetch(source.path)
        found = _data_among(files)
        if files and not found:
            names = ", ".join(file.name for file in files[:5])
            hint = f"it should hold {', '.join(SUFFIXES)} files"
            raise UserError(f"{source.path} holds no data files, but {names}", hint)
        return [(file, source) for file in found]
    path = resolve_data_path(source.path, source.folder, missing_hint)
    entries = [] if is_entry else _entries(path, source)
    if not entries:
        return [(file, source) for file in data_files(path)]
    return [file for entry in entries for file in _expand_one(entry, fetch, missing_hint, is_entry=True)]


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


def _entries(path: Path, source: Source) -> list[Source]:
    """What a list of files names; of anything else nothing."""
    if path.suffix.lower() in _YAML_SUFFIXES:
        return _accessory_sources(path, source)
    if path.suffix.lower() != ".json" or not path.is_file():
        return []
    try:
        with open_input(path, pipes=False) as file:
            is_list = re.match(rb'(\xef\xbb\xbf)?\s*\[\s*"', file.read(64))
    except OSError:
        return []  # which is reported when it is read as data
    return _pretraining_sources(path, source) if is_list else []


def _pretraining_sources(path: Path, outer: Source) -> list[Source]:
    """LLaMA2-Accessory's list of pretraining shards, in a JSON array: plain text. Its paths are looked for in `root`,
    its `data_root`, or beside the list."""
    names = read_json(path)
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} should hold items, or be a list of files, but holds both")
    if packed := next((name for name in names if name.endswith(".pkl")), None):
        raise UserError(
            f"{path} names {packed}, tokens that LLaMA2-Accessory has packed as a pickle, which may run code when read",
            "name the .parquet files that they were made of",
        )
    folder = path.parent if outer.root is None else resolve_image_root(outer.root, outer.folder)
    return [replace(outer, path=name, format="text", folder=folder) for name in names]


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
            found = schema_problems(error, lambda key: did_you_mean(key, _MetaEntry.model_fields))
            problems += [f"{path}: META entry {number}: {problem}" for problem in found]
            continue
        ratio, root = entry.ratio * outer.ratio, entry.root or outer.root
        inner = replace(outer, path=entry.path, ratio=ratio, root=root, folder=path.parent)
        if entry.preprocess is not None:
            inner = replace(inner, format=_PREPROCESS[entry.preprocess])
        sources.append(inner if entry.prompt_type is None else replace(inner, template=entry.prompt_type))
    if problems:
        raise DataError(problems)
    return sources
