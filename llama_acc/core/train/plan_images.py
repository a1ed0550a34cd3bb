"""The images of a run's data, checked before anything is computed."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np

from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.findings import MOST_PROBLEMS, Finding, beginning
from llama_acc.core.data.image_checks import BadImage, bad_images
from llama_acc.core.data.image_workers import default_workers
from llama_acc.core.errors import DataError, UserError, listed
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.events import Events


def with_good_images(
    recipe: Recipe, config: ModelConfig, events: Events, datasets: Sequence[Dataset]
) -> Sequence[Dataset]:
    """Opens all images of the data.

    Args:
        recipe: says how, what is too large, and whether an item with a bad image stops the run or is skipped.
        config: the model's shape: how many images of an item it takes.
        events: told of the progress.
        datasets: what is trained and what is held out.

    Returns:
        The same without the items that were skipped.

    Raises:
        UserError: there are items of more images than the model takes.
        DataError: images are missing, no pictures, broken or too large: all uses of them, by item.
    """
    if config.vision is None:
        return datasets
    for dataset in datasets:
        _check_counts(config, dataset)
    settings = recipe.data.images
    workers = settings.workers or default_workers()
    bad = (bad_images(dataset, settings.max_pixels, workers, events.opening) for dataset in datasets)
    if recipe.data.on_error == "skip":
        return [_without(dataset, found) for dataset, found in zip(datasets, bad, strict=True)]
    told = (
        f"{dataset.origin(one.document)}: {one}" for dataset, found in zip(datasets, bad, strict=True) for one in found
    )
    if problems := list(islice(told, MOST_PROBLEMS)):
        first = f"these are the first {MOST_PROBLEMS:,}; " if len(problems) == MOST_PROBLEMS else ""
        mend = "mend them, or leave them out with data.on_error=skip"
        raise DataError(problems, f"{first}{mend}; data.sources.root says where relative paths begin")
    return datasets


def _without(dataset: Dataset, bad: Iterator[BadImage]) -> Dataset:
    if (first := next(bad, None)) is None:
        return dataset
    good = dataset.without((one.document, _finding(dataset, one)) for one in chain([first], bad))
    if not len(good):
        raise UserError(
            "nothing to train on: no item has images that can be used; "
            f"the first: {dataset.origin(first.document)}: {first}",
            "data.sources.root says where relative paths begin",
        )
    return good


def _finding(dataset: Dataset, bad: BadImage) -> Finding:
    return Finding("image_file", dataset.where(bad.document), "image", str(bad), beginning(bad.reference))


def _check_counts(config: ModelConfig, dataset: Dataset) -> None:
    if config.vision is None or config.vision.encoder != "clip":
        return
    if many := np.flatnonzero(dataset.image_counts > 1).tolist():
        places = [f"{dataset.origin(i)} has {dataset.image_counts[i]}" for i in many]
        raise UserError(f"encoder clip takes one image for each item:\n{listed(places)}", "use encoder qformer")
