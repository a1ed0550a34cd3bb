import math
from itertools import pairwise

import pytest

from llama_acc.core.train.optimizer import learning_rate


def rate(epoch: float, epochs: float = 4, warmup_epochs: float = 1, lr: float = 1e-3, min_lr: float = 1e-4) -> float:
    return learning_rate(epoch, epochs=epochs, warmup_epochs=warmup_epochs, lr=lr, min_lr=min_lr)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0.0, 0.0),  # the first step of a warm-up does nothing
        (0.25, 0.25e-3),
        (0.5, 0.5e-3),
        (1.0, 1e-3),
        (2.0, 1e-4 + 9e-4 * 0.75),  # cos(60 degrees) = 1/2
        (2.5, 1e-4 + 9e-4 * 0.5),
        (3.0, 1e-4 + 9e-4 * 0.25),
        (4.0, 1e-4),
    ],
)
def test_the_rate_by_hand(epoch: float, expected: float) -> None:
    assert rate(epoch) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    assert rate(0.0, warmup_epochs=0) == 1e-3
    assert rate(2.0, warmup_epochs=0) == pytest.approx(1e-4 + 9e-4 * 0.5)


def test_fractional_epochs_and_warm_ups_scale_the_same_curve() -> None:
    assert rate(0.01, epochs=3, warmup_epochs=0.04) == pytest.approx(0.25e-3)
    half_way = 0.04 + (3 - 0.04) / 2
    assert rate(half_way, epochs=3, warmup_epochs=0.04) == pytest.approx(1e-4 + 9e-4 * 0.5)


def test_the_rate_never_rises_after_the_warm_up_and_stays_at_its_last_value() -> None:
    rates = [rate(1 + i / 50) for i in range(200)]
    assert all(later <= earlier for earlier, later in pairwise(rates))
    assert rates[-1] == pytest.approx(1e-4)
    assert rate(1000.0) == pytest.approx(1e-4)
    assert math.isclose(min(rates), 1e-4)
