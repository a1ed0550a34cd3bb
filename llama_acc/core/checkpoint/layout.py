"""What is in this folder? Finds a checkpoint's format, shards and shape, mostly from file names. Imports no torch."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llama_acc.core.catalogue import how_to_get, named_model
from llama_acc.core.checkpoint.huggingface import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    open_clip_tower,
    read_huggingface,
    tower_of,
)
from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import home, read_object, read_text
from llama_acc.core.model.config import ModelConfig, config_from_params, read_params
from llama_acc.core.model.tuning import FULL, Tuning, tuning_of
from llama_acc.core.model.vision_config import VISION_FILE, ClipVision, QFormerVision, Vision, read_vision

Format = Literal["meta_ori", "consolidated", "consolidated_diff", "huggingface", "peft"]
_NAMES: dict[Format, str] = {
    "meta_ori": "consolidated.{part:02d}.pth",
    "consolidated": "consolidated.{part:02d}-of-{parts:02d}.model.pth",
    "consolidated_diff": "consolidated.{part:02d}-of-{parts:02d}.model-diff.pth",
}
PEFT_CONFIG, PEFT_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_MISTRAL = "consolidated.safetensors"  # Mistral's release: Meta's names
# Hugging Face's files, by how they begin and end; those first in the list are read where there are both.
_HUGGINGFACE = (("model", ".safetensors"), ("pytorch_model", ".bin"))


@dataclass(frozen=True)
class Layout:
    """A checkpoint folder."""

    folder: Path
    # `meta_ori` (Meta's release, or Mistral's), `consolidated` (saved by this toolkit or LLaMA2-Accessory),
    # `consolidated_diff` (the same, to be added to what comes before it), `huggingface` or `peft` (an adapter)
    format: Format
    shards: tuple[Path, ...]  # the files with weights, in order
    params_path: Path | None  # params.json or config.json, if there is one
    tower: Vision | None = None  # it is no LLaMA, but a vision tower of this kind
    # Of Hugging Face's index, the file in which each tensor is; None = there is no index
    weight_map: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()  # what in the folder is not read, for the user

    @property
    def model_parallel_size(self) -> int:
        """How many ranks the tensors are split over; Hugging Face's files hold whole tensors."""
        return 1 if self.format in ("huggingface", "peft") else len(self.shards)

    @property
    def is_diff(self) -> bool:
        """Whether its tensors are added to those of the checkpoint before it."""
        return self.format == "consolidated_diff"


# Folders


def locate(name: str) -> Path:
    """The checkpoint folder the user means: a folder, a run's folder (its latest checkpoint) or a downloaded name."""
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
    """Finds out a checkpoint's format and shards."""
    names = sorted(path.name for path in folder.iterdir())
    found: dict[Format, Layout] = {}
    for kind, name in _NAMES.items():
        if files := _numbered(folder, names, name):
            own, other = ("params.json", "config.json") if kind == "meta_ori" else ("config.json", "params.json")
            params = [folder / file for file in (own, other) if (folder / file).is_file()]
            found[kind] = Layout(folder, kind, files, params[0] if params else None)
    if huggingface := _inspect_huggingface(folder, names):
        found["huggingface"] = huggingface
    if not found and _MISTRAL in names:  # which Mistral's repositories on Hugging Face have besides
        shape = folder / "params.json"
        found["meta_ori"] = Layout(folder, "meta_ori", (folder / _MISTRAL,), shape if shape.is_file() else None)
    adapter = [folder / name for name in PEFT_FILES if name in names]
    if not found and adapter and PEFT_CONFIG in names:
        found["peft"] = Layout(folder, "peft", (adapter[0],), None)
    if len(found) > 1:
        lines = [f"{kind}: {', '.join(path.name for path in one.shards)}" for kind, one in sorted(found.items())]
        raise UserError(f"{folder} mixes checkpoint formats:\n{listed(lines)}", "keep one format per folder")
    if not found and {OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG} <= set(names):
        config = folder / OPEN_CLIP_CONFIG
        return Layout(folder, "huggingface", (folder / OPEN_CLIP_WEIGHTS,), config, open_clip_tower(config))
    if not found:
        raise UserError(f"{folder} holds no LLaMA checkpoint", _what_is_there(folder, names))
    return next(iter(found.values()))


