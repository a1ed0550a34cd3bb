"""Calibrated rounding: the products come out right, and each step is that of the published method."""

import pytest
import torch
from torch import Tensor

from llama_acc.core.model import coordinate_descent, gptq, nf4
from tests.core.tiny import CPU


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated ones, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.linspace(2, 0.05, width)
    return torch.randn(tokens, width, generator=generator) @ mixing


def dense(packed: Tensor, scales: nf4.Scales) -> Tensor:
    return nf4.dequantise(packed, scales, torch.float32)


def nearest(matrix: Tensor) -> Tensor:
    return dense(*nf4.quantise(lambda start, stop: matrix[start:stop], matrix.shape, CPU))


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


# Blocks of 64 that lie in rows, and that go across them.
SHAPES = [(96, 128), (40, 80), (5, 10)]


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_nearer_than_those_of_the_nearest_values(shape: tuple[int, int]) -> None:
    matrix, x = torch.randn(shape, generator=torch.Generator().manual_seed(1)), inputs(600, shape[1])
    seen, unseen = x[:400], x[400:]
    small = dense(*gptq.calibrated(matrix, seen.t() @ seen))
    assert error(unseen @ small.t(), unseen @ matrix.t()) < 0.8 * error(
        unseen @ nearest(matrix).t(), unseen @ matrix.t()
    )
    assert error(small, matrix) > error(nearest(matrix), matrix)


def optimal_brain_quantisation(weight: Tensor, scales: Tensor, gram: Tensor) -> Tensor:
    """The published steps as they are written down: the inverse is updated as each column leaves it."""
    inverse = torch.linalg.inv(gram)
    left, result = weight.double().clone(), torch.zeros_like(weight)
    numbers = torch.tensor(nf4._codes(CPU)[0].tolist(), dtype=torch.float64)
    for column in torch.linalg.inv(gram).diagonal().argsort().tolist():
        scale = scales[:, column].double()
        distance = (left[:, column, None] - numbers * scale[:, None]).abs()
        value = numbers[distance.argmin(1)] * scale
        result[:, column] = value.float()
        left -= torch.outer((left[:, column] - value) / inverse[column, column], inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        left[:, column] = 0
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_before_descent_the_values_are_those_of_the_published_method(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinate_descent, "SWEEPS", 0)
    matrix, x = torch.randn(shape, generator=torch.Generator().manual_seed(1)), inputs(600, shape[1])
    gram = x.t() @ x
    packed, scales = gptq.calibrated(matrix, gram)
    of_each = nf4.magnitudes(scales).repeat_interleave(64)[: matrix.numel()].view(shape)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(shape[1])
    expected = optimal_brain_quantisation(matrix, of_each, damped.double())
    is_same = (dense(packed, scales) - expected).abs() < 1e-5
    # Where two numbers are equally near, float32 may choose the other; what follows in that row then differs.
    assert is_same.all(1).float().mean() > 0.9


def test_an_input_that_never_comes_leaves_its_column_as_near_as_any() -> None:
    matrix, x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), inputs(600, 64)
    x[:, 7] = 0
    small = dense(*gptq.calibrated(matrix, x.t() @ x))
    assert torch.isfinite(small).all()
    assert error(small[:, 7], matrix[:, 7]) < 0.25
    zero = torch.zeros(16, 64)
    assert torch.equal(dense(*gptq.calibrated(zero, x.t() @ x)), zero)
