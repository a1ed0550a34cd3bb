from dataclasses import replace

import pytest
import torch

from llama_acc.core.model.transformer import Transformer, build_on_meta, initialize
from tests.core.tiny import SMALL

CONFIG = replace(SMALL, dim=64, n_layers=8)


def initialized(seed: int) -> Transformer:
    model = build_on_meta(CONFIG, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters()), "no storage"
    model.to_empty(device="cpu")
    initialize(model, seed)
    return model


def test_random_weights_are_a_function_of_the_seed_alone_and_all_different() -> None:
    torch.manual_seed(1)
    first = initialized(3).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second, other = initialized(3).state_dict(), initialized(4).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    matrices = [name for name in first if "norm" not in name]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert len({tuple(first[name].flatten()[:32].tolist()) for name in matrices}) == len(matrices)


def test_norms_start_at_one_and_matrices_at_their_standard_deviation() -> None:
    for name, parameter in initialized(0).named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
            continue
        into_the_residual_stream = name.endswith(("wo.weight", "w2.weight"))
        std = 0.02 / (2 * CONFIG.n_layers) ** 0.5 if into_the_residual_stream else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.1), name
        assert abs(parameter.mean().item()) < std / 5, name
