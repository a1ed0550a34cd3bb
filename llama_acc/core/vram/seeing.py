"""What images add to a simulated step: the frozen tower on the device, its features, and their places in the stream.

The tower runs between micro-batches, when nothing else but what lasts is in memory: that is never the fullest moment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from llama_acc.core.data.batches import MicroBatch
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.vram.tracker import MemoryTracker


@contextmanager
def tower_of(model: Transformer, tracker: MemoryTracker) -> Iterator[None]:
    """Has the tower of a model that sees in memory, on the ranks that compute with it."""
    vision = model.config.vision
    if vision is None or vision.trains_encoder or model.parallel.model_rank:
        yield
        return
    parameters = [torch.empty(shape, dtype=model.dtype) for shape in vision.tower_shapes().values()]
    tracker.label(parameters, "vision tower")
    yield


def with_images(batch: MicroBatch, model: Transformer) -> MicroBatch:
    """A micro-batch in which each document that has room for an image has one, if the model sees."""
    vision = model.config.vision
    if vision is None:
        return batch
    owners = [number for number, length in enumerate(batch.lengths) if length > vision.positions + 1]
    begins = np.cumsum([0, *batch.lengths])[owners] + 1
    places = (begins[:, None] + np.arange(vision.positions)).reshape(-1).astype(np.int64)
    inputs = torch.empty((len(owners), *vision.input_shape), dtype=model.dtype)
    return replace(batch, image_documents=tuple(owners), image_places=places, inputs=inputs)
