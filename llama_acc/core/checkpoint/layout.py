"""What is in this folder? Finds a checkpoint's format, shards and tokenizer from file names alone. Imports no torch."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_acc.core.errors import UserError, listed
from llama_acc.core.home import home
from llama_acc.core.model.config import ModelConfig, config_from_params, read_params

_FORMATS: dict[str, str] = {
    "meta_ori": r"consolidated\.(?P<part>\d+)\.pth",
    "consolidated": r"consolidated\.(?P<part>\d+)-of-(?P<parts>\d+)\.model\.pth",
    "consolidated_diff": r"consolidated\.(?P<part>\d+)-of-(?P<parts>\d+)\.model-diff\.pth",
}


@dataclass(frozen=True)
class Layout:
    """A checkpoint folder.

    Attributes:
        folder: where it is.
        format: `meta_ori` (Meta's release) or `consolidated` (saved by this toolkit or LLaMA2-Accessory).
        shards: the files with weights, in model-parallel order.
        params_path: params.json or config.json, if there is one.
    """

    folder: Path
    format: Literal["meta_ori", "consolidated"]
    shards: tuple[Path, ...]
    params_path: Path | None


def locate(name: str) -> Path:
    """The checkpoint folder the user means: a folder, a run's folder (its latest checkpoint) or a downloaded name.

    Raises:
        UserError: nothing is there.
    """
    folder = Path(name).expanduser()
    if not folder.exists() and (home() / "models" / name).is_dir():
        folder = home() / "models" / name
    if not folder.exists():
        raise UserError(
            f"there is no checkpoint folder {name}, and no downloaded model of that name in {home() / 'models'}",
            "give the folder that holds consolidated.00.pth or consolidated.00-of-01.model.pth",
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
    found: dict[str, dict[int, Path]] = {}
    counts: dict[str, set[int]] = {}
    for path in sorted(folder.iterdir()):
        for name, pattern in _FORMATS.items():
            if match := re.fullmatch(pattern, path.name):
                found.setdefault(name, {})[int(match["part"])] = path
                if "parts" in match.re.groupindex:
                    counts.setdefault(name, set()).add(int(match["parts"]))
    if not found:
        raise UserError(f"{folder} holds no LLaMA checkpoint", _what_is_there(folder))
    if len(found) > 1:
        files = [f"{name}: {', '.join(path.name for path in parts.values())}" for name, parts in found.items()]
        raise UserError(f"{folder} mixes checkpoint formats:\n{listed(files)}", "keep one format per folder")
    ((name, parts),) = found.items()
    if name == "consolidated_diff":
        raise UserError(f"{folder} is a diff checkpoint, to be added to another one: this version cannot read it")
    sizes = counts.get(name) or {max(parts) + 1}
    if len(sizes) > 1:
        raise UserError(f"{folder} mixes shards of model-parallel sizes {', '.join(map(str, sorted(sizes)))}")
    (size,) = sizes
    missing = sorted(set(range(size)) - set(parts))
    if missing:
        names = ", ".join(_shard_name(name, part, size) for part in missing)
        raise UserError(f"shards are missing in {folder}: {names}", "download or copy the checkpoint again")
    params = [folder / file for file in ("params.json", "config.json") if (folder / file).is_file()]
    assert name in ("meta_ori", "consolidated")
    shards = tuple(parts[part] for part in range(size))
    return Layout(folder, name, shards, params[0] if params else None)  # type: ignore[arg-type]


def _shard_name(name: str, part: int, size: int) -> str:
    return f"consolidated.{part:02d}.pth" if name == "meta_ori" else f"consolidated.{part:02d}-of-{size:02d}.model.pth"


def _what_is_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith((".safetensors", ".bin")) for name in names):
        return "it looks like a Hugging Face folder, which this version cannot read: give Meta's .pth files"
    inside = [name for name in names if (folder / name).is_dir() and any((folder / name).glob("consolidated.*"))]
    if inside:
        return f"did you mean {' or '.join(str(folder / name) for name in inside[:3])}?"
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    return f"it holds {shown}" if names else "it is empty"


def read_config(layouts: Sequence[Layout]) -> ModelConfig | None:
    """The shape the checkpoints say they have (union of their files, the last wins), or None if they say nothing.

    Raises:
        UserError: unusable values, or a tuning method other than full.
    """
    paths = [layout.params_path for layout in layouts if layout.params_path is not None]
    for layout in layouts:
        kind = _read_json(layout.folder / "meta.json").get("llama_type", "llama")
        if kind != "llama":
            raise UserError(f"{layout.folder} is a checkpoint of kind '{kind}': this version reads 'llama' only")
    return config_from_params(read_params(paths), " and ".join(map(str, paths))) if paths else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return values if isinstance(values, dict) else {}
