from dataclasses import replace

import pytest
import torch

from llama_acc.core.model.transformer import Transformer, build_on_meta, initialize
from tests.core.tiny import SMALL

CONFIG = replace(SMALL, dim=64, n_layers=8)


def initialised(seed: int, layers: int = CONFIG.n_layers) -> Transformer:
    model = build_on_meta(replace(CONFIG, n_layers=layers), torch.float32)
    model.to_empty(device="cpu")
    initialize(model, seed)
    return model


def test_a_model_on_the_meta_device_has_no_storage() -> None:
    model = build_on_meta(CONFIG, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_random_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = initialised(3).state_dict()
    torch.manual_seed(2)
    torch.randn(100)
    second, other = initialised(3).state_dict(), initialised(4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


def test_initialising_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    initialised(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_parameters_share_their_values() -> None:
    model = initialised(0)
    matrices = [p.detach().flatten()[:32] for name, p in model.named_parameters() if "norm" not in name]
    assert len({tuple(values.tolist()) for values in matrices}) == len(matrices)


def test_norms_start_at_one_and_matrices_at_their_standard_deviation() -> None:
    for name, parameter in initialised(0).named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
            continue
        into_the_residual_stream = name.endswith(("wo.weight", "w2.weight"))
        std = 0.02 / (2 * CONFIG.n_layers) ** 0.5 if into_the_residual_stream else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.1), name
        assert abs(parameter.mean().item()) < std / 5, name
