import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_acc.core.model.loss import CHUNK_ROWS, linear_cross_entropy
from tests.core.tiny import difference


def problem(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 24, generator=generator).to(dtype)
    weight = 0.5 * torch.randn(77, 24, generator=generator)
    targets = torch.randint(77, (rows,), generator=generator)
    return hidden, weight, targets


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, scale)
    (3.5 * loss).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """In double precision, by the definition."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = scale * F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (3.5 * loss).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("scale", [1.0, 1 / 37])
@pytest.mark.parametrize("rows", [1, 40, CHUNK_ROWS, 2 * CHUNK_ROWS + 9])
def test_loss_and_both_gradients_are_those_of_the_definition(rows: int, scale: float) -> None:
    hidden, weight, targets = problem(rows)
    targets[targets == targets.max()] = 0  # a target like any other
    actual, expected = ours(hidden, weight, targets, scale), reference(hidden, weight, targets, scale)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert difference(one, other) < 2e-6
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, scale), actual[0])


def test_every_label_counts_by_its_weight() -> None:
    hidden, weight, targets = problem(CHUNK_ROWS + 40)
    weights = torch.rand(len(targets), generator=torch.Generator().manual_seed(0))
    theirs, mine = [(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())
                     for dtype in (torch.float64, torch.float32)]  # fmt: skip
    losses = F.cross_entropy(theirs[0] @ theirs[1].T, targets, reduction="none")
    expected, actual = 0.1 * (losses * weights).sum(), linear_cross_entropy(*mine, targets, 0.1, label_weights=weights)
    for loss in (expected, actual):
        loss.backward()
    assert difference(actual.detach(), expected.detach()) < 2e-6
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert difference(one.grad, other.grad) < 2e-6


def test_no_label_at_all_is_a_loss_of_zero_with_zero_gradients() -> None:
    hidden, weight, targets = problem(16)
    loss, d_hidden, d_weight = ours(hidden[:0], weight, targets[:0], 1.0)
    assert (loss.item(), loss.dtype) == (0.0, torch.float32)
    assert d_hidden.shape == (0, 24)
    assert d_weight.count_nonzero() == 0


def test_bf16_hidden_states_give_a_float32_loss_near_the_exact_one() -> None:
    hidden, weight, targets = problem(2 * CHUNK_ROWS, dtype=torch.bfloat16)
    loss, d_hidden, d_weight = ours(hidden, weight, targets, 1 / 100)
    exact, exact_d_hidden, exact_d_weight = reference(hidden, weight, targets, 1 / 100)
    assert (loss.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert difference(loss, exact) < 1e-3
    assert difference(d_hidden, exact_d_hidden) < 2e-2
    assert difference(d_weight, exact_d_weight) < 2e-2
