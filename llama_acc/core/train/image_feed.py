"""The images of micro-batches: decoded ahead of time by worker processes, encoded when their turn comes."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from llama_acc.core.data.batches import ImageAt, MicroBatch
from llama_acc.core.data.features import FeatureCache
from llama_acc.core.data.image_workers import ImageWorkers
from llama_acc.core.data.images import ImageJob, Transform
from llama_acc.core.eyes import Eyes

_AHEAD = 4  # micro-batches whose images are being decoded while one is computed


class Dealt(NamedTuple):
    """A micro-batch, and the epoch that decides its images' random crops."""

    batch: MicroBatch
    epoch: int


class ImageFeed:
    """Gives micro-batches what the model takes of their images."""

    def __init__(
        self,
        eyes: Eyes,
        transform: Transform,
        *,
        seed: int,
        max_pixels: int,
        workers: ImageWorkers,
        cache: FeatureCache | None = None,
    ) -> None:
        """Args:
        eyes: the model's.
        transform: from images to squares of pixels.
        seed: of random crops, with the epoch and the image's place in the data.
        max_pixels: larger images are refused.
        workers: decode the images.
        cache: where features are kept, or None.
        """
        self._eyes, self._transform, self._seed, self._max_pixels = eyes, transform, seed, max_pixels
        self._workers, self._cache = workers, cache

    def fed(self, batches: Iterable[Dealt]) -> Iterator[MicroBatch]:
        """The micro-batches with their `inputs`; so many of `batches` are asked for ahead of time."""
        if not self._eyes.is_leader:
            for batch, _ in batches:
                yield replace(batch, inputs=self._eyes.inputs(len(batch.images), _never))
            return
        waiting: deque[tuple[MicroBatch, list[int]]] = deque()

        def jobs() -> Iterator[list[ImageJob]]:
            for batch, epoch in batches:
                missing = [place for place, image in enumerate(batch.images) if not self._has(image)]
                waiting.append((batch, missing))
                yield [self._job(batch.images[place], epoch) for place in missing]

        for pixels in self._workers.prefetched(jobs(), _AHEAD):
            batch, missing = waiting.popleft()
            yield replace(batch, inputs=self._inputs(batch.images, missing, torch.from_numpy(pixels)))

    def _has(self, image: ImageAt) -> bool:
        return self._cache is not None and self._cache.has(image.reference)

    def _job(self, image: ImageAt, epoch: int) -> ImageJob:
        seed = (self._seed, epoch, image.document, image.nth)
        return ImageJob(image.reference, self._transform, seed, self._max_pixels)

    def _inputs(self, images: Sequence[ImageAt], missing: Sequence[int], pixels: Tensor) -> Tensor:
        return self._eyes.inputs(len(images), lambda: self._encoded(images, missing, pixels))

    def _encoded(self, images: Sequence[ImageAt], missing: Sequence[int], pixels: Tensor) -> Tensor:
        """Of images that are not in the cache from their pixels, of others from there."""
        eyes, cache = self._eyes, self._cache
        if cache is None:
            return eyes.encode(pixels)
        made = dict(zip(missing, eyes.encode(pixels) if missing else (), strict=True))
        for place, features in made.items():
            cache.store(images[place].reference, features)
        found = [
            made[place] if place in made else cache.load(image.reference).to(eyes.device)
            for place, image in enumerate(images)
        ]
        return torch.stack(found)


def _never() -> Tensor:
    raise AssertionError("only leaders encode images")
