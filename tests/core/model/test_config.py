"""params.json, the sizes known by name, and what can be split."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.checkpoint.huggingface import huggingface_config, read_huggingface
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import (
    ModelConfig,
    RopeScaling,
    check_divides,
    config_from_params,
    named_size,
    named_sizes,
    read_params,
    size_name,
)
from llama_acc.core.model.transformer import parameter_count, quantizable

PARAMS: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4}


# As their pages count them.
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "codellama-34b": 33_743_970_304,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
}


def test_named_sizes_are_the_released_models(tmp_path: Path) -> None:
    assert {name: parameter_count(config) for name, config in named_sizes().items()} == PARAMETERS
    for name, config in named_sizes().items():
        check_divides(config, 1)
        assert config_from_params(config.to_params()) == config
        of_that_shape = size_name(replace(config, max_seq_len=77))
        assert of_that_shape == (name if name != "llama3.3-70b" else "llama3.1-70b")
        (tmp_path / "config.json").write_text(json.dumps(huggingface_config(config, "bfloat16", {})))
        back = read_huggingface(tmp_path / "config.json")[0]
        assert (size_name(back), back.max_seq_len) == (of_that_shape, config.max_seq_len)


@pytest.mark.parametrize(
    ("name", "hidden", "context", "theta", "factor"),
    [
        ("llama2-7b", 11008, 4096, 1e4, None),
        ("llama2-70b", 28672, 4096, 1e4, None),
        ("codellama-34b", 22016, 16384, 1e6, None),
        ("llama3-8b", 14336, 8192, 5e5, None),
        ("llama3.1-8b", 14336, 131072, 5e5, 8),
        ("llama3.2-1b", 8192, 131072, 5e5, 32),
        ("mistral-7b", 14336, 32768, 1e6, None),
        ("qwen2.5-7b", 18944, 131072, 1e6, None),
        ("qwen3-8b", 12288, 40960, 1e6, None),
        ("smollm2-1.7b", 8192, 8192, 1.3e5, None),
        ("smollm3-3b", 11008, 65536, 5e6, None),
    ],
)
def test_named_sizes_rotate_as_the_released_models(
    name: str, hidden: int, context: int, theta: float, factor: float | None
) -> None:
    config = named_size(name)
    scaling = config.rope_scaling
    assert (scaling.factor if isinstance(scaling, RopeScaling) else scaling) == factor
    assert (config.hidden_dim, config.max_seq_len, config.rope_theta) == (hidden, context, theta)
    if name.startswith(("llama", "codellama")):
        said = {key: value for key, value in config.to_params().items() if key != "max_seq_len"}
        assert config_from_params(said) == config, "its context is known by its shape"


def test_an_unknown_size_is_refused_with_the_near_ones() -> None:
    with pytest.raises(UserError, match=r"unknown model size 'llama2-7'\ndid you mean 'llama2-7b'"):
        named_size("llama2-7")
    with pytest.raises(UserError, match=r"unknown model size 'opt'\nknown sizes: llama2-7b, llama2-13b, "):
        named_size("opt")


def test_params_are_read_as_metas_code_does_and_survive_a_round_trip() -> None:
    plain = config_from_params(PARAMS)
    assert plain == ModelConfig(64, 2, 4, None, -1, 256, None, 1e-5, 10000.0, 2048, None)
    assert (plain.kv_heads, plain.hidden_dim) == (4, 256)
    assert replace(plain, multiple_of=1).hidden_dim == 170
    assert replace(plain, multiple_of=32, ffn_dim_multiplier=1.3).hidden_dim == 224
    as_json = {"dim": 64.0, "rope_theta": 1000000, "n_kv_heads": None, "max_batch_size": 32, "use_scaled_rope": False}
    config = config_from_params({**PARAMS, **as_json})
    assert config == replace(plain, rope_theta=1e6)
    assert isinstance(config.dim, int)
    config = config_from_params({**PARAMS, "ffn_dim_multiplier": 1.3, "rope_scaling": 0.25, "vocab_size": 10})
    assert config_from_params(json.loads(json.dumps(config.to_params()))) == config


def test_all_problems_of_a_shape_are_told_together() -> None:
    wrong = {"dims": 64, "n_layers": "two", "norm_eps": "small", "multiple_of": 1.5, "n_kv_heads": True}
    with pytest.raises(UserError) as refused:
        config_from_params(wrong, "a/params.json")
    assert refused.value.message.splitlines() == [
        "the model's shape in a/params.json is not usable:",
        "  n_layers: should be a valid integer, not 'two'",
        "  n_kv_heads: should be a valid integer, not true",
        "  multiple_of: should be a valid integer, not 1.5",
        "  norm_eps: should be a valid number, not 'small'",
        "  missing key 'dim'",
        "  missing key 'n_heads'",
        "  unknown key 'dims': did you mean 'dim'?",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_heads": 5}, "dim (64) must be divisible by n_heads (5)"),
        ({"n_heads": 64}, "the head dimension (1) must be even"),
        ({"n_kv_heads": 3}, "n_heads (4) must be divisible by n_kv_heads (3)"),
        ({"vocab_size": 0}, "vocab_size must be positive, or -1 for the tokenizer's, not 0"),
        ({"ffn_dim_multiplier": 1e12}, "the SwiGLU width that follows"),
        ({"n_layers": 0}, "n_layers: should be greater than or equal to 1, not 0"),
        ({"n_layers": float("nan")}, "n_layers: should be a valid integer"),
        ({"norm_eps": -1.0}, "norm_eps: should be greater than or equal to"),
        ({"norm_eps": float("inf")}, "norm_eps: should be a finite number"),
        ({"rope_theta": 10**400}, "rope_theta: should be"),
        ({"vocab_size": 10**400}, "vocab_size: should be less than or equal to "),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor and high_freq_factor"),
        ({"nope_layers": [2]}, "nope_layers and window_layers must be below n_layers (2)"),
    ],
)
def test_impossible_shapes_are_refused_with_their_values(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        config_from_params({**PARAMS, **changes}, "params.json")
    assert said in refused.value.message


def test_several_params_files_are_united_and_the_last_wins_and_unreadable_ones_are_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps(PARAMS))
    second.write_text(json.dumps({"n_layers": 9, "rope_theta": 5.0}))
    assert read_params([first, second]) == {**PARAMS, "n_layers": 9, "rope_theta": 5.0}
    assert read_params([second, first])["n_layers"] == 2
    for text, said in (
        ("{dim: 4", r"cannot read .*first\.json"),
        ("[1, 2]", r"first\.json: it must hold a JSON object"),
    ):
        first.write_text(text)
        with pytest.raises(UserError, match=said):
            read_params([first])


def test_a_tokenizer_must_fit_the_vocabulary_which_may_be_open_or_padded() -> None:
    assert config_from_params(PARAMS).with_vocabulary(300).vocab_size == 300
    config = named_size("qwen2.5-7b").with_vocabulary(300)
    config.check_tokenizer(152064, "tokenizer.json")
    config.check_tokenizer(151665, "tokenizer.json")  # as it is published
    for pieces in (152065, 151552, 32000):
        with pytest.raises(UserError, match=rf"tokenizer\.json has {pieces} pieces, the model's vocabulary is 152064"):
            config.check_tokenizer(pieces, "tokenizer.json")


@pytest.mark.parametrize(
    ("rows", "pieces", "fits"),
    [
        (640, 640, True),
        (640, 630, True),  # a multiple of 64, or up to one in 64
        (640, 577, True),
        (640, 576, False),
        (649, 640, True),
        (651, 640, False),
        (640, 641, False),
        (64, 7, True),
        (8, 7, False),
        (33279, 32768, True),
        (33280, 32768, False),
    ],
)
def test_rows_without_a_token_are_no_more_than_padding(rows: int, pieces: int, fits: bool) -> None:
    config = replace(config_from_params(PARAMS), vocab_size=rows)
    if fits:
        config.check_tokenizer(pieces, "tokenizer.json")
        return
    more = f": {rows - pieces} rows without a piece are more than padding" if rows > pieces else ""
    with pytest.raises(UserError, match=f"the model's vocabulary is {rows}{more}\n"):
        config.check_tokenizer(pieces, "tokenizer.json")


def test_matrices_are_left_out_of_nf4_by_any_part_of_their_name() -> None:
    config = named_size("llama2-7b")
    everything = set(quantizable(config))
    assert len(everything) == 7 * 32 + 1
    assert everything - set(quantizable(config, ["output"])) == {"output.weight"}
    # Three is not thirty.
    for skip, count in ((["wv"], 32), (["layers.3"], 7), (["layers.31.feed_forward.w2", "layers.0.attention"], 1 + 4)):
        assert len(everything - set(quantizable(config, skip))) == count
    for wrong in ("wx", "layers.32", "tok_embeddings", ""):
        with pytest.raises(UserError, match=f"there is no matrix '{wrong}' to be left out of NF4"):
            quantizable(config, [wrong])


def test_what_does_not_divide_is_named_with_both_numbers() -> None:
    config = ModelConfig(dim=24, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=301, multiple_of=4)
    with pytest.raises(UserError) as caught:
        check_divides(config, 4)
    for part in ("n_heads (6)", "n_kv_heads (2)", "vocab_size (301)", "size (4)"):
        assert part in str(caught.value)
    assert "dim (24)" not in str(caught.value)
    with pytest.raises(UserError, match="size 3 is not one of 1, 2, 4, 8"):
        check_divides(config, 3)
