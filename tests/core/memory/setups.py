"""Small runs to predict and to measure."""

from dataclasses import replace

from llama_acc.core.memory.simulate import Setup
from llama_acc.core.model.config import config_from_params
from llama_acc.core.recipe import Recipe

SMALL = {"dim": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 1000, "max_seq_len": 512}
NF4 = ("tuning.quantize=nf4", "checkpoint.trainable_only=true")


def setup(
    *overrides: str, lengths: tuple[int, ...] = (200, 56), device_type: str = "cpu", dim: int = 128, **options: int
) -> Setup:
    """One rank of the `alpaca` recipe, changed, of a small model."""
    recipe = Recipe.load("alpaca", overrides)
    config = config_from_params({**SMALL, "dim": dim})
    config = replace(config, tuning=recipe.tuning.resolved().with_num_layers(config.n_layers))
    return Setup(recipe, config, lengths, device_type=device_type, **options)


def deep(run: Setup, n_layers: int) -> Setup:
    """The same of a model with so many blocks."""
    tuning = run.recipe.tuning.resolved().with_num_layers(n_layers)
    return replace(run, config=replace(run.config, n_layers=n_layers, tuning=tuning))