def _numbered(folder: Path, names: Sequence[str], form: str, first: int = 0) -> tuple[Path, ...]:
    """The files of a form such as `model-{part:05d}-of-{parts:05d}.safetensors`, in order, all of them.

    A single file may be without its numbers. `first` is the number of the first file.
    """
    pattern = re.sub(r"\\\{(\w+):0(\d)d\\\}", r"(?P<\1>\\d{\2,})", re.escape(form))
    matches = [match.groupdict() | {"name": name} for name in names if (match := re.fullmatch(pattern, name))]
    single = re.sub(r"-\{part:\d+d\}-of-\{parts:\d+d\}", "", form)
    if single != form and single in names:
        matches.append({"part": str(first), "parts": None, "name": single})
    if not matches:
        return ()
    sizes = {match.get("parts") for match in matches}
    if len(sizes) > 1:
        savings = ", ".join(match["name"] for match in matches)
        raise UserError(f"{folder} holds model files of two savings: {savings}", "keep those that belong together")
    found = {int(match["part"]): folder / match["name"] for match in matches}
    size = int(sizes.pop() or max(found) + 1 - first)
    if missing := [part for part in range(first, first + size) if part not in found]:
        missed = ", ".join(form.format(part=part, parts=size) for part in missing)
        raise UserError(f"shards are missing in {folder}: {missed}", "download or copy the checkpoint again")
    return tuple(found[part] for part in range(first, first + size))


def _inspect_huggingface(folder: Path, names: Sequence[str]) -> Layout | None:
    """Hugging Face's files in a folder; None = there are none. An index decides which they are."""
    for stem, suffix in _HUGGINGFACE:
        index = folder / f"{stem}{suffix}.index.json"
        weight_map = _weight_map(index) if index.is_file() else None
        if weight_map is not None:
            shards = tuple(folder / name for name in sorted(set(weight_map.values())))
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                message = f"{index} names files that are missing: {', '.join(missing)}"
                raise UserError(message, "download or copy the checkpoint again")
        else:
            shards = _numbered(folder, names, f"{stem}-{{part:05d}}-of-{{parts:05d}}{suffix}", first=1)
        if not shards:
            continue
        config = folder / "config.json"
        if not config.is_file():
            raise UserError(
                f"{folder} holds {shards[0].name} but no config.json, which says how to read it",
                "copy config.json from where the weights came from",
            )
        read = {shard.name for shard in shards}
        others = [name for name in names if re.fullmatch(r".*\.safetensors|pytorch_model.*\.bin", name)]
        notes: tuple[str, ...] = ()
        if others := [name for name in others if name not in read]:
            why = "which its index does not name" if weight_map is not None else f"beside {shards[0].name}"
            notes = (f"{folder}: not read, {why}: {', '.join(others)}",)
        return Layout(folder, "huggingface", shards, config, tower_of(config), weight_map, notes)
    return None


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor that Hugging Face's index names; a UserError if one is of another folder."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, Mapping) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f'{index} must hold {{"weight_map": {{TENSOR: FILE, ...}}}}', "copy it again, or remove it")
    if outside := sorted({name for name in places.values() if Path(name).name != name or name in ("", "..")}):
        raise UserError(f"{index} names {outside[0]!r}, which is no file of its folder", "copy the index again")
    return dict(places)


def _what_is_there(folder: Path, names: Sequence[str]) -> str:
    if PEFT_CONFIG in names:
        return f"it is an adapter of PEFT without its weights: {' or '.join(PEFT_FILES)}"
    inside = [name for name in names if (folder / name).is_dir() and any((folder / name).glob("consolidated.*"))]
    if inside:
        return f"did you mean {' or '.join(str(folder / name) for name in inside[:3])}?"
    return f"it holds {', '.join(names[:8])}{' ...' * (len(names) > 8)}" if names else "it is empty"


def without_towers(layouts: Sequence[Layout]) -> list[Layout]:
    """The LLaMA's checkpoints: beside a tower lie a tokenizer and settings that are not its."""
    return [layout for layout in layouts if layout.tower is None]


def check_order(layouts: Sequence[Layout]) -> None:
    """Refuses a diff, or an adapter of PEFT, that has nothing before it."""
    if layouts and layouts[0].format == "peft":
        folder, base = layouts[0].folder, read_object(layouts[0].folder / PEFT_CONFIG).get("base_model_name_or_path")
        hint = f"give its base first: {shlex.join(['--ckpt', str(base or 'DIR'), '--ckpt', str(folder)])}"
        raise UserError(f"{folder} is an adapter of PEFT: it goes on its base", f"{hint} (finetune: --pretrained)")
    if layouts and layouts[0].is_diff:
        raise UserError(
            f"{layouts[0].folder} is a diff checkpoint: it is added to the one before it, and there is none",
            "give its base first: the same option once more, before this one",
        )


