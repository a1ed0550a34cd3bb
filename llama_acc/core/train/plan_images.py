"""The images of a run's data, checked before anything is computed."""

import numpy as np

from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.image_checks import bad_images
from llama_acc.core.data.image_workers import default_workers
from llama_acc.core.errors import DataError, UserError, listed
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.events import Events


def check_images(recipe: Recipe, config: ModelConfig, events: Events, *datasets: Dataset | None) -> None:
    """Opens all images of the data.

    Args:
        recipe: says how, and what is too large.
        config: the model's shape: how many images of an item it takes.
        events: told of the progress.
        datasets: what is trained and what is held out.

    Raises:
        UserError: there are items of more images than the model takes.
        DataError: images are missing, no pictures, broken or too large: all uses of them, by item.
    """
    if config.vision is None:
        return
    present = [dataset for dataset in datasets if dataset is not None]
    for dataset in present:
        _check_counts(config, dataset)
    settings = recipe.data.images
    workers = settings.workers or default_workers()
    problems = [
        f"{dataset.origin(bad.document)}: {bad}"
        for dataset in present
        for bad in bad_images(dataset, settings.max_pixels, workers, events.opening)
    ]
    if problems:
        raise DataError(problems, "mend or remove them; data.sources.root says where relative paths begin")


def _check_counts(config: ModelConfig, dataset: Dataset) -> None:
    if config.vision is None or config.vision.encoder != "clip":
        return
    if many := np.flatnonzero(dataset.image_counts > 1).tolist():
        places = [f"{dataset.origin(i)} has {dataset.image_counts[i]}" for i in many]
        raise UserError(f"encoder clip takes one image for each item:\n{listed(places)}", "use encoder qformer")
