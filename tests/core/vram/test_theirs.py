"""What another program takes besides, counted by hand for a small model."""

from dataclasses import replace

import pytest

from llama_acc.core.model.vision_config import vision_of
from llama_acc.core.vram import published
from llama_acc.core.vram.gpus import overhead
from llama_acc.core.vram.predict import predict
from llama_acc.core.vram.published import compare_memory
from llama_acc.core.vram.theirs import LOGITS, OPERATIONS, RANKS, TOWER, kept_of_token, more_of_training, other_ranks
from tests.core.vram.setups import setup

DIM, LAYERS, VOCABULARY, HIDDEN, KEYS, TOKENS = 128, 3, 1000, 512, 64, 256
# Two norms: 4 + 2 + 2 bytes; queries and result, keys and values: 2 bytes; four times SwiGLU's width: 2 bytes.
OF_TOKEN = 2 * 8 * DIM + 2 * (2 * DIM + 2 * KEYS) + 4 * 2 * HIDDEN


def test_what_operations_keep_is_counted_for_all_blocks_or_for_the_one_that_is_computed_again() -> None:
    run = setup("train.activation_checkpointing=false")
    assert kept_of_token(run.config) == OF_TOKEN == 6912
    usage = predict(run).training
    kept = LAYERS * TOKENS * OF_TOKEN - usage.parts["activations kept"]
    assert more_of_training(run, usage)[OPERATIONS] == kept > 0
    run = setup("train.activation_checkpointing=true")
    usage = predict(run).training
    again = max(0, TOKENS * OF_TOKEN - usage.parts["activations recomputed"])
    assert more_of_training(run, usage)[OPERATIONS] == again


def test_whole_logits_are_twelve_bytes_a_word_and_token_less_what_is_predicted_of_them() -> None:
    usage = predict(setup()).training
    ours = usage.parts["logits and loss"]
    assert more_of_training(setup(), usage)[LOGITS] == max(0, 12 * TOKENS * VOCABULARY - ours)
    none = replace(usage, parts={**usage.parts, "logits and loss": 0})
    assert more_of_training(setup(), none)[LOGITS] == 12 * TOKENS * VOCABULARY


def test_a_tower_in_nf4_takes_half_a_byte_and_its_scales_of_each_number_of_a_matrix_instead_of_two() -> None:
    run = setup()
    assert more_of_training(run, predict(run).training)[TOWER] == 0
    vision = vision_of("qformer")
    numbers = sum(shape[0] * shape[1] for shape in vision.tower_shapes().values() if len(shape) == 2)
    sees = replace(run, config=replace(run.config, vision=vision))
    saved = numbers * (2 - 0.5 - 1 / 64 - 4 / 16384)
    assert more_of_training(sees, predict(run).training)[TOWER] == pytest.approx(-saved, abs=1)


def test_other_ranks_hold_norms_and_inputs_again_and_have_a_context_of_their_own() -> None:
    run = setup("tuning.method=bias_norm", device_type="cuda")
    usage = predict(run).training
    more = other_ranks(run, usage, 2, lambda one: predict(one).training)
    contexts = overhead().context + 2 * overhead().nccl + overhead().cublas
    inputs = LAYERS * TOKENS * DIM * 2
    assert more == pytest.approx(contexts + inputs, rel=0.01)


def test_the_parts_and_the_rest_add_up_to_what_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = "model.params={dim: 64, n_layers: 2, n_heads: 4, multiple_of: 16, vocab_size: 300, max_seq_len: 512}"
    run = {"recipe": "alpaca", "tuning": "lora", "batch_size": 1, "max_tokens": 64}
    run["overrides"] = [tiny, "model.max_seq_len=512"]
    row = {"who": "Somebody", "what": "tiny", "training": 2.0, "inference": 0.6, "run": run}
    row |= {"ranks": 2, "parts": ["logits", "operations"], "length_is_told": False}
    monkeypatch.setattr(published, "_table", lambda: {"memory": [row], "hours": []})
    training, inference = compare_memory()
    assert set(training.more) <= {RANKS, LOGITS, OPERATIONS}
    assert training.usage.total + sum(training.more.values()) + training.rest == pytest.approx(2e9)
    assert set(inference.more) == {RANKS}
    assert inference.like_length is None
    # With so many tokens, it would be what is published: memory grows evenly with them.
    assert (training.length, training.like_length is not None) == (64, True)
    assert training.like_length is not None
    assert training.like_length > 64
