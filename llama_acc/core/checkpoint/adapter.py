"""Adapter checkpoints, which hold only what was trained, and the base each belongs to.

base.json in such a checkpoint: `{"fingerprint": hex, "pretrained": [name, ...], "quantized": null or {...}}`. Those of
LLaMA2-Accessory have none: they are known by what is in them.
"""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama_acc.core.checkpoint.layout import Layout, read_config
from llama_acc.core.checkpoint.lazy import LazyTensor
from llama_acc.core.checkpoint.load import Weights, open_checkpoint, read_weights
from llama_acc.core.checkpoint.quantized import EARLY_HINT, JsonFile, read_quantization
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.schema import checked
from llama_acc.core.model.transformer import describe, is_matrix, shapes_of
from llama_acc.core.model.tuning import FULL

BASE_FILE = "base.json"
_SAMPLES, _RUN = 1024, 64  # values of a tensor, and how many of them lie next to each other


@dataclass(frozen=True)
class TrainedQuantized:
    """How a base was quantized while a checkpoint was trained on it: `type` is nf4, `skip` as in quantization.json."""

    type: str
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Base(JsonFile):
    """What an adapter checkpoint says of its base."""

    fingerprint: str  # of its weights, as they were before quantizing
    pretrained: tuple[str, ...]  # the base as the user gave it; empty = random weights
    quantized: TrainedQuantized | None = None  # how it was quantized; None = it was not

    @property
    def names(self) -> str:
        """The base, as the user knows it."""
        return " and ".join(self.pretrained) or "a model of random weights"


def read_base(folder: Path) -> Base | None:
    """What a checkpoint's base.json says; None = it has none."""
    path = folder / BASE_FILE
    return checked(Base, read_object(path), str(path), EARLY_HINT) if path.is_file() else None


def is_adapter_only(layout: Layout) -> bool:
    """Whether a checkpoint holds only what was trained, to be laid over its base."""
    if layout.is_diff or layout.tower is not None or read_quantization(layout.folder) is not None:
        return False  # what is quantized is a base
    if layout.format == "peft" or (layout.folder / BASE_FILE).is_file():
        return True
    names = open_checkpoint(layout).tensors
    return bool(names) and not any(is_matrix(name) or name == "tok_embeddings.weight" for name in names)


def missing_base_error(layout: Layout, option: str | None = None) -> UserError:
    """An adapter checkpoint was given without its base; `option` gives that, None = the one the checkpoint was."""
    base, config = read_base(layout.folder), read_config([layout])
    method = "" if config is None or config.tuning == FULL else f" (method {config.tuning.method})"
    bases = (base.pretrained if base else ()) or ("DIR",)
    words = [word for folder in (*bases, str(layout.folder)) for word in ("--ckpt", folder)]
    hint = f"give its base first: {shlex.join(words)} (finetune: --pretrained)"
    if option is not None:
        hint = f"give its base: {shlex.join([option, *bases])}"
    if base is None:
        return UserError(f"{layout.folder} holds only what was trained{method}, and not on top of which base", hint)
    return UserError(f"{layout.folder} holds only what was trained on top of {base.names}{method}", hint)


def check_base(layouts: Sequence[Layout], config: ModelConfig) -> None:
    """Refuses an adapter checkpoint on another base than it was trained on, or on none."""
    if layouts and is_adapter_only(layouts[0]):
        raise missing_base_error(layouts[0])
    for place, layout in enumerate(layouts):
        base = read_base(layout.folder)
        if base is not None and base_fingerprint(layouts[:place], config) != base.fingerprint:
            given = " and ".join(str(before.folder) for before in layouts[:place])
            message = f"{layout.folder} was trained on {base.names}, and {given} holds other weights"
            raise UserError(message, "give the base it was trained on")


def check_same_base(layout: Layout, weights: Weights, base: Layout, config: ModelConfig) -> None:
    """Refuses a base that a whole tuned checkpoint was not trained on: what did not train must be the base's.

    Raises:
        UserError: naming both, or that the base is quantized, so that nothing can be compared.
    """
    names = [name for name, one in describe(config).items() if one.part == "llama" and not one.trains]
    if read_quantization(base.folder) is not None:
        raise UserError(f"{base.folder} is quantized, and {layout.folder} was not trained on that", "give its original")
    if fingerprint(read_weights([base]), names) != fingerprint(weights, names):
        raise UserError(
            f"{layout.folder} was not trained on {base.folder}: what did not train (method {config.tuning.method}) "
            "is not the same there",
            "give the base it was trained on",
        )


def fingerprint(weights: Weights, names: Sequence[str]) -> str:
    """SHA-256 over the sorted names, full shapes and 1,024 fixed sampled values, as bf16, of whole parameters.

    The samples are 16 runs of 64 values: each run is one read. A smaller tensor is taken whole.
    """
    if any(name not in weights.tensors for name in names):
        return "not whole"  # the base of no model of this shape
    digest = hashlib.sha256()
    for name in sorted(names):
        part = weights.tensors[name]
        digest.update(f"{name} {list(part.shape)}\n".encode())
        for piece in _samples(part):
            digest.update(piece.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _samples(tensor: LazyTensor) -> list[Tensor]:
    if tensor.numel() <= _SAMPLES:
        return [tensor.to(torch.float32).flatten()]
    if len(tensor.shape) > 2:  # of a vision tower, and small
        tensor = LazyTensor.of(tensor.to(torch.float32).flatten())
    if len(tensor.shape) == 1:
        starts = [place * (tensor.shape[0] - _RUN) // (_SAMPLES // _RUN) for place in range(_SAMPLES // _RUN)]
        return [tensor.rows(start, start + _RUN).to(torch.float32) for start in starts]
    rows, columns = tensor.shape
    run = min(_RUN, columns)
    # Fractions of the golden ratio spread places evenly, whatever their number.
    places = [(k * 0.6180339887498949) % 1.0 for k in range(_SAMPLES // run)]
    corners = [(int(place * rows), int((place * 7.0) % 1.0 * (columns - run))) for place in places]
    return [
        tensor.rows(row, row + 1).narrow(1, column, column + run).to(torch.float32).flatten() for row, column in corners
    ]


def base_fingerprint(layouts: Sequence[Layout], config: ModelConfig) -> str:
    """The fingerprint of the base that checkpoints laid over each other give; a quantized one keeps its old one."""
    quantization = read_quantization(layouts[0].folder) if len(layouts) == 1 else None
    if quantization is not None:
        return quantization.fingerprint
    weights = read_weights(layouts)
    # What vision adds is there from the second stage of training on.
    parts = [name for name in shapes_of(config, "vision") if name in weights.tensors]
    return fingerprint(weights, [*shapes_of(config, "llama", "tower"), *parts])
