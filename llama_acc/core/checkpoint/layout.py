"""What is in this folder? Finds a checkpoint's format, shards and tokenizer from file names alone. Imports no torch."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llama_acc.core.checkpoint.huggingface import read_huggingface
from llama_acc.core.checkpoint.towers import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, open_clip_tower, tower_of
from llama_acc.core.downloads import how_to_get, named_model
from llama_acc.core.errors import UserError, listed
from llama_acc.core.home import home
from llama_acc.core.model.config import ModelConfig, config_from_params, read_params
from llama_acc.core.model.tuning import FULL, tuning_of
from llama_acc.core.model.vision_config import VISION_FILE, ClipVision, QFormerVision, Vision, read_vision

Format = Literal["meta_ori", "consolidated", "consolidated_diff", "huggingface"]
_FORMATS: dict[Format, str] = {
    "meta_ori": r"consolidated\.(?P<part>\d+)\.pth",
    "consolidated": r"consolidated\.(?P<part>\d+)-of-(?P<parts>\d+)\.model\.pth",
    "consolidated_diff": r"consolidated\.(?P<part>\d+)-of-(?P<parts>\d+)\.model-diff\.pth",
    "huggingface": r"model(-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.safetensors",
}
_NAMES: dict[Format, str] = {
    "meta_ori": "consolidated.{part:02d}.pth",
    "consolidated": "consolidated.{part:02d}-of-{parts:02d}.model.pth",
    "consolidated_diff": "consolidated.{part:02d}-of-{parts:02d}.model-diff.pth",
    "huggingface": "model-{part:05d}-of-{parts:05d}.safetensors",
}


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
    """

    folder: Path
    format: Format
    shards: tuple[Path, ...]
    params_path: Path | None
    tower: Vision | None = None

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
    name = pointer.read_text(encoding="utf-8").strip()
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
        for name, pattern in _FORMATS.items():
            if match := re.fullmatch(pattern, path.name):
                groups = {"part": None, "parts": None, **match.groupdict()}
                found.setdefault(name, {})[int(groups["parts"] or 0), int(groups["part"] or 0)] = path
    if not found and (folder / OPEN_CLIP_WEIGHTS).is_file() and (folder / OPEN_CLIP_CONFIG).is_file():
        config = folder / OPEN_CLIP_CONFIG
        return Layout(folder, "huggingface", (folder / OPEN_CLIP_WEIGHTS,), config, open_clip_tower(config))
    if not found:
        raise UserError(f"{folder} holds no LLaMA checkpoint", _what_is_there(folder))
    if len(found) > 1:
        files = [f"{name}: {', '.join(path.name for path in parts.values())}" for name, parts in found.items()]
        raise UserError(f"{folder} mixes checkpoint formats:\n{listed(files)}", "keep one format per folder")
    ((kind, files_found),) = found.items()
    shards = _shards(folder, kind, files_found)
    params = [folder / file for file in ("params.json", "config.json") if (folder / file).is_file()]
    if kind == "huggingface" and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds {shards[0].name} but no config.json, which says how to read it",
            "copy config.json from where the weights came from",
        )
    # Hugging Face's is always config.json, whatever else lies there.
    if kind == "huggingface":
        return Layout(folder, kind, shards, params[-1], tower_of(params[-1]))
    return Layout(folder, kind, shards, params[0] if params else None)


def _shards(folder: Path, kind: Format, found: dict[tuple[int, int], Path]) -> tuple[Path, ...]:
    """The files in order; `found` by (number of files, or 0 where the name does not say; which of them)."""
    sizes = sorted({size for size, _ in found})
    if len(sizes) > 1 and kind == "huggingface":
        raise UserError(
            f"{folder} holds model files of two savings: {', '.join(path.name for path in found.values())}",
            "keep those that belong together",
        )
    if len(sizes) > 1:
        raise UserError(f"{folder} mixes shards of model-parallel sizes {', '.join(map(str, sizes))}")
    # Hugging Face counts from 1, except for a single file, which has no number.
    first = 1 if kind == "huggingface" and sizes[0] else 0
    size = sizes[0] or max(part for _, part in found) + 1
    wanted = range(first, first + size)
    missing = [part for part in wanted if (sizes[0], part) not in found]
    if missing:
        names = ", ".join(_NAMES[kind].format(part=part, parts=size) for part in missing)
        raise UserError(f"shards are missing in {folder}: {names}", "download or copy the checkpoint again")
    return tuple(found[sizes[0], part] for part in wanted)


def _what_is_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in names):
        return (
            "it has Hugging Face's weights as pytorch_model.bin; save them as safetensors: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
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
        kind = str(_read_json(layout.folder / "meta.json").get("llama_type", "llama"))
        vision = _vision(layout) or vision
        if layout.tower is not None:
            continue
        paths += [] if layout.params_path is None else [layout.params_path]
        if layout.format == "huggingface" and layout.params_path is not None:
            read = read_huggingface(layout.params_path)[0]
            union |= read.base().to_params()
            tuning = read.tuning if read.tuning != FULL else tuning
            continue
        arguments = {} if layout.params_path is None else read_params([layout.params_path])
        implied = _implied_vision(kind, arguments) or implied
        try:
            own, shape = tuning_of(kind, arguments)
        except UserError as error:
            raise UserError(f"{layout.folder}: {error.message}", error.hint) from None
        union |= shape
        # What lies over a tuned checkpoint, a diff say, does not undo its method.
        tuning = own if own != FULL else tuning
    if not paths:
        return None
    config = config_from_params(union, " and ".join(map(str, paths)))
    return replace(config, tuning=tuning.at_depth(config.n_layers), vision=vision or implied)


def _implied_vision(kind: str, arguments: Mapping[str, Any]) -> Vision | None:
    """What LLaMA2-Accessory's checkpoints see with, which say no more than their kind."""
    if kind == "llama_adapter" and str(arguments.get("trainable_mode")).startswith("mm_"):
        return ClipVision()
    return QFormerVision() if kind.startswith("llama_qformerv2") else None


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
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return values if isinstance(values, dict) else {}
