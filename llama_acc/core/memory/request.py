"""Which run a prediction is for: a recipe, or a model and a method, with what is changed."""

from dataclasses import dataclass, replace
from pathlib import Path

from llama_acc.core.distributed.groups import check_world
from llama_acc.core.errors import UserError, did_you_mean
from llama_acc.core.memory.simulate import Setup
from llama_acc.core.model.config import NAMED_SIZES, ModelConfig, check_divides
from llama_acc.core.recipe import RECIPES_FOLDER, Recipe, find_recipe
from llama_acc.core.tokenizer import find_tokenizer, load_tokenizer
from llama_acc.core.train.base import find_shape

PLAIN = "alpaca"
"""The recipe that stands for what is not said: bf16, activation checkpointing, sdp."""
_LLAMA_VOCABULARY = 32000


@dataclass(frozen=True)
class Request:
    """What the user asks about; None = what the recipe says.

    Attributes:
        recipe: a shipped name or a file; None = `PLAIN`, with one micro-batch to a step.
        model: a size known by name, or a checkpoint's folder.
        tuning: a method.
        quantize: "nf4" or "none".
        batch_size: examples of a micro-batch.
        max_tokens: tokens of each.
        gpus: number of processes.
        model_parallel_size: how many of them share one copy of the model.
        overrides: `key=value` of the recipe.
        device_type: "cuda" or "cpu".
    """

    recipe: str | None = None
    model: str | None = None
    tuning: str | None = None
    quantize: str | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    gpus: int | None = None
    model_parallel_size: int | None = None
    overrides: tuple[str, ...] = ()
    device_type: str = "cuda"

    def _changes(self) -> list[str]:
        values = {
            "tuning.method": self.tuning,
            "tuning.quantize": self.quantize,
            "train.batch_size": self.batch_size,
            "data.max_tokens": self.max_tokens,
            "parallel.model_parallel_size": self.model_parallel_size,
        }
        changes = [f"{key}={value}" for key, value in values.items() if value is not None]
        if self.quantize == "nf4":
            changes.append("checkpoint.trainable_only=true")
        return [*changes, *self.overrides]


def setup_of(request: Request) -> Setup:
    """The run a request means.

    Raises:
        UserError: there is no such recipe or model, or the values do not go together.
    """
    path = find_recipe(request.recipe or PLAIN)
    recipe = Recipe.load(request.recipe or PLAIN, request._changes())
    if request.model is not None:
        _take_model(recipe, request.model)
    elif request.recipe is None:
        raise UserError(
            "which model? --model and --recipe are missing",
            f"known sizes: {', '.join(NAMED_SIZES)}; or --recipe NAME",
        )
    config = _config(recipe, None if path.parent == RECIPES_FOLDER else path.parent.absolute())
    gpus = request.gpus or recipe.parallel.model_parallel_size
    check_world(recipe.parallel.model_parallel_size, gpus)
    return of_recipe(recipe, config, gpus, request.device_type, one_micro_batch=request.recipe is None)


def of_recipe(recipe: Recipe, config: ModelConfig, gpus: int, device_type: str, one_micro_batch: bool = False) -> Setup:
    """A recipe's run on examples that are all as long as they may be."""
    longest, train = recipe.data.max_tokens, recipe.train
    if longest > config.max_seq_len:
        raise UserError(
            f"{longest} tokens are more than the model's max_seq_len ({config.max_seq_len})",
            f"lower --max-tokens, or say model.max_seq_len={longest}",
        )
    count = train.batch_size
    if train.micro_batch_tokens is not None:
        count = max(1, min(count, train.micro_batch_tokens // longest))
    data_size = gpus // recipe.parallel.model_parallel_size
    micro_batches = 1 if one_micro_batch else -(-train.global_batch_size // (count * data_size))
    return Setup(recipe, config, (longest,) * count, None, micro_batches, gpus, 0, device_type)


def _take_model(recipe: Recipe, name: str) -> None:
    recipe.model.params, recipe.model.pretrained, recipe.model.tokenizer = None, None, None
    if name in NAMED_SIZES:
        recipe.model.size = name
    elif Path(name).expanduser().is_dir():
        recipe.model.pretrained = name
    else:
        hint = did_you_mean(name, NAMED_SIZES) or f"known sizes: {', '.join(NAMED_SIZES)}; or a checkpoint's folder"
        raise UserError(f"there is no model '{name}'", hint)


def _config(recipe: Recipe, recipe_folder: Path | None) -> ModelConfig:
    layouts, config = find_shape(recipe, recipe_folder, weights_may_be_absent=True)
    if config.vocab_size < 0:
        found = [path for layout in layouts if (path := find_tokenizer(layout.folder)) is not None]
        config = replace(config, vocab_size=load_tokenizer(found[-1]).vocab_size if found else _LLAMA_VOCABULARY)
    check_divides(config, recipe.parallel.model_parallel_size)
    return config