# Shapes


def read_config(layouts: Sequence[Layout]) -> ModelConfig | None:
    """The shape the checkpoints say they have (union of their files, the last wins), or None if they say nothing."""
    check_order(layouts)
    union: dict[str, Any] = {}
    tuning, vision, implied = FULL, None, None
    for layout in layouts:
        if layout.tower is not None:
            vision = layout.tower
            continue
        if (layout.folder / VISION_FILE).is_file():
            vision = read_vision(layout.folder / VISION_FILE)
        own, shape, seeing = _own_shape(layout)
        union |= shape
        implied = seeing or implied
        # What lies over a tuned checkpoint, a diff say, does not undo its method.
        tuning = own if own != FULL else tuning
    paths = [layout.params_path for layout in without_towers(layouts) if layout.params_path is not None]
    if not paths:
        return None
    config = config_from_params(union, " and ".join(map(str, paths)))
    config = replace(config, tuning=tuning.with_num_layers(config.n_layers), vision=vision or implied)
    return config if vision or not implied or _has_vision(config, layouts) else replace(config, vision=None)


def _own_shape(layout: Layout) -> tuple[Tuning, dict[str, Any], Vision | None]:
    """A checkpoint's method, the shape in its file by params.json's names, and what LLaMA2-Accessory's may see with."""
    path, kind = layout.params_path, str(read_object(layout.folder / "meta.json", True).get("llama_type", "llama"))
    if layout.format == "peft":
        from llama_acc.core.checkpoint.peft import read_peft  # needs torch

        return read_peft(layout)[0], {}, None
    if layout.format == "huggingface" and path is not None:
        config = read_huggingface(path)[0]
        return config.tuning, config.base().to_params(), None
    arguments = {} if path is None else read_params([path])
    for other in (layout.folder / "params.json", layout.folder / "config.json"):
        values = read_object(other, optional=True) if path is not None and other != path else {}
        keys = [key for key in arguments if key in values and values[key] != arguments[key]]
        if keys and "model_type" not in values:
            what = ", ".join(f"{key} {arguments[key]!r:.40} and {values[key]!r:.40}" for key in keys)
            raise UserError(f"{path} and {other} disagree: {what}", "remove the one that is not of these weights")
    try:
        tuning, shape = tuning_of(kind, arguments)
    except UserError as error:
        raise UserError(f"{layout.folder}: {error.message}", error.hint) from None
    if kind == "llama_adapter" and str(arguments.get("trainable_mode")).startswith("mm_"):
        return tuning, shape, ClipVision()
    return tuning, shape, QFormerVision() if kind.startswith("llama_qformerv2") else None


def _has_vision(config: ModelConfig, layouts: Sequence[Layout]) -> bool:
    """Whether the checkpoints hold what vision adds, its tower or a part.

    LLaMA2-Accessory writes `trainable_mode` also where it built no encoder (with_visual=False).
    """
    from llama_acc.core.checkpoint.load import open_checkpoint  # needs torch
    from llama_acc.core.model.transformer import added_by_vision

    assert config.vision is not None
    names, parts = {name for layout in layouts for name in open_checkpoint(layout).tensors}, added_by_vision(config)
    return not parts.isdisjoint(names) or any(name.startswith(config.vision.tower_prefix) for name in names)


def says_context(layouts: Sequence[Layout]) -> bool:
    """Whether one of the checkpoints says its longest sequence, as Meta's do not."""
    return any(_own_shape(layout)[1].get("max_seq_len") for layout in without_towers(layouts))


def shape_notes(layouts: Sequence[Layout]) -> list[str]:
    """Where checkpoints laid over each other say different things that their tensors' shapes do not tell."""
    said: dict[str, tuple[Any, Path]] = {}
    notes = []
    for layout in without_towers(layouts):
        shape = {} if layout.params_path is None else _own_shape(layout)[1]
        for key in ("norm_eps", "rope_theta", "rope_scaling"):
            value, before = shape.get(key), said.get(key)
            if value is None or layout.params_path is None:
                continue
            if before is not None and before[0] != value:
                notes.append(f"{key} is {before[0]} in {before[1]}, and {value} in {layout.params_path}, which counts")
            said[key] = value, layout.params_path
    return notes
