"""What is in this folder? Finds a checkpoint's format, shards and tokenizer from file names alone. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llama_acc.core.checkpoint.huggingface import read_huggingface
from llama_acc.core.checkpoint.towers import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, open_clip_tower, tower_of
from llama_acc.core.downloads import how_to_get, named_model
from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import home, read_json, read_text
from llama_acc.core.model.config import (
    VISION_FILE,
    ClipVision,
    ModelConfig,
    QFormerVision,
    Vision,
    config_from_params,
    read_params,
    read_vision,
)
from llama_acc.core.model.tuning import FULL, Tuning, tuning_of

Format = Literal["meta_ori", "consolidated", "consolidated_diff", "huggingface"]
_NAMES: dict[Format, str] = {
    "meta_ori": "consolidated.{part:02d}.pth",
    "consolidated": "consolidated.{part:02d}-of-{parts:02d}.model.pth",
    "consolidated_diff": "consolidated.{part:02d}-of-{parts:02d}.model-diff.pth",
}
_PATTERNS = {kind: re.sub(r"\{(\w+):02d\}", r"(?P<\1>\\d+)", name.replace(".", r"\.")) for kind, name in _NAMES.items()}
# Hugging Face's files, by how they begin and end; those first in the list are read where there are both.
_HUGGINGFACE = (("model", ".safetensors"), ("pytorch_model", ".bin"))


@dataclass(frozen=True)
class Layout:
    """A checkpoint folder.

    Attributes:
        folder: where it is.
        format: `meta_ori` (Meta's release), `consolidated` (saved by this toolkit or LLaMA2-Accessory),
            `consolidated_diff` (the same, to be added to what comes before it) or `huggingface`.
        shards: the files with weights, in order.
        params_path: params.json or config.json, if there is one.
        tower: it is no LLaMA, but a vision tower of this kind.
        weight_map: of Hugging Face's index, the file in which each tensor is; None = there is no index.
        notes: what in the folder is not read, for the user.
    """

    folder: Path
    format: Format
    shards: tuple[Path, ...]
    params_path: Path | None
    tower: Vision | None = None
    weight_map: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def model_parallel_size(self) -> int:
        """How many ranks the tensors are split over; Hugging Face's files hold whole tensors."""
        return 1 if self.format == "huggingface" else len(self.shards)

    @property
    def is_diff(self) -> bool:
        """Whether its tensors are added to those of the checkpoint before it."""
        return self.format == "consolidated_diff"


def locate(name: str) -> Path:
    """The checkpoint folder the user means: a folder, a run's folder (its latest checkpoint) or a downloaded name.

    Raises:
        UserError: nothing is there.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = named_model(name) or folder
    if not folder.exists():
        where = "give the folder that holds consolidated.00.pth, consolidated.00-of-01.model.pth or model.safetensors"
        raise UserError(
            f"there is no checkpoint folder {name}, and no downloaded model of that name in {home() / 'models'}",
            "; or ".join(hint for hint in (how_to_get(name, model=True), where) if hint),
        )
    if not folder.is_dir():
        raise UserError(f"{name} is a file: give the folder that holds it")
    return latest_checkpoint(folder) or folder


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, or None if it has none."""
    pointer = run / "latest"
    if not pointer.is_file():
        return None
    name = read_text(pointer).strip()
    if name in ("", "..") or Path(name).name != name or not (run / name).is_dir():
        raise UserError(
            f"{pointer} names '{name}', which is not a checkpoint in {run}",
            "write the name of a checkpoint folder into it",
        )
    return run / name


def inspect(folder: Path) -> Layout:
    """Finds out a checkpoint's format and shards.

    Raises:
        UserError: no checkpoint, two formats, a missing shard, a format that cannot be read.
    """
    found: dict[Format, dict[tuple[int, int], Path]] = {}
    for path in sorted(folder.iterdir()):
        for name, pattern in _PATTERNS.items():
            if match := re.fullmatch(pattern, path.name):
                groups = {"parts": None, **match.groupdict()}
                found.setdefault(name, {})[int(groups["parts"] or 0), int(groups["part"] or 0)] = path
    huggingface = _inspect_huggingface(folder)
    files = {kind: list(parts.values()) for kind, parts in found.items()}
    files |= {"huggingface": list(huggingface.shards)} if huggingface else {}
    if len(files) > 1:
        lines = [f"{name}: {', '.join(path.name for path in parts)}" for name, parts in files.items()]
        raise UserError(f"{folder} mixes checkpoint formats:\n{listed(lines)}", "keep one format per folder")
    if huggingface is not None:
        return huggingface
    if not found and (folder / OPEN_CLIP_WEIGHTS).is_file() and (folder / OPEN_CLIP_CONFIG).is_file():
        config = folder / OPEN_CLIP_CONFIG
        return Layout(folder, "huggingface", (folder / OPEN_CLIP_WEIGHTS,), config, open_clip_tower(config))
    if not found:
        raise UserError(f"{folder} holds no LLaMA checkpoint", _what_is_there(folder))
    ((kind, files_found),) = found.items()
    shards = _shards(folder, _NAMES[kind], files_found, first=0)
    own, other = ("params.json", "config.json") if kind == "meta_ori" else ("config.json", "params.json")
    params = [folder / file for file in (own, other) if (folder / file).is_file()]
    return Layout(folder, kind, shards, params[0] if params else None)


def _inspect_huggingface(folder: Path) -> Layout | None:
    """Hugging Face's files in a folder; None = there are none. An index decides which they are.

    Raises:
        UserError: see `inspect`.
    """
    names = sorted(path.name for path in folder.iterdir())
    for stem, suffix in _HUGGINGFACE:
        index = folder / f"{stem}{suffix}.index.json"
        weight_map = _weight_map(index)
        if weight_map is not None:
            shards = tuple(folder / name for name in sorted(set(weight_map.values())))
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise UserError(
                    f"{index} names files that are missing: {', '.join(missing)}",
                    "download or copy the checkpoint again",
                )
        else:
            pattern = rf"{stem}(-(?P<part>\d{{5}})-of-(?P<parts>\d{{5}}))?{re.escape(suffix)}"
            matches = [match for name in names if (match := re.fullmatch(pattern, name))]
            if not matches:
                continue
            found = {(int(one["parts"] or 0), int(one["part"] or 0)): folder / one[0] for one in matches}
            # They are counted from 1, except for a single file, which has no number.
            one_file = found.keys() == {(0, 0)}
            shards = _shards(folder, f"{stem}-{{part:05d}}-of-{{parts:05d}}{suffix}", found, first=int(not one_file))
        config = folder / "config.json"
        if not config.is_file():
            raise UserError(
                f"{folder} holds {shards[0].name} but no config.json, which says how to read it",
                "copy config.json from where the weights came from",
            )
        return Layout(
            folder, "huggingface", shards, config, tower_of(config), weight_map, _unread(names, shards, weight_map)
        )
    return None


def _weight_map(index: Path) -> dict[str, str] | None:
    """The file of each tensor that Hugging Face's index names; None = there is no index.

    Raises:
        UserError: it is not what an index is, or names a file of another folder.
    """
    if not index.is_file():
        return None
    places = _read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f'{index} must hold {{"weight_map": {{TENSOR: FILE, ...}}}}', "copy it again, or remove it")
    if outside := sorted({name for name in places.values() if Path(name).name != name or name in ("", "..")}):
        raise UserError(f"{index} names {outside[0]!r}, which is no file of its folder", "copy the index again")
    return dict(places)


