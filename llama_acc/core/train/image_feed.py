"""The images of micro-batches: decoded ahead of time by worker processes, encoded when their turn comes."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from llama_acc.core.data.batches import ImageAt, MicroBatch, build_seen
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.features import FeatureCache
from llama_acc.core.data.image_workers import ImageWorkers, default_workers
from llama_acc.core.data.images import Crop, ImageJob, Transform
from llama_acc.core.distributed.groups import local_world_size
from llama_acc.core.generate.vision_encoder import VisionEncoder
from llama_acc.core.recipe import Recipe

_AHEAD = 4  # micro-batches whose images are being decoded while one is computed


class Dealt(NamedTuple):
    """The documents of a micro-batch, and the epoch that decides their images' random crops."""

    items: list[int]
    epoch: int


class ImageFeeds:
    """Gives micro-batches what the model takes of their images: of training data and of held-out data.

    Held-out images are padded to a square, as those in generation are.
    """

    def __init__(self, encoder: VisionEncoder, recipe: Recipe, leave: int) -> None:
        """Args:
        encoder: the model's.
        recipe: says what becomes of pictures.
        leave: bytes of the disk that are not for kept features.
        """
        self._encoder, self._recipe, self._leave = encoder, recipe, leave
        self._workers: ImageWorkers | None = None
        self._feeds: dict[Crop, ImageFeed] = {}

    def fed(self, dataset: Dataset, dealt: Iterable[Dealt], *, is_training: bool) -> Iterator[MicroBatch]:
        """The micro-batches of `dealt` with their `inputs`; some are asked for ahead of time.

        Args:
            dataset: whose documents they are.
            dealt: what they consist of.
            is_training: whether they are trained on, or held out.
        """
        positions = self._encoder.vision.positions
        batches = ((build_seen(dataset, items, positions), epoch) for items, epoch in dealt)
        if not dataset.image_counts.any():
            return (replace(batch, inputs=self._encoder.inputs(0, _never)) for batch, _ in batches)
        return self._feed(self._recipe.data.images.transform if is_training else "pad_to_square").fed(batches)

    def close(self) -> None:
        """Ends the processes that decode images."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _feed(self, crop: Crop) -> "ImageFeed":
        if crop in self._feeds:
            return self._feeds[crop]
        encoder, settings = self._encoder, self._recipe.data.images
        transform = Transform(crop, encoder.vision.image_size)
        if self._workers is None and encoder.is_leader:
            self._workers = ImageWorkers(settings.workers or default_workers(local_world_size()))
        cache = None
        if self._recipe.vision.cache_features and encoder.is_leader:
            cache = FeatureCache(
                encoder.fingerprint(), transform, encoder.vision.input_shape, encoder.dtype, self._leave
            )
        self._feeds[crop] = ImageFeed(
            encoder,
            transform,
            seed=self._recipe.train.seed,
            max_pixels=settings.max_pixels,
            workers=self._workers,
            cache=cache,
        )
        return self._feeds[crop]


class ImageFeed:
    """Gives micro-batches what the model takes of their images, after one transform."""

    def __init__(
        self,
        encoder: VisionEncoder,
        transform: Transform,
        *,
        seed: int,
        max_pixels: int,
        workers: ImageWorkers | None,
        cache: FeatureCache | None = None,
    ) -> None:
        """Args:
        encoder: the model's.
        transform: from images to squares of pixels.
        seed: of random crops, with the epoch and the image's place in the data.
        max_pixels: larger images are refused.
        workers: decode the images; None on a rank that does not.
        cache: where features are kept, or None.
        """
        self._encoder, self._transform, self._seed, self._max_pixels = encoder, transform, seed, max_pixels
        self._workers, self._cache = workers, cache

    def fed(self, batches: Iterable[tuple[MicroBatch, int]]) -> Iterator[MicroBatch]:
        """The micro-batches, each given with its epoch, with their `inputs`; some are asked for ahead of time."""
        if self._workers is None:
            for batch, _ in batches:
                yield replace(batch, inputs=self._encoder.inputs(len(batch.images), _never))
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
        return self._encoder.inputs(len(images), lambda: self._encoded(images, missing, pixels))

    def _encoded(self, images: Sequence[ImageAt], missing: Sequence[int], pixels: Tensor) -> Tensor:
        """Of images that are not in the cache from their pixels, of others from there."""
        encoder, cache = self._encoder, self._cache
        if cache is None:
            return encoder.encode(pixels)
        # Since its pixels were asked for, an image of a micro-batch before may have been kept.
        still = [place for place, at in enumerate(missing) if not cache.has(images[at].reference)]
        made = dict(zip((missing[at] for at in still), encoder.encode(pixels[still]) if still else (), strict=True))
        for place, features in made.items():
            cache.store(images[place].reference, features)
        found = [
            made[place] if place in made else cache.load(image.reference).to(encoder.device)
            for place, image in enumerate(images)
        ]
        return torch.stack(found)


def _never() -> Tensor:
    raise AssertionError("only leaders encode images")
