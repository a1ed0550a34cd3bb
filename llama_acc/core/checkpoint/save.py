"""Writing a checkpoint: the weights LLaMA2-Accessory and this toolkit read, and beside them what a resume needs.

state/ holds `training.safetensors` (float32 masters where the saved weights are rounded, AdamW's moments, the random
number generator) and `progress.json`. safetensors files are written here tensor by tensor: the format is 8 bytes of
header length, a JSON header and raw bytes (https://github.com/huggingface/safetensors), and the library's own writer
first copies everything.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_acc.core.checkpoint.files import check_manifest, whole_folder, write_text_whole
from llama_acc.core.errors import UserError
from llama_acc.core.model.transformer import Transformer

MODEL_FILE = "consolidated.00-of-01.model.pth"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int64: "I64"}
_ALIGNMENT = 64


def write_weights(model: Transformer, folder: Path, dtype: torch.dtype) -> None:
    """Writes the weights with LLaMA2-Accessory's keys (`llma.` + Meta's), moved and rounded tensor by tensor."""
    tensors = {
        f"llma.{name}": parameter.detach().to(device="cpu", dtype=dtype) for name, parameter in model.named_parameters()
    }
    torch.save({"model": tensors}, folder / MODEL_FILE)
    (folder / "config.json").write_text(json.dumps(model.config.to_params(), indent=1) + "\n", encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps({"llama_type": "llama"}) + "\n", encoding="utf-8")


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors one after the other, copying one at a time from its device."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            file.write(raw.numpy().data)


def write_state(folder: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """Writes what a resume needs into `folder`/state."""
    state = folder / "state"
    state.mkdir()
    write_safetensors(tensors, state / "training.safetensors")
    (state / "progress.json").write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Where a checkpoint stands: epoch, steps, what the run was. Its state is checked against the manifest.

    Raises:
        UserError: no state, or a damaged one.
    """
    path = checkpoint / "state" / "progress.json"
    if not path.is_file():
        raise UserError(f"{checkpoint} holds no training state to resume from", "start anew with --pretrained")
    check_manifest(checkpoint)
    check_manifest(checkpoint, contents=True, under="state/")
    progress: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return progress


def read_state(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's state, memory-mapped by safetensors."""
    from safetensors.torch import load_file

    return load_file(checkpoint / "state" / "training.safetensors")


def publish(folder: Path, write: Callable[[Path], None], keep: int) -> None:
    """Writes a checkpoint folder through `write(temporary folder)`, points `latest` at it and removes old ones.

    Args:
        folder: the checkpoint's name in the run's folder.
        write: called with the folder to fill.
        keep: how many checkpoints stay, the newest; 0 = all.
    """
    run = folder.parent
    with whole_folder(folder) as aside:
        write(aside)
    write_text_whole(run / "latest", folder.name + "\n")
    # One with more steps can be there: a kill between the two lines above leaves it, and the run went on from before.
    others = [path for path in checkpoints(run) if path != folder]
    for old in others[: max(0, len(others) + 1 - keep)] if keep else []:
        remove_checkpoint(old)


def checkpoints(run: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    found = []
    for path in run.glob("epoch*/state/progress.json"):
        progress = json.loads(path.read_text(encoding="utf-8"))
        found.append((progress["step"], path.parent.parent))
    return [path for _, path in sorted(found)]


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; it first loses its name, so that a kill leaves no half of it under that name."""
    aside = folder.with_name(f".writing-{folder.name}-old")
    os.rename(folder, aside)
    shutil.rmtree(aside)


def free_bytes(folder: Path) -> int:
    """Free space on the disk a folder is, or will be, on."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def needed_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Size of one checkpoint: weights, AdamW's two moments, and masters where the weights are rounded."""
    return parameters * (dtype.itemsize + 8 + (4 if dtype != torch.float32 else 0)) + (1 << 20)
