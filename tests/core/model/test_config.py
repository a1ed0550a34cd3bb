import json
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.errors import UserError
from llama_acc.core.model.config import NAMED_SIZES, ModelConfig, config_from_params, named_size, read_params
from llama_acc.core.model.transformer import parameter_count, quantisable, shapes_of
from tests.core.tiny import GOLDEN, random_model

PARAMS: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4}


def problems(changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        config_from_params({**PARAMS, **changes}, "params.json")
    return refused.value.message


@pytest.mark.parametrize(
    ("name", "parameters", "hidden"),
    [
        ("llama2-7b", 6_738_415_616, 11008),
        ("llama2-13b", 13_015_864_320, 13824),
        ("codellama-34b", 33_743_970_304, 22016),
        ("llama2-70b", 68_976_648_192, 28672),
    ],
)
def test_named_sizes_have_the_released_models_parameters(name: str, parameters: int, hidden: int) -> None:
    config = named_size(name)
    assert parameter_count(config) == parameters
    assert config.hidden_dim == hidden
    assert config.head_dim == 128
    assert config.vocab_size == 32000


def test_named_sizes_differ_in_context_and_rotary_base_as_released() -> None:
    assert {name: (config.max_seq_len, config.rope_theta) for name, config in NAMED_SIZES.items()} == {
        "llama2-7b": (4096, 1e4),
        "llama2-13b": (4096, 1e4),
        "llama2-70b": (4096, 1e4),
        "codellama-34b": (16384, 1e6),
    }


def test_an_unknown_size_is_refused_with_the_near_ones() -> None:
    with pytest.raises(UserError, match=r"unknown model size 'llama2-7'\ndid you mean 'llama2-7b'"):
        named_size("llama2-7")
    with pytest.raises(UserError, match=r"unknown model size 'opt'\nknown sizes: llama2-7b, llama2-13b, "):
        named_size("opt")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "multiple_of": 48},
        {"n_kv_heads": 1, "n_layers": 1, "vocab_size": 77},
    ],
)
def test_the_shapes_a_config_tells_are_those_of_the_model(changes: dict[str, Any]) -> None:
    config = config_from_params({"vocab_size": 50, **PARAMS, **changes})
    model = random_model(config)
    assert shapes_of(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_what_a_params_file_leaves_out_has_metas_defaults() -> None:
    config = config_from_params(PARAMS)
    assert config == ModelConfig(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=None,
        vocab_size=-1,
        multiple_of=256,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_seq_len=2048,
        rope_scaling=None,
    )
    assert config.kv_heads == 4
    assert config.hidden_dim == 256


@pytest.mark.parametrize(("dim", "multiplier", "multiple", "hidden"), [(64, None, 1, 170), (64, 1.3, 32, 224)])
def test_the_swiglu_width_is_metas_formula(dim: int, multiplier: float | None, multiple: int, hidden: int) -> None:
    config = ModelConfig(dim, 1, 1, ffn_dim_multiplier=multiplier, multiple_of=multiple)
    assert config.hidden_dim == hidden


def test_numbers_may_be_written_as_json_writes_them() -> None:
    config = config_from_params({**PARAMS, "dim": 64.0, "rope_theta": 1000000, "n_kv_heads": None})
    assert (config.dim, config.rope_theta, config.kv_heads) == (64, 1e6, 4)
    assert isinstance(config.dim, int)
    assert isinstance(config.rope_theta, float)


def test_keys_without_meaning_for_the_computation_are_ignored() -> None:
    assert config_from_params({**PARAMS, "max_batch_size": 32}) == config_from_params(PARAMS)


def test_params_survive_a_round_trip() -> None:
    config = config_from_params({**PARAMS, "ffn_dim_multiplier": 1.3, "rope_scaling": 0.25, "vocab_size": 10})
    assert config_from_params(json.loads(json.dumps(config.to_params()))) == config


def test_all_problems_of_a_shape_are_told_together() -> None:
    with pytest.raises(UserError) as refused:
        config_from_params({"dims": 64, "n_layers": "two", "norm_eps": "small", "multiple_of": 1.5}, "a/params.json")
    assert refused.value.message.splitlines() == [
        "the model's shape in a/params.json is not usable:",
        "  unknown key 'dims': did you mean 'dim'?",
        "  n_layers: a whole number is expected, not 'two'",
        "  norm_eps: a number is expected, not 'small'",
        "  multiple_of: a whole number is expected, not 1.5",
        "  missing key 'dim'",
        "  missing key 'n_heads'",
    ]


def test_true_is_not_a_number_of_layers() -> None:
    assert "n_layers: a whole number is expected, not True" in problems({"n_layers": True})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    assert "n_layers: a whole number is expected" in problems({"n_layers": value})
    assert "norm_eps" in problems({"norm_eps": value})


def test_impossible_shapes_are_refused_with_both_values() -> None:
    assert "dim (64) must be divisible by n_heads (5)" in problems({"n_heads": 5})
    assert "the head dimension (1 = dim / n_heads) must be even" in problems({"n_heads": 64})
    assert "n_heads (4) must be divisible by n_kv_heads (3)" in problems({"n_kv_heads": 3})
    assert "vocab_size must be positive, or -1 for the tokenizer's, not 0" in problems({"vocab_size": 0})
    many = problems({"n_layers": 0, "norm_eps": -1.0, "rope_theta": 0})
    assert "n_layers must be positive, not 0" in many
    assert "norm_eps must be positive, not -1.0" in many
    assert "rope_theta must be positive, not 0" in many


def test_several_params_files_are_united_and_the_last_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(PARAMS))
    second.write_text(json.dumps({"n_layers": 9, "rope_theta": 5.0}))
    assert read_params([first, second]) == {**PARAMS, "n_layers": 9, "rope_theta": 5.0}
    assert read_params([second, first])["n_layers"] == 2
    assert read_params([GOLDEN / "llama" / "params.json"])["n_kv_heads"] == 4


