"""From pixels to a multimodal model's inputs: the frozen encoder, run once, its features shared by the ranks.

Under model parallelism the encoder is on the first rank of a group only; the others get the features from it.

Shapes: I images, S their width and height; input_shape is that of `Vision`.
"""

import hashlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from llama_acc.core.checkpoint.adapter import fingerprint
from llama_acc.core.checkpoint.load import Weights, fill
from llama_acc.core.data.images import normalize
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.model.config import Vision
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.model.vision import Tower, initialize_tower, tower_on_meta


class VisionEncoder:
    """Encodes images for a model.

    Attributes:
        vision: the kind.
        tower: its frozen tower, on the ranks that have it; else None.
        is_leader: whether this rank needs images' pixels: where the encoder trains, every rank does.
    """

    def __init__(
        self, vision: Vision, tower: Tower | None, dtype: torch.dtype, device: torch.device, parallel: Parallel
    ) -> None:
        self.vision, self.tower = vision, tower
        self.dtype, self.device, self.parallel = dtype, device, parallel
        self.is_leader = vision.trains_encoder or parallel.model_rank == 0

    def fingerprint(self) -> str:
        """SHA-256 of what decides the features of given pixels: the tower's weights, sampled, and the type."""
        assert self.tower is not None
        weights = Weights.of({name: parameter.detach() for name, parameter in self.tower.named_parameters()})
        values = fingerprint(weights, list(weights.tensors))
        return hashlib.sha256(f"{self.vision} {self.dtype} {values}".encode()).hexdigest()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [I, 3, S, S] of 0 to 255 to [I, *input_shape], on the device; for a rank that `is_leader`."""
        normalized = normalize(pixels.to(self.device, non_blocking=True), self.dtype)
        if self.vision.trains_encoder:
            return normalized
        assert self.tower is not None
        return self.tower(normalized)

    def inputs(self, count: int, make: Callable[[], Tensor]) -> Tensor:
        """The model's inputs for `count` images, [I, *input_shape]: `make` is called on ranks that are leaders."""
        if not count:
            return torch.empty((0, *self.vision.input_shape), dtype=self.dtype, device=self.device)
        if self.vision.trains_encoder or self.parallel.model_size == 1:
            return make()
        if self.is_leader:
            shared = make().contiguous()
        else:
            shared = torch.empty((count, *self.vision.input_shape), dtype=self.dtype, device=self.device)
        dist.broadcast(shared, self.parallel.rank - self.parallel.model_rank, group=self.parallel.model_group)
        return shared


def load_vision_encoder(
    model: Transformer, weights: Weights | None, device: torch.device, seed: int = 0, keep_all: bool = False
) -> VisionEncoder | None:
    """The encoder of a model, or None if it is not multimodal.

    Args:
        model: the model, which knows the kind, the type and the ranks that share it.
        weights: the tower's among them are used up; None, or none of it there: a tower of random weights.
        device: where it computes.
        seed: of random weights.
        keep_all: ranks that do not compute with the tower keep it, too, in the host's memory or its file: to save it.
    """
    vision, parallel = model.config.vision, model.parallel
    if vision is None:
        return None
    tower = None
    computes = parallel.model_rank == 0
    if not vision.trains_encoder and (computes or keep_all):
        tower = tower_on_meta(vision, model.dtype).requires_grad_(False)
        place = device if computes else torch.device("cpu")
        if weights is None or not any(name.startswith(vision.tower_prefix) for name in weights.tensors):
            values = {name: torch.empty(parameter.shape) for name, parameter in tower.named_parameters()}
            initialize_tower(values, seed)
            weights = Weights.of({vision.tower_prefix + name: value for name, value in values.items()})
        fill(tower, weights, place, model.dtype, copy=False, prefix=vision.tower_prefix)
        tower.to(place)
    return VisionEncoder(vision, tower, model.dtype, device, parallel)
