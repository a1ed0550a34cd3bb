from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.model.layers import ColumnParallelLinear, RMSNorm, Spec, ones
from llama_acc.core.model.layers import parameter as made_parameter
from llama_acc.core.model.transformer import build_on_meta
from llama_acc.core.model.tuning.lora import LoRABiasNorm
from llama_acc.core.train.optimizer import ClippedAdamW, learning_rate
from tests.core.seeing import SEEING
from tests.core.tiny import SMALL
from tests.core.train.documents import moments_of, update

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_grad_norm": 2.0}


class Parts(nn.Module):
    """A matrix, its bias, a norm's weight and a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wq = ColumnParallelLinear(6, 5, Parallel())
        self.wq.add_bias()
        self.attention_norm = RMSNorm(5, 1e-5)
        self.prefix_gate = made_parameter(3, init=ones)
        self.specs: dict[str, Spec] = {name: one.spec for name, one in self.named_parameters()}  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def give_gradients(model: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["plain", *SEEING])
def test_decay_acts_on_what_llama2_accessory_lets_decay_by_its_name(name: str) -> None:
    config = SEEING.get(name) or replace(SMALL, tuning=LoRABiasNorm(4), qk_norm=True)
    for key, spec in build_on_meta(config, torch.float32).specs.items():
        assert spec.decays == (not key.endswith((".bias", "norm.weight"))), key


@pytest.mark.parametrize("first", [True, False], ids=["at the first step", "later"])
@pytest.mark.parametrize("poison", ["nan loss", "inf loss", "nan gradient", "inf gradient"])
def test_a_step_that_is_not_finite_is_as_if_it_had_never_been(poison: str, first: bool) -> None:
    disturbed, quiet = Parts(), Parts()
    optimizers = ClippedAdamW(disturbed, disturbed.specs, **SETTINGS), ClippedAdamW(quiet, quiet.specs, **SETTINGS)

    def both(seed: int) -> None:
        for model, optimizer in zip((disturbed, quiet), optimizers, strict=True):
            give_gradients(model, seed)
            update(optimizer, 0.1, 1.0)

    if not first:
        both(0)
    moments = moments_of(optimizers[0])
    give_gradients(disturbed, 1)
    value = float(poison.split()[0])
    assert disturbed.wq.weight.grad is not None
    if "gradient" in poison:
        disturbed.wq.weight.grad[0, 0] = value
    update(optimizers[0], 0.1, value if "loss" in poison else 1.0)
    for name, tensor in moments_of(optimizers[0]).items():
        assert torch.equal(tensor, moments[name]) if name in moments else not tensor.any()
    both(2)
    for actual, expected in zip(disturbed.parameters(), quiet.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("epoch", "epochs", "warmup_epochs", "expected"),
    [
        (0.0, 4, 1, 0.0),  # the first step of a warm-up does nothing
        (0.25, 4, 1, 0.25e-3),
        (1.0, 4, 1, 1e-3),
        (2.0, 4, 1, 1e-4 + 9e-4 * 0.75),  # cos(60 degrees) = 1/2
        (2.5, 4, 1, 1e-4 + 9e-4 * 0.5),
        (3.0, 4, 1, 1e-4 + 9e-4 * 0.25),
        (4.0, 4, 1, 1e-4),
        (1000.0, 4, 1, 1e-4),
        (0.0, 4, 0, 1e-3),
        (2.0, 4, 0, 1e-4 + 9e-4 * 0.5),
        (0.01, 3, 0.04, 0.25e-3),
        (0.04 + (3 - 0.04) / 2, 3, 0.04, 1e-4 + 9e-4 * 0.5),
    ],
)
def test_the_learning_rate_by_hand(epoch: float, epochs: float, warmup_epochs: float, expected: float) -> None:
    def rate(at: float) -> float:
        return learning_rate(at, epochs=epochs, warmup_epochs=warmup_epochs, lr=1e-3, min_lr=1e-4)

    assert rate(epoch) == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert all(later <= earlier for earlier, later in pairwise(rate(warmup_epochs + i / 50) for i in range(200)))
