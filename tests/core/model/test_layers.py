"""The layers whose backward pass is written by hand, against torch's own derivatives of their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.model import products
from llama_acc.core.model.layers import (
    RowParallelLinear,
    gated_linear,
    linear,
)
from llama_acc.core.model.products import reorder_for_rows
from tests.core.tiny import SMALL, difference, random_model

# More rows than the feed-forward layer takes at once on a CPU.
ROWS, DIM, HIDDEN = 1200, 24, 40


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _leaf(values: Tensor, dtype: torch.dtype, trains: bool = True) -> Tensor:
    return values.to(dtype, copy=True).requires_grad_(trains)


def _gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor | None]:
    """Of a fixed weighted sum of the outputs."""
    loss = sum((y * _random(*y.shape, seed=90 + i).to(y.dtype)).sum() for i, y in enumerate(outputs))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad]))


def _w2(weight: Tensor) -> RowParallelLinear:
    layer = RowParallelLinear(HIDDEN, DIM, Parallel())
    layer.weight = torch.nn.Parameter(weight.detach(), weight.requires_grad)
    return layer


@pytest.mark.parametrize("weight_trains", [True, False])
def test_gated_linear_and_its_gradients(weight_trains: bool) -> None:
    values = [_random(ROWS, HIDDEN, seed=4), _random(ROWS, HIDDEN, seed=5), _random(DIM, HIDDEN, seed=6)]
    gate, up, weight = (_leaf(v, torch.float32, i < 2 or weight_trains) for i, v in enumerate(values))
    w2 = _w2(weight)
    y = gated_linear(gate, up, w2)
    mine = _gradients((y,), [gate, up, w2.weight])

    wide = [_leaf(v, torch.float64, i < 2 or weight_trains) for i, v in enumerate(values)]
    expected_y = (F.silu(wide[0]) * wide[1]) @ wide[2].t()
    expected = _gradients((expected_y,), wide)

    for got, wanted in zip((y, *mine), (expected_y, *expected), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1000, 512), (40, 24)], ids=str)
def test_one_row_times_a_matrix_of_any_size_is_the_product(
    shape: tuple[int, int], dtype: torch.dtype, off: float
) -> None:
    weight, x = _random(*shape, seed=7).to(dtype), _random(1, shape[1], seed=8).to(dtype)
    with torch.no_grad():
        assert difference(linear(x, weight), x.double() @ weight.double().t()) < off


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_rows_times_a_matrix_are_the_product_also_where_it_is_reordered(dtype: torch.dtype, off: float) -> None:
    weight = _random(120, 72, seed=7).to(dtype)
    for _ in range(2):
        for rows in (2, 3, 16, 50):
            x = _random(rows, 72, seed=8).to(dtype)
            with torch.no_grad():
                assert difference(linear(x, weight), x.double() @ weight.double().t()) < off
        reorder_for_rows([weight])


def test_large_products_which_onednn_computes_train_a_model_as_torchs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(40) % SMALL.vocab_size

    def loss_and_gradients() -> list[Tensor]:
        model = random_model(SMALL).requires_grad_()
        loss = model(tokens, torch.arange(20).repeat(2), [20, 20], targets=tokens.roll(-1))
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = loss_and_gradients()
    calls = []
    onednn = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: calls.append(args) or onednn(*args))
    monkeypatch.setattr(products, "_ONEDNN_FROM", 0)
    actual = loss_and_gradients()
    # Seven products of a block and the output's, forward and backward.
    assert len(calls) == 2 * (7 * SMALL.n_layers + 1)
    assert all(difference(one, other) < 1e-5 for one, other in zip(actual, expected, strict=True))