def _unread(names: Sequence[str], shards: Sequence[Path], weight_map: Mapping[str, str] | None) -> tuple[str, ...]:
    """A note on files that look like weights and are not read."""
    read = {shard.name for shard in shards}
    others = [
        name for name in names if re.fullmatch(r".*\.safetensors|pytorch_model.*\.bin", name) and name not in read
    ]
    why = "which its index does not name" if weight_map is not None else f"beside {shards[0].name}"
    single = " (transformers would read it alone)" if weight_map is not None and "model.safetensors" in others else ""
    return (f"{shards[0].parent}: not read, {why}: {', '.join(others)}{single}",) if others else ()


def _shards(folder: Path, name: str, found: dict[tuple[int, int], Path], first: int) -> tuple[Path, ...]:
    """The files in order.

    Args:
        folder: where they are.
        name: how such a file is called.
        found: by (number of files, or 0 where the name does not say; which of them).
        first: number of the first file.
    """
    sizes = sorted({size for size, _ in found})
    if len(sizes) > 1:
        raise UserError(
            f"{folder} holds model files of two savings: {', '.join(path.name for path in found.values())}",
            "keep those that belong together",
        )
    size = sizes[0] or max(part for _, part in found) + 1
    wanted = range(first, first + size)
    missing = [part for part in wanted if (sizes[0], part) not in found]
    if missing:
        names = ", ".join(name.format(part=part, parts=size) for part in missing)
        raise UserError(f"shards are missing in {folder}: {names}", "download or copy the checkpoint again")
    return tuple(found[sizes[0], part] for part in wanted)


def _what_is_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return (
            "it is an adapter of PEFT; merge it into its base: "
            "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)"
        )
    inside = [name for name in names if (folder / name).is_dir() and any((folder / name).glob("consolidated.*"))]
    if inside:
        return f"did you mean {' or '.join(str(folder / name) for name in inside[:3])}?"
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    return f"it holds {shown}" if names else "it is empty"


