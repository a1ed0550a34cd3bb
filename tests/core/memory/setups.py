"""Small runs to predict and to measure."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llama_acc.core.memory.simulate import Setup
from llama_acc.core.model.config import config_from_params
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.plan import StepSettings

SMALL = {"n_heads": 4, "n_kv_heads": 2, "vocab_size": 1000, "max_seq_len": 512}
NF4 = ("tuning.quantize=nf4", "checkpoint.trainable_only=true")


def setup(
    *overrides: str,
    lengths: tuple[int, ...] = (200, 56),
    device_type: str = "cpu",
    dim: int = 128,
    n_layers: int = 3,
    params: Mapping[str, Any] | None = None,
    **options: int,
) -> Setup:
    """One rank of the `alpaca` recipe, changed, of a small model, with `params` changed."""
    recipe = Recipe.load("alpaca", overrides)
    config = config_from_params({**SMALL, "dim": dim, "n_layers": n_layers, **(params or {})})
    config = replace(config, tuning=recipe.tuning.resolved().with_num_layers(n_layers))
    return Setup(config, StepSettings.of(recipe), lengths, device_type=device_type, **options)
