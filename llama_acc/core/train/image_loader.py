"""The images of micro-batches: decoded ahead of time by worker processes, encoded when their turn comes."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llama_acc.core.data.batches import MicroBatch, build_seen
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.features import FeatureCache
from llama_acc.core.data.image_workers import ImageWorkers, default_workers
from llama_acc.core.data.images import Crop, ImageJob, Transform
from llama_acc.core.distributed.groups import local_world_size
from llama_acc.core.generate.vision_encoder import VisionEncoder

_AHEAD = 4  # micro-batches whose images are being decoded while one is computed


class MicroBatchIndices(NamedTuple):
    """The items of a micro-batch, and the epoch that decides their images' random crops."""

    items: list[int]
    epoch: int


class ImageLoader:
    """Gives micro-batches what the model takes of their images."""

    def __init__(
        self,
        encoder: VisionEncoder,
        *,
        seed: int,
        max_pixels: int,
        workers: int | None,
        cache_features: bool,
        reserve: int,
    ) -> None:
        """Args:
        encoder: the model's.
        seed: of random crops, with the epoch and the image's place in the data.
        max_pixels: larger images are refused.
        workers: processes that decode; None = as many as suit this machine.
        cache_features: keep the features on disk; no transform is random then.
        reserve: bytes of the disk that are not for kept features.
        """
        self._encoder, self._seed, self._max_pixels = encoder, seed, max_pixels
        self._count, self._cache_features, self._reserve = workers, cache_features, reserve
        self._workers: ImageWorkers | None = None
        self._caches: dict[Transform, FeatureCache] = {}

    def iter_batches(self, dataset: Dataset, indices: Iterable[MicroBatchIndices], crop: Crop) -> Iterator[MicroBatch]:
        """The micro-batches of a dataset with their `inputs`; the images of some are asked for ahead of time."""
        encoder = self._encoder
        batches = ((build_seen(dataset, items, encoder.vision.positions), epoch) for items, epoch in indices)
        if dataset.image_counts.any() and encoder.is_leader:
            return self._decoded(batches, Transform(crop, encoder.vision.image_size))
        return (replace(batch, inputs=encoder.inputs(len(batch.images), _never)) for batch, _ in batches)

    def close(self) -> None:
        """Ends the processes that decode images."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _decoded(self, batches: Iterable[tuple[MicroBatch, int]], transform: Transform) -> Iterator[MicroBatch]:
        """Micro-batches, each given with its epoch, with their `inputs`."""
        if self._workers is None:
            self._workers = ImageWorkers(self._count or default_workers(local_world_size()))
        cache = self._cache(transform)
        waiting: deque[tuple[list[str], MicroBatch, list[int]]] = deque()

        def jobs() -> Iterator[list[ImageJob]]:
            for batch, epoch in batches:
                references = [image.reference for image in batch.images]
                missing = [i for i, reference in enumerate(references) if cache is None or not cache.has(reference)]
                waiting.append((references, batch, missing))
                images = [batch.images[i] for i in missing]
                yield [
                    ImageJob(at.reference, transform, (self._seed, epoch, at.document, at.nth), self._max_pixels)
                    for at in images
                ]

        for pixels in self._workers.prefetched(jobs(), _AHEAD):
            references, batch, missing = waiting.popleft()
            encode = partial(self._encode, references, missing, torch.from_numpy(pixels), cache)
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
        encoder = self._encoder
        if cache is None:
            return encoder.encode(pixels)
        # Since its pixels were asked for, an image of a micro-batch before may have been kept.
        still = [place for place, i in enumerate(missing) if not cache.has(references[i])]
        made = dict(
            zip((missing[place] for place in still), encoder.encode(pixels[still]) if still else (), strict=True)
        )
        for i, features in made.items():
            cache.store(references[i], features)
        return torch.stack(
            [
                made[i] if i in made else cache.load(reference).to(encoder.device)
                for i, reference in enumerate(references)
            ]
        )


def _never() -> Tensor:
    raise AssertionError("only leaders encode images")
