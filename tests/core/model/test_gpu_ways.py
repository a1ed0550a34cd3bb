"""What the program does on a GPU, with a CPU's tensors: only the kernels that a CPU does not have are left out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from llama_acc.core.device import simulating
from llama_acc.core.model import layers
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.model.tuning import METHODS
from tests.core.model.test_tuning import tuned_model
from tests.core.tiny import SMALL, difference

LENGTHS = (20, 1, 9)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Lets the program take a GPU's ways."""

    def as_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            with simulating("cpu"):
                return function(*args)

        return called

    norms = {name: as_on_cpu(getattr(layers, name)) for name in ("_rms_norm", "_rms_norm_backward")}
    with simulating("cuda"), patch.multiple(layers, **norms):
        yield


def loss_and_gradients(model: Transformer) -> dict[str, Tensor]:
    tokens = torch.arange(sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    draws = [3] * len(LENGTHS)
    bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    loss = model(tokens, positions, LENGTHS, targets=tokens.roll(-1), draws=draws, bounds=bounds)
    loss.backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("method", ["full", "lora", "dropping", "adapter"])
def test_loss_and_gradients_are_those_of_the_cpu_s_ways(method: str) -> None:
    dropout = {"lora_dropout": 0.3} if method == "dropping" else {}
    tuning = METHODS["lora" if dropout else method](**dropout).with_num_layers(SMALL.n_layers)
    expected = loss_and_gradients(tuned_model(tuning))
    with as_on_gpu():
        actual = loss_and_gradients(tuned_model(tuning))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert difference(actual[name], value) < 1e-4, name
