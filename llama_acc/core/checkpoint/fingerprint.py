"""Which base a trainable-only checkpoint belongs to, in whatever layout, size and type that is kept."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llama_acc.core.checkpoint.layout import Layout
from llama_acc.core.checkpoint.parts import Part
from llama_acc.core.checkpoint.quantised import read_quantization
from llama_acc.core.checkpoint.shards import Weights, read_weights
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig

BASE_FILE = "base.json"
_SAMPLES, _RUN = 1024, 64  # values of a tensor, and how many of them lie next to each other


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


def _samples(part: Part) -> list[torch.Tensor]:
    if part.numel() <= _SAMPLES:
        return [part.to(torch.float32).flatten()]
    if len(part.shape) == 1:
        starts = [place * (part.shape[0] - _RUN) // (_SAMPLES // _RUN) for place in range(_SAMPLES // _RUN)]
        return [part.rows(start, start + _RUN).to(torch.float32) for start in starts]
    rows, columns = part.shape
    run = min(_RUN, columns)
    count = _SAMPLES // run
    # Fractions of the golden ratio spread places evenly, whatever their number.
    places = [(k * 0.6180339887498949) % 1.0 for k in range(count)]
    return [
        part.rows(row, row + 1).narrow(1, column, column + run).to(torch.float32).flatten()
        for row, column in ((int(p * rows), int((p * 7.0) % 1.0 * (columns - run))) for p in places)
    ]


def _base_file(folder: Path) -> dict[str, Any]:
    path = folder / BASE_FILE
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values


def base_of(folder: Path) -> list[str]:
    """The names of the base that a checkpoint's tensors belong to; none if it is whole."""
    return [str(name) for name in _base_file(folder).get("pretrained", [])]


def trained_on(folder: Path) -> dict[str, Any] | None:
    """How the base was quantised while a checkpoint was trained on it; None = it was not."""
    return _base_file(folder).get("quantised")


def base_fingerprint(layouts: Sequence[Layout], config: ModelConfig) -> str:
    """The fingerprint of the base that checkpoints laid over each other give; a quantised one keeps its old one."""
    quantization = read_quantization(layouts[0].folder) if len(layouts) == 1 else None
    if quantization is not None:
        return quantization.fingerprint
    return fingerprint(read_weights(layouts), list(config.base().parameter_shapes()))


def check_base(layouts: Sequence[Layout], config: ModelConfig) -> None:
    """Refuses a trainable-only checkpoint on another base than it was trained on, or on none.

    Raises:
        UserError: naming both.
    """
    for place, layout in enumerate(layouts):
        meant = _base_file(layout.folder)
        if not meant:
            continue
        names = " and ".join(meant["pretrained"]) or "a model of random weights"
        if place == 0:
            raise UserError(
                f"{layout.folder} holds only what was trained on top of {names}",
                "give that first: the same option once more, before this one",
            )
        if base_fingerprint(layouts[:place], config) != meant["fingerprint"]:
            given = " and ".join(str(before.folder) for before in layouts[:place])
            raise UserError(
                f"{layout.folder} was trained on {names}, and {given} holds other weights",
                "give the base it was trained on",
            )


def base_file(
    layouts: Sequence[Layout],
    config: ModelConfig,
    names: Sequence[str | Path],
    quantised: Mapping[str, object] | None = None,
) -> bytes:
    """What a trainable-only checkpoint says of its base.

    Args:
        layouts: the base.
        config: the shape.
        names: the base as the user gave it.
        quantised: how it was quantised while training on it; None = it was not.
    """
    values = {
        "fingerprint": base_fingerprint(layouts, config),
        "pretrained": [str(name) for name in names],
        "quantised": quantised,
    }
    return (json.dumps(values, indent=1) + "\n").encode()
