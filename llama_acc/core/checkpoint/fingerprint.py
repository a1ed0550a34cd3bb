"""Which weights these are, in whatever layout, size and type they are kept."""

import hashlib
from collections.abc import Sequence

import torch

from llama_acc.core.checkpoint.layout import Layout
from llama_acc.core.checkpoint.parts import Part
from llama_acc.core.checkpoint.quantised import read_quantization
from llama_acc.core.checkpoint.shards import Weights, read_weights
from llama_acc.core.model.config import ModelConfig

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
    if len(part.shape) > 2:  # of a vision tower, and small
        part = Part.of(part.to(torch.float32).flatten())
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


def base_fingerprint(layouts: Sequence[Layout], config: ModelConfig) -> str:
    """The fingerprint of the base that checkpoints laid over each other give; a quantised one keeps its old one."""
    quantization = read_quantization(layouts[0].folder) if len(layouts) == 1 else None
    if quantization is not None:
        return quantization.fingerprint
    weights = read_weights(layouts)
    # What vision adds is there from the second stage of training on.
    parts = [name for name in config.vision_parts if name in weights.tensors]
    return fingerprint(weights, [*config.base_shapes(), *parts])
