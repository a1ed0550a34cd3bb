import pytest
import torch
from torch import nn

from llama_acc.core.train.optimizer import ClippedAdamW, decays, total_norm
from tests.core.tiny import difference, random_model
from tests.core.train.documents import adamw, moments_of, update, weights_of

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_grad_norm": 2.0}


class Parts(nn.Module):
    """Parameters of every kind a name can have."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wq = nn.Linear(6, 5)
        self.attention_norm = nn.LayerNorm(5, bias=False)
        self.prefix_gate = nn.Parameter(torch.zeros(3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def give_gradients(model: nn.Module, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


def test_decay_acts_on_all_but_biases_and_norm_weights() -> None:
    decaying = (
        "tok_embeddings.weight",
        "output.weight",
        "layers.0.attention.wq.weight",
        "prefix_gate",
        "x.lora_a.weight",
    )
    assert all(decays(name) for name in decaying)
    assert not any(decays(name) for name in ("layers.0.attention_norm.weight", "norm.weight", "layers.0.wq.bias"))
    assert decays("qformer_proj.1.weight")


def test_a_llamas_parameters_fall_into_two_groups() -> None:
    model = random_model()
    decaying, others = adamw(model, weight_decay=0.02).adamw.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.02, 0.0)
    assert {names[id(p)] for p in others["params"]} == {name for name in names.values() if "norm" in name}
    assert len(decaying["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize("size", [0.01, 10.0], ids=["unclipped", "clipped"])
def test_updates_are_those_of_adamw_after_clip_grad_norm(size: float) -> None:
    ours, theirs = Parts(), Parts()
    optimizer = ClippedAdamW(ours, **SETTINGS)
    groups = [
        {"params": [theirs.wq.weight, theirs.prefix_gate], "weight_decay": 0.1},
        {"params": [theirs.wq.bias, theirs.attention_norm.weight], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    for step in range(10):
        lr = 0.01 * (step + 1)
        give_gradients(ours, step, size)
        give_gradients(theirs, step, size)
        expected_norm = nn.utils.clip_grad_norm_(theirs.parameters(), 2.0)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        norm = update(optimizer, lr, 1.0)
        assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-6)
        assert (norm > 2.0) == (size == 10.0)
        for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert difference(actual.detach(), expected.detach()) < 1e-6


def test_gradients_are_dropped_after_a_step() -> None:
    model = Parts()
    give_gradients(model, 0, 1.0)
    update(ClippedAdamW(model, **SETTINGS), 0.1, 1.0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("first", [True, False], ids=["at the first step", "later"])
@pytest.mark.parametrize("poison", ["nan loss", "infinite loss", "nan gradient", "infinite gradient"])
def test_nothing_changes_where_the_step_is_not_finite(poison: str, first: bool) -> None:
    model = Parts()
    optimizer = ClippedAdamW(model, **SETTINGS)
    if not first:
        give_gradients(model, 0, 1.0)
        update(optimizer, 0.1, 1.0)
    weights = weights_of(model)
    moments = moments_of(optimizer)
    give_gradients(model, 1, 1.0)
    value = float("nan") if "nan" in poison else float("inf")
    assert model.wq.weight.grad is not None
    if "gradient" in poison:
        model.wq.weight.grad[0, 0] = value
    update(optimizer, 0.1, value if "loss" in poison else 1.0)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    for name, tensor in moments_of(optimizer).items():
        assert torch.equal(tensor, moments[name]) if name in moments else not tensor.any()


def test_a_step_after_one_that_was_not_taken_is_as_if_it_had_never_been() -> None:
    disturbed, quiet = Parts(), Parts()
    disturbed_adamw, quiet_adamw = ClippedAdamW(disturbed, **SETTINGS), ClippedAdamW(quiet, **SETTINGS)
    for seed in range(3):
        give_gradients(disturbed, 100 + seed, float("nan"))
        update(disturbed_adamw, 0.1, 1.0)
        for model, optimizer in ((disturbed, disturbed_adamw), (quiet, quiet_adamw)):
            give_gradients(model, seed, 1.0)
            update(optimizer, 0.1, 1.0)
    for actual, expected in zip(disturbed.parameters(), quiet.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_an_optimizer_goes_on_bitwise_from_its_saved_state() -> None:
    model = Parts()
    optimizer = ClippedAdamW(model, **SETTINGS)
    give_gradients(model, 0, 1.0)
    update(optimizer, 0.1, 1.0)
    state = moments_of(optimizer)
    assert len(state) == 3 * len(list(model.parameters()))
    copy = Parts()
    copy.load_state_dict(model.state_dict())
    restored = ClippedAdamW(copy, **SETTINGS)
    restored.load_state(lambda name, parameter: state.get(name))
    for trained, by in ((model, optimizer), (copy, restored)):
        give_gradients(trained, 1, 1.0)
        update(by, 0.05, 1.0)
    for actual, expected in zip(copy.parameters(), model.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_frozen_parameters_stay_as_they_are() -> None:
    model = Parts()
    model.wq.weight.requires_grad_(False)
    before = model.wq.weight.clone()
    optimizer = ClippedAdamW(model, **SETTINGS)
    give_gradients(model, 0, 1.0)
    model.wq.weight.grad = None
    update(optimizer, 0.1, 1.0)
    assert torch.equal(model.wq.weight, before)
    assert not any(name.endswith("wq.weight") for name in moments_of(optimizer))


def test_the_norm_is_over_all_gradients_together() -> None:
    assert total_norm([torch.tensor([3.0]), torch.tensor([[4.0], [12.0]])]).item() == 13.0