def read_config(layouts: Sequence[Layout]) -> ModelConfig | None:
    """The shape the checkpoints say they have (union of their files, the last wins), or None if they say nothing.

    Raises:
        UserError: unusable values, an unknown tuning method, or a diff without its base.
    """
    check_order(layouts)
    union: dict[str, Any] = {}
    tuning, vision, implied = FULL, None, None
    paths = []
    for layout in layouts:
        vision = _vision(layout) or vision
        if layout.tower is not None:
            continue
        paths += [] if layout.params_path is None else [layout.params_path]
        own, shape, seeing = _own_shape(layout)
        union |= shape
        implied = seeing or implied
        # What lies over a tuned checkpoint, a diff say, does not undo its method.
        tuning = own if own != FULL else tuning
    if not paths:
        return None
    config = config_from_params(union, " and ".join(map(str, paths)))
    if vision is None and implied is not None and _has_tensors_of(implied, layouts):
        vision = implied
    return replace(config, tuning=tuning.with_num_layers(config.n_layers), vision=vision)


def _own_shape(layout: Layout) -> tuple[Tuning, dict[str, Any], Vision | None]:
    """A checkpoint's method, the shape in its file by params.json's names, and what LLaMA2-Accessory's may see with.

    Raises:
        UserError: unusable values, an unknown method, two files that disagree.
    """
    path, kind = layout.params_path, str(_read_json(layout.folder / "meta.json").get("llama_type", "llama"))
    if layout.format == "huggingface" and path is not None:
        config = read_huggingface(path)[0]
        return config.tuning, config.base().to_params(), None
    arguments = {} if path is None else read_params([path])
    for name in ("params.json", "config.json"):
        other = layout.folder / name
        if path is None or other == path or not other.is_file():
            continue
        values = _read_json(other)
        keys = [key for key in arguments if key in values and values[key] != arguments[key]]
        if keys and "model_type" not in values:
            what = ", ".join(f"{key} {arguments[key]!r:.40} and {values[key]!r:.40}" for key in keys)
            raise UserError(f"{path} and {other} disagree: {what}", "remove the one that is not of these weights")
    try:
        return *tuning_of(kind, arguments), _implied_vision(kind, arguments)
    except UserError as error:
        raise UserError(f"{layout.folder}: {error.message}", error.hint) from None


def says_context(layouts: Sequence[Layout]) -> bool:
    """Whether one of the checkpoints says its longest sequence, as Meta's do not."""
    return any(_own_shape(layout)[1].get("max_seq_len") for layout in without_towers(layouts))


def shape_notes(layouts: Sequence[Layout]) -> list[str]:
    """Where checkpoints laid over each other say different things that their tensors' shapes do not tell."""
    said: dict[str, tuple[Any, Path]] = {}
    notes = []
    for layout in without_towers(layouts):
        if layout.params_path is None:
            continue
        shape = _own_shape(layout)[1]
        for key in ("norm_eps", "rope_theta", "rope_scaling"):
            value, before = shape.get(key), said.get(key)
            if value is not None and before is not None and before[0] != value:
                notes.append(f"{key} is {before[0]} in {before[1]}, and {value} in {layout.params_path}, which counts")
            if value is not None:
                said[key] = value, layout.params_path
    return notes


def _implied_vision(kind: str, arguments: Mapping[str, Any]) -> Vision | None:
    """What LLaMA2-Accessory's checkpoints see with, which say no more than their kind."""
    if kind == "llama_adapter" and str(arguments.get("trainable_mode")).startswith("mm_"):
        return ClipVision()
    return QFormerVision() if kind.startswith("llama_qformerv2") else None


def _has_tensors_of(vision: Vision, layouts: Sequence[Layout]) -> bool:
    """Whether the checkpoints hold what a kind of vision adds: those of text alone may have been named as seeing ones.

    LLaMA2-Accessory writes `trainable_mode` also where it built no encoder (with_visual=False).
    """
    from llama_acc.core.checkpoint.load import open_checkpoint  # needs torch

    names = [name for layout in layouts for name in open_checkpoint(layout).tensors]
    return any(name.startswith((vision.tower_prefix, *vision.part_names)) for name in names)


def _vision(layout: Layout) -> Vision | None:
    """What a checkpoint says that it sees with."""
    if layout.tower is not None:
        return layout.tower
    if (layout.folder / VISION_FILE).is_file():
        return read_vision(layout.folder / VISION_FILE)
    return None


def without_towers(layouts: Sequence[Layout]) -> list[Layout]:
    """The LLaMA's checkpoints: beside a tower lie a tokenizer and settings that are not its."""
    return [layout for layout in layouts if layout.tower is None]


def check_order(layouts: Sequence[Layout]) -> None:
    """Refuses a diff that has nothing before it.

    Raises:
        UserError: naming it.
    """
    if layouts and layouts[0].is_diff:
        raise UserError(
            f"{layouts[0].folder} is a diff checkpoint: it is added to the one before it, and there is none",
            "give its base first: the same option once more, before this one",
        )


def _read_json(path: Path) -> dict[str, Any]:
    values = read_json(path) if path.exists() else {}
    return values if isinstance(values, dict) else {}
