"""What is split over a model-parallel group, and which sizes are refused."""

import pytest

from llama_acc.core.errors import UserError
from llama_acc.core.model.config import NAMED_SIZES, SIZES, ModelConfig, check_divides
from llama_acc.core.model.transformer import local_shape, shapes_of, split_dimension


def test_tensors_are_split_as_in_llama2_accessory():
    split = {name: split_dimension(name) for name in shapes_of(ModelConfig(8, 1, 2, vocab_size=8, multiple_of=8))}
    assert split == {
        "tok_embeddings.weight": 1,
        "layers.0.attention_norm.weight": None,
        "layers.0.attention.wq.weight": 0,
        "layers.0.attention.wk.weight": 0,
        "layers.0.attention.wv.weight": 0,
        "layers.0.attention.wo.weight": 1,
        "layers.0.ffn_norm.weight": None,
        "layers.0.feed_forward.w1.weight": 0,
        "layers.0.feed_forward.w2.weight": 1,
        "layers.0.feed_forward.w3.weight": 0,
        "norm.weight": None,
        "output.weight": 0,
    }


def test_a_shard_of_70b_at_size_8_has_the_shapes_of_metas_files():
    shapes = shapes_of(NAMED_SIZES["llama2-70b"])
    local = {name: local_shape(name, shape, 8) for name, shape in shapes.items()}
    assert local["layers.0.attention.wk.weight"] == (128, 8192)
    assert local["layers.0.feed_forward.w2.weight"] == (8192, 3584)
    assert local["tok_embeddings.weight"] == (32000, 1024)


@pytest.mark.parametrize("name", NAMED_SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_every_named_model_can_be_split_in_every_size(name: str, size: int):
    check_divides(NAMED_SIZES[name], size)


def test_what_does_not_divide_is_named_with_both_numbers():
    config = ModelConfig(dim=24, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=301, multiple_of=4)
    with pytest.raises(UserError) as caught:
        check_divides(config, 4)
    for part in ("n_heads (6)", "n_kv_heads (2)", "vocab_size (301)", "size (4)"):
        assert part in str(caught.value)
    assert "dim (24)" not in str(caught.value)


def test_a_size_there_is_no_checkpoint_of_is_refused():
    with pytest.raises(UserError, match="size 3 is not one of 1, 2, 4, 8"):
        check_divides(ModelConfig(24, 1, 6, vocab_size=300, multiple_of=12), 3)
