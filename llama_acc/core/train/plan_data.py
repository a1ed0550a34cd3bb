"""The data of a run, read and checked before anything is computed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_acc.core.data.cache import EntryStore
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.load import load_dataset
from llama_acc.core.data.readers import raise_together
from llama_acc.core.data.sources import OTHERWISE, Source
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.recipe import Recipe
from llama_acc.core.tokenizer import Tokenizer
from llama_acc.core.train.events import Events
from llama_acc.core.train.plan_images import with_good_images


class PlannedData(NamedTuple):
    """What a run learns from; the fields are those of `Plan`."""

    train: Dataset
    validation: Dataset | None
    report: dict[str, Any]


def plan_data(
    recipe: Recipe,
    config: ModelConfig,
    tokenizer: Tokenizer,
    recipe_folder: Path | None,
    events: Events,
    store: EntryStore | None,
) -> PlannedData:
    """Everything a run learns from and is measured on.

    Args:
        recipe: what the user wants.
        config: the model's shape.
        tokenizer: the model's.
        recipe_folder: where the recipe file lies; relative paths are looked for there first.
        events: told of the progress.
        store: where encoded data is kept; None: in the cache.

    Raises:
        UserError: what is wrong with the data, all of it together; images after the rest.
    """
    data, seed = recipe.data, recipe.train.seed
    wanted = [([Source(**source.model_dump()) for source in data.sources], OTHERWISE)]
    if data.validation.path is not None:
        held_out = Source(data.validation.path, template=data.sources[0].template)
        wanted.append(([held_out], "give it with data.validation.path=FILE"))
    loaded, errors = [], []
    for sources, otherwise in wanted:
        try:
            loaded.append(
                load_dataset(
                    sources,
                    tokenizer,
                    data.max_tokens,
                    seed,
                    on_error=data.on_error,
                    image_positions=None if config.vision is None else config.vision.positions,
                    recipe_folder=recipe_folder,
                    progress=events.encoding,
                    store=store,
                    fetch=events.fetch,
                    otherwise=otherwise,
                )
            )
        except UserError as error:
            errors.append(error)
    raise_together(errors)
    return _divided(recipe, with_good_images(recipe, config, events, loaded))


def _divided(recipe: Recipe, loaded: Sequence[Dataset]) -> PlannedData:
    """What is trained and what is held out, and the report on both."""
    train, *held_out = loaded
    report = train.report()
    if held_out:
        return PlannedData(train, held_out[0], {**report, "validation": held_out[0].report()})
    if recipe.data.validation.fraction:
        return PlannedData(*train.split(recipe.data.validation.fraction, recipe.train.seed), report)
    return PlannedData(train, None, report)
