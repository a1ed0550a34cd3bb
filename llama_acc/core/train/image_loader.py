"""The images of micro-batches: decoded ahead of time by worker processes, encoded when their turn comes.

What a frozen encoder makes of images may be kept on disk: after the first epoch it need not run again.
"""

import errno
import hashlib
import logging
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_acc.core.atomic import whole_file
from llama_acc.core.data.batches import MicroBatch, build_multimodal_batch
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.image_files import ImageWorkers, default_workers
from llama_acc.core.data.images import Crop, ImageJob, Transform, digest, pixels_or_problem, shown_reference
from llama_acc.core.device import to_device
from llama_acc.core.distributed.groups import local_world_size
from llama_acc.core.errors import RunError
from llama_acc.core.generate.load import VisionEncoder
from llama_acc.core.input_files import home
from llama_acc.core.recipe import ImagesSection
from llama_acc.core.text import size_text
from llama_acc.core.train.step import packed_ahead

_AHEAD = 4  # micro-batches whose images are being decoded while one is computed

_logger = logging.getLogger("llama_acc")


class MicroBatchIndices(NamedTuple):
    """The items of a micro-batch, and the epoch that decides their images' random crops."""

    items: list[int]
    epoch: int


class FeatureCache:
    """The features of one encoder after one transform: a file for each image, as they are in memory.

    A file's name is the SHA-256 of the image's bytes; its folder says which encoder and which transform. Nothing has
    to be invalidated, and a folder that is not needed can be deleted.
    """

    def __init__(
        self, encoder: str, transform: Transform, shape: tuple[int, ...], dtype: torch.dtype, reserve: int = 0
    ) -> None:
        """Of an encoder with this fingerprint, a transform that is not random, and features of this shape and type. So
        many bytes of the disk are left in `reserve`: the run's checkpoints may need them."""
        assert transform.crop != "random_resized_crop"
        name = hashlib.sha256(f"{encoder} {transform.crop}-{transform.size}".encode()).hexdigest()[:32]
        self.folder = home() / "features" / name
        self._shape, self._dtype, self._reserve, self._keeps = shape, dtype, reserve, True
        self._bytes = torch.Size(shape).numel() * dtype.itemsize

    def path(self, reference: str) -> Path:
        """Where the features of an image are, or would be."""
        name = digest(reference)
        return self.folder / name[:2] / name

    def has(self, reference: str) -> bool:
        """Whether an image's features are there, whole."""
        with suppress(OSError):
            return self.path(reference).stat().st_size == self._bytes
        return False

    def load(self, reference: str) -> Tensor:
        """An image's features; it must be there."""
        return torch.frombuffer(bytearray(self.path(reference).read_bytes()), dtype=self._dtype).view(self._shape)

    def store(self, reference: str, features: Tensor) -> None:
        """Keeps an image's features, whole or not at all. What goes wrong first is logged; no more are kept then."""
        if not self._keeps:
            return
        path = self.path(reference)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < self._bytes + self._reserve:
                left = f"the disk has only the {size_text(self._reserve)} left that checkpoints need"
                raise OSError(errno.ENOSPC, left)
            # Not waiting for the disk: a file that a loss of power shortened is seen by its size.
            with whole_file(path, durable=False) as file:
                file.write(features.to("cpu", self._dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        except OSError as error:
            reason = error.strerror or error
            _logger.warning("cannot keep features in %s: %s; from here on they are made each time", self.folder, reason)
            self._keeps = False


class ImageLoader:
    """Gives micro-batches what the model takes of their images."""

    def __init__(
        self, encoder: VisionEncoder, images: ImagesSection, *, seed: int, cache_features: bool, reserve: int
    ) -> None:
        """Random crops follow from `seed`, the epoch and the image's place in the data. With `cache_features`, where
        none are random, features are kept on disk, but for `reserve` bytes of it."""
        self._encoder, self._seed, self._max_pixels = encoder, seed, images.max_pixels
        self._cache_features, self._reserve = cache_features, reserve
        self._workers = ImageWorkers(images.workers or default_workers(local_world_size()))
        self._caches: dict[Transform, FeatureCache] = {}

    def iter_batches(self, dataset: Dataset, indices: Iterable[MicroBatchIndices], crop: Crop) -> Iterator[MicroBatch]:
        """The micro-batches of a dataset with their `inputs`; the images of some are decoded ahead of time."""
        encoder, epochs = self._encoder, deque[int]()

        def built() -> Iterator[MicroBatch]:
            for items, epoch in indices:
                epochs.append(epoch)
                yield build_multimodal_batch(dataset, items, encoder.vision.positions)

        batches = ((batch, epochs.popleft()) for batch in packed_ahead(built(), encoder.device))
        if dataset.image_counts.any() and encoder.is_leader:
            return self._decoded(batches, Transform(crop, encoder.vision.image_size))
        return (replace(batch, inputs=encoder.inputs(len(batch.images), _never)) for batch, _ in batches)

    def close(self) -> None:
        """Ends the processes that decode images."""
        self._workers.close()

    def _decoded(self, batches: Iterable[tuple[MicroBatch, int]], transform: Transform) -> Iterator[MicroBatch]:
        """Micro-batches, each given with its epoch, with their `inputs`."""
        cache = self._cache(transform)
        waiting: deque[tuple[MicroBatch, list[int], list[ImageJob]]] = deque()

        def jobs() -> Iterator[list[ImageJob]]:
            for batch, epoch in batches:
                missing = [i for i, at in enumerate(batch.images) if cache is None or not cache.has(at.reference)]
                of_batch = [
                    ImageJob(at.reference, transform, (self._seed, epoch, at.document, at.nth), self._max_pixels)
                    for at in (batch.images[i] for i in missing)
                ]
                waiting.append((batch, missing, of_batch))
                yield of_batch

        for results in self._workers.map_ahead(pixels_or_problem, jobs(), _AHEAD):
            batch, missing, of_batch = waiting.popleft()
            for job, result in zip(of_batch, results, strict=True):
                if isinstance(result, str):
                    message = f"the image {shown_reference(job.reference)} {result}, though it could be opened before"
                    raise RunError(f"{message}: mend it, then go on from the last checkpoint")
            pixels = torch.from_numpy(np.stack(results)) if results else torch.zeros((0, 3, 0, 0), dtype=torch.uint8)
            references = [image.reference for image in batch.images]
            encode = partial(self._encode, references, missing, pixels, cache)
            yield replace(batch, inputs=self._encoder.inputs(len(references), encode))

    def _cache(self, transform: Transform) -> FeatureCache | None:
        if self._cache_features and transform not in self._caches:
            encoder = self._encoder
            shape, dtype = encoder.vision.input_shape, encoder.dtype
            self._caches[transform] = FeatureCache(encoder.fingerprint(), transform, shape, dtype, self._reserve)
        return self._caches.get(transform)

    def _encode(
        self, references: Sequence[str], missing: Sequence[int], pixels: Tensor, cache: FeatureCache | None
    ) -> Tensor:
        """Of images that are not in the cache from their pixels, of others from there. [images, ...]"""
        if cache is None:
            return self._encoder.encode(pixels)
        # Since its pixels were asked for, an image of a micro-batch before may have been kept.
        still = [place for place, i in enumerate(missing) if not cache.has(references[i])]
        encoded = self._encoder.encode(pixels[still]) if still else ()
        made = dict(zip((missing[place] for place in still), encoded, strict=True))
        for i, features in made.items():
            cache.store(references[i], features)
        device = self._encoder.device
        found = (made[i] if i in made else to_device(cache.load(path), device) for i, path in enumerate(references))
        return torch.stack(list(found))


def _never() -> Tensor:
    raise AssertionError("only leaders encode images")
