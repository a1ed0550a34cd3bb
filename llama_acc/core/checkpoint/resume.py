"""Reading what a resume needs, from a checkpoint saved by any number of ranks."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llama_acc.core.atomic import check_manifest
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.load import Weights, join_shards, open_safetensors, read_weights, share_of
from llama_acc.core.distributed.groups import Parallel, local_part
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object

FORMAT_VERSION = 2
_PROGRESS = {"format_version": int, "step": int, "data": str}
_MASTER = "master."


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Where a checkpoint stands: epoch, steps, what the run was. Its state is checked against the manifest."""
    path = checkpoint / "state" / "progress.json"
    if not path.is_file():
        raise UserError(
            f"{checkpoint} holds no training state to resume from",
            f"start a new run from it: --pretrained {checkpoint}",
        )
    check_manifest(checkpoint, contents="state/")
    progress = read_object(path)
    if all(type(progress.get(key)) is kind for key, kind in _PROGRESS.items()):
        return progress
    raise UserError(f"{path} is damaged: it should say {', '.join(_PROGRESS)}", "use another checkpoint of the run")


class SavedState:
    """A checkpoint's state/, memory-mapped; each rank takes its part of it."""

    def __init__(self, checkpoint: Path, parallel: Parallel) -> None:
        self.folder, self.parallel = checkpoint / "state", parallel
        self._shards = [open_safetensors(path) for path in sorted(self.folder.glob("training*.safetensors"))]

    def read(self, name: str, parameter: Tensor) -> Tensor | None:
        """A tensor kept for a parameter, such as `exp_avg.layers.0.attention.wq.weight`: a number, or the rows of it
        that are stored here, on the parameter's device."""
        value, local = self._shards[0].get(name), local_part(parameter)
        if value is None:
            return None
        if not value.shape:
            return value.source.to(local.tensor.device, copy=True)
        whole = join_shards(name, self._shards)
        own = share_of(name, whole, self.parallel.model_rank, self.parallel.model_size)
        return own.rows(local.rows.start, local.rows.stop).to(value.dtype, local.tensor.device)

    def masters(self) -> Weights:
        """This rank's share of the float32 parameters; none if the saved weights are as exact."""
        masters = Weights()
        for name in self._shards[0]:
            if name.startswith(_MASTER):
                parameter, whole = name.removeprefix(_MASTER), join_shards(name, self._shards)
                masters.shapes[parameter] = whole.shape
                masters.tensors[parameter] = share_of(name, whole, self.parallel.model_rank, self.parallel.model_size)
        return masters

    def rng(self) -> dict[str, Tensor]:
        """The random number generators of this rank when it saved; none if there were other ranks then."""
        name = f"rng-{self.parallel.rank:05d}-of-{self.parallel.world_size:05d}.safetensors"
        return load_file(self.folder / name) if (self.folder / name).exists() else {}


def saved_masters(checkpoint: Path, parallel: Parallel) -> Weights:
    """A rank's share of the weights a checkpoint was trained to, in float32: the masters, or the saved weights.

    Raises:
        UserError: the weights were changed since.
    """
    masters = SavedState(checkpoint, parallel).masters()
    if masters.tensors:
        return masters
    if parallel.is_main:
        check_manifest(checkpoint, contents="consolidated.")
    return read_weights([inspect(checkpoint)], parallel.model_rank, parallel.model_size)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """This process's random number generators."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """Takes over what `rng_state` gave, as far as it is there."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
