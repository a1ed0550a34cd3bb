"""Images in a LLaMA: every number equals transformers' own, however the images are mixed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_acc.core.model.transformer import shapes_of
from tests.core.seeing import QFORMER, blip2, documents_of, logits_of, random_pixels, random_tower, seeing_model
from tests.core.tiny import SMALL, difference

pytest.importorskip("transformers")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' Blip2Model with the weights of `random_tower`."""
    model = blip2(QFORMER, 16)
    left = model.load_state_dict(random_tower(QFORMER).state_dict(), strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith("language_") for name in left.missing_keys)
    return model


def their_features(theirs: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        found = theirs.get_qformer_features(pixel_values=pixels)
    return found if isinstance(found, Tensor) else found.last_hidden_state


@pytest.fixture(scope="module")
def their_llama() -> Any:
    """transformers' LLaMA with the weights of the model "qformer"."""
    return huggingface_llama(seeing_model("qformer"))


def huggingface_llama(model: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_acc.core.checkpoint.huggingface import huggingface_config, huggingface_name, rotated_heads
    from llama_acc.core.checkpoint.lazy import LazyTensor, reorder_heads

    base = model.config.base()
    config = huggingface_config(base, "float32", {})
    llama = LlamaForCausalLM(LlamaConfig(**config)).eval()
    state = {}
    for name in shapes_of(base):
        heads, value = rotated_heads(name, base), model.get_parameter(name).detach()
        state[huggingface_name(name)] = (
            reorder_heads(LazyTensor.of(value), heads, to_meta=False).to(torch.float32) if heads else value
        )
    llama.load_state_dict(state)
    return llama


def their_logits(their_llama: Any, model: Any, words: Tensor, features: Tensor) -> Tensor:
    """LLaMA2-Accessory's order: BOS; start vector, projected features, end vector of each image; the text."""
    with torch.no_grad():
        state = dict(model.named_parameters())
        vectors = []
        for one in features:
            projected = F.linear(one, state["qformer_proj.0.weight"], state["qformer_proj.0.bias"])
            dim = (projected.shape[-1],)
            normed = F.layer_norm(projected, dim, state["qformer_proj.1.weight"], state["qformer_proj.1.bias"])
            vectors += [state["start_img"][0], normed, state["end_img"][0]]
        embedded = their_llama.get_input_embeddings()(words)
        stream = torch.cat((embedded[:1], *vectors, embedded[1:]))
        return their_llama(inputs_embeds=stream[None]).logits[0]


@pytest.mark.parametrize("counts", [[1], [2], [1, 0, 3], [0, 0], [2, 1, 1, 0]])
def test_logits_are_transformers_own_with_any_number_of_images(
    theirs: Any, their_llama: Any, counts: list[int]
) -> None:
    model = seeing_model("qformer")
    documents = documents_of(random_tower(QFORMER), QFORMER, counts)
    for seed, (ours, (words, _), count) in enumerate(zip(logits_of(model, documents), documents, counts, strict=True)):
        features = their_features(theirs, random_pixels(count, QFORMER, seed)) if count else torch.empty(0, 32, 24)
        expected = their_logits(their_llama, model, words, features)
        assert ours.shape == expected.shape == (len(words) + 34 * count, SMALL.vocab_size)
        assert difference(ours, expected) < TOLERANCE
