"""What the program does on a GPU, with a CPU's tensors: only torch's kernels that a CPU does not have are left out.

The kernels of our own run in Triton's interpreter where it is installed, else what is done without them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from llama_acc.core.device import simulating
from llama_acc.core.model import kernels, layers, nf4
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.model.tuning import METHODS
from tests.core.model.test_tuning import tuned_model
from tests.core.tiny import CPU, SMALL, difference

LENGTHS = (20, 1, 9)


@pytest.fixture(params=[False, True], ids=["torch", "triton"])
def has_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Without kernels of our own, and with them."""
    if request.param:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("what has run in the interpreter would stay there")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "has_triton", lambda: request.param)
    return request.param


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Lets the program take a GPU's ways."""

    def as_on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            with simulating("cpu"):
                return function(*args)

        return called

    norms: dict[str, Any] = {name: as_on_cpu(getattr(layers, name)) for name in ("_rms_norm", "_rms_norm_backward")}
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
def test_loss_and_gradients_are_those_of_the_cpu_s_ways(method: str, has_triton: bool) -> None:
    dropout = {"lora_dropout": 0.3} if method == "dropping" else {}
    tuning = METHODS["lora" if dropout else method](**dropout).with_num_layers(SMALL.n_layers)
    expected = loss_and_gradients(tuned_model(tuning))
    with as_on_gpu():
        actual = loss_and_gradients(tuned_model(tuning))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert difference(actual[name], value) < 1e-4, name


@pytest.mark.parametrize("shape", [(8, 64), (3, 128), (70, 4), (1, 2), (300, 352)])
def test_a_matrix_out_of_nf4_is_bitsandbytes_s(shape: tuple[int, int], has_triton: bool) -> None:
    """Bit by bit; but the interpreter cuts to bf16 what a GPU rounds."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, scales = nf4.quantize(lambda start, stop: matrix[start:stop], shape, CPU)
    for dtype, unit in ((torch.float32, 0.0), (torch.float16, 0.0), (torch.bfloat16, 2**-7)):
        expected = nf4.dequantize(packed, scales, dtype)
        with as_on_gpu():
            actual = nf4.dequantize(packed, scales, dtype)
        torch.testing.assert_close(actual, expected, rtol=unit, atol=0.0)