def test_unreadable_params_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    with pytest.raises(UserError, match=r"cannot read .*params\.json"):
        read_params([path])
    path.write_text("{dim: 4")
    with pytest.raises(UserError, match=r"cannot read .*params\.json"):
        read_params([path])
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match=r"params\.json: it must hold a JSON object"):
        read_params([path])


def test_a_vocabulary_of_minus_one_is_the_tokenizers() -> None:
    config = config_from_params({**PARAMS, "vocab_size": -1})
    assert config.with_vocabulary(300).vocab_size == 300
    assert config_from_params({**PARAMS, "vocab_size": 320}).with_vocabulary(300).vocab_size == 320


def test_a_tokenizer_must_fit_the_vocabulary_which_may_be_padded() -> None:
    config = config_from_params({**PARAMS, "vocab_size": 512})
    config.check_tokenizer(512, "tokenizer.model")
    config.check_tokenizer(500, "tokenizer.model")
    for pieces in (513, 256, 32000):
        with pytest.raises(UserError, match=rf"tokenizer\.model has {pieces} pieces, the model's vocabulary is 512"):
            config.check_tokenizer(pieces, "tokenizer.model")


def test_matrices_are_left_out_of_nf4_by_any_part_of_their_name() -> None:
    config = named_size("llama2-7b")
    everything = set(quantisable(config))
    assert len(everything) == 7 * 32 + 1
    assert everything - set(quantisable(config, ["output"])) == {"output.weight"}
    assert len(everything - set(quantisable(config, ["wv"]))) == 32
    # Three is not thirty.
    left_out = everything - set(quantisable(config, ["layers.3"]))
    assert len(left_out) == 7
    assert all(name.startswith("layers.3.") for name in left_out)
    left_out = everything - set(quantisable(config, ["layers.31.feed_forward.w2", "layers.0.attention"]))
    assert len(left_out) == 1 + 4


@pytest.mark.parametrize("wrong", ["wx", "layers.32", "tok_embeddings", ""])
def test_what_is_no_matrix_cannot_be_left_out_of_nf4(wrong: str) -> None:
    with pytest.raises(UserError, match=f"there is no matrix '{wrong}' to be left out of NF4"):
        quantisable(named_size("llama2-7b"), [wrong])
