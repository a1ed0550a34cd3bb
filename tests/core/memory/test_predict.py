"""The parts against counts by hand, for small models; ranks, moments and work."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_acc.core.memory import simulate
from llama_acc.core.memory.measure import Texts, read_texts, work_of
from llama_acc.core.memory.predict import MemoryRequest, context_bytes, predict, predict_generation, setup_of
from llama_acc.core.memory.simulate import simulate_training
from llama_acc.core.memory.workspaces import workspace
from llama_acc.core.model.transformer import parameter_count
from tests.core.memory.setups import NF4, setup

DIM, LAYERS, VOCABULARY, HIDDEN, KEYS = 128, 3, 1000, 512, 64
BLOCK = 2 * DIM * DIM + 2 * DIM * KEYS + 3 * DIM * HIDDEN
MATRICES = LAYERS * BLOCK
PARAMETERS = MATRICES + 2 * VOCABULARY * DIM + (2 * LAYERS + 1) * DIM
BIASES = LAYERS * (2 * DIM + 2 * KEYS + 2 * HIDDEN + DIM)
TRAINED = BIASES + (2 * LAYERS + 1) * DIM  # bias_norm
ROTATIONS = 8 * 16  # of a position: 16 complex64 numbers, half of a head


def parts(*overrides: str, **options: object) -> dict[str, int]:
    return predict(setup(*overrides, **options)).parts  # type: ignore[arg-type]


def test_what_lasts_is_what_is_counted_by_hand() -> None:
    assert parameter_count(setup().config) == PARAMETERS
    full = parts(micro_batches=2)
    assert full["trainable masters"] == 4 * PARAMETERS
    # A moment is kept twice, and the number of steps for each tensor.
    assert full["optimizer"] == 8 * PARAMETERS + 4 * (LAYERS * 9 + 3)
    assert full["gradients"] == pytest.approx(4 * PARAMETERS, abs=8)  # and the loss
    assert full["weights"] == full["quantization state"] == 0
    few = parts("tuning.method=bias_norm", micro_batches=2)
    assert few["weights"] == 2 * (PARAMETERS - (2 * LAYERS + 1) * DIM)
    assert few["trainable masters"] == 4 * TRAINED
    assert few["gradients"] == pytest.approx(4 * TRAINED, abs=8)
    nf4 = parts("tuning.method=bias_norm", *NF4)
    quantized = MATRICES + VOCABULARY * DIM
    assert nf4["weights"] == quantized // 2 + 2 * VOCABULARY * DIM
    sizes = LAYERS * [DIM * DIM, DIM * DIM, DIM * KEYS, DIM * KEYS, *(3 * [DIM * HIDDEN])] + [VOCABULARY * DIM]
    assert nf4["quantization state"] == quantized // 64 + sum(4 * -(-(size // 64) // 256) + 4 for size in sizes)


def test_the_weights_of_a_recipe_for_qwen3_are_those_of_its_published_shape() -> None:
    short = {"batch_size": 1, "max_tokens": 64, "overrides": ("train.global_batch_size=1",)}
    run = setup_of(MemoryRequest(recipe="sft-qwen3-4b-lora-nf4", device_type="cpu", **short))
    dim, heads, head, hidden, layers = 2560, 32, 128, 9728, 36
    matrices = layers * (2 * dim * heads * head + 2 * dim * 8 * head + 3 * dim * hidden)
    rest = 151936 * dim + layers * (2 * dim + 2 * head) + dim  # the output matrix is the embedding
    assert matrices + rest == 4_022_468_096
    assert predict(run).parts["weights"] == matrices // 2 + 2 * rest


def test_activation_checkpointing_keeps_the_input_of_each_block() -> None:
    run = setup("tuning.method=bias_norm", lengths=(256,), device_type="cpu")
    trace = simulate_training(run)
    kept = [a for a in trace.allocations if trace.purpose(a) == "activations kept"]
    inputs = (LAYERS + 1) * 256 * DIM * 2  # the head's, too
    rotations = (512 + 256) * ROTATIONS  # of all positions, and of those of the batch
    numbers = 4 * 256 * 8  # tokens, positions, targets and, for the last block, which have a label
    assert sum(allocation.nbytes for allocation in kept) == pytest.approx(inputs + rotations + numbers, abs=32)


def test_every_byte_of_the_peak_belongs_to_a_part_and_the_peak_is_at_a_moment() -> None:
    for device_type in ("cpu", "cuda"):
        usage = predict(setup(device_type=device_type))
        assert usage.total == sum(usage.parts.values())
        assert usage.moment.split(" of block ")[0] in ("forward", "loss", "backward", "optimizer step")
    assert usage.parts["CUDA context"] == context_bytes(1)
    assert usage.parts["allocator slack"] > 0
    assert usage.allocated + usage.parts["allocator slack"] == usage.reserved


THIRDS = {"nope_layers": [2, 5, 8, 11, 14], "sliding_window": 30, "window_layers": [1, 4, 7, 10, 13]}
DEEP: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "LoRA in NF4": (("tuning.method=lora", *NF4), {"micro_batches": 2}),
    "a prefix, without checkpointing": (("tuning.method=adapter", "train.activation_checkpointing=false"), {}),
    "a prefix of half the blocks": (
        ("tuning.method=adapter", "tuning.prefix_layers=9", "parallel.data_parallel=fsdp"),
        {"world_size": 4, "n_layers": 18},
    ),
    "every third block does not rotate": (
        ("parallel.data_parallel=fsdp",),
        {"n_layers": 15, "params": THIRDS, "world_size": 4, "micro_batches": 2},
    ),
    "every other block has a window": (
        ("tuning.method=bias_norm", "train.activation_checkpointing=false"),
        {"n_layers": 11, "params": {"sliding_window": 20, "window_layers": [0, 2, 4, 6, 8, 10]}},
    ),
    "the last half has a window": (
        ("tuning.method=full",),
        {"n_layers": 14, "params": {"sliding_window": 20, "window_layers": [7, 8, 9, 10, 11, 12, 13]}},
    ),
}


@pytest.mark.parametrize("case", [*DEEP, pytest.param("13B", marks=pytest.mark.soak)])
def test_a_deep_model_is_predicted_to_the_byte_from_a_few_of_its_blocks(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "13B":
        run = setup_of(MemoryRequest(model="llama2-13b", tuning="lora", quantize="nf4", batch_size=2))
    else:
        overrides, options = DEEP[case]
        run = setup(*overrides, lengths=(64, 16), device_type="cuda", **{"n_layers": 9, **options})
    depths = []
    train = simulate._train
    monkeypatch.setattr(simulate, "_train", lambda setup: depths.append(setup.config.n_layers) or train(setup))
    from_few = predict(run)
    assert max(depths) < run.config.n_layers
    monkeypatch.setattr(simulate, "_ENDS", run.config.n_layers)
    assert from_few == predict(run)
    assert depths[-1] == run.config.n_layers


def test_generation_keeps_keys_and_values_of_every_position() -> None:
    usage = predict_generation(setup("tuning.method=bias_norm"), 256)
    assert usage.parts["KV cache"] == LAYERS * 2 * KEYS * 256 * 2
    assert usage.parts["weights"] == 2 * (PARAMETERS + BIASES)


@pytest.mark.parametrize("mode", ["ddp", "sdp", "fsdp"])
def test_ranks_share_what_their_mode_shares(mode: str) -> None:
    alone = parts(micro_batches=2)
    four = parts(f"parallel.data_parallel={mode}", micro_batches=2, world_size=4)
    shared = 1 if mode == "ddp" else 4
    assert four["trainable masters"] == pytest.approx(alone["trainable masters"] / shared, rel=0.01)
    assert four["optimizer"] == pytest.approx(alone["optimizer"] / shared, rel=0.01)
    gradients = 4 if mode == "fsdp" else 1
    assert four["gradients"] == pytest.approx(alone["gradients"] / gradients, rel=0.35)
    assert four["communication buffers"] > alone["communication buffers"] == 0


def test_model_parallel_ranks_have_their_part_of_every_matrix() -> None:
    two = parts("tuning.method=lora", "parallel.model_parallel_size=2", world_size=2)
    norms = 2 * (2 * LAYERS + 1) * DIM
    assert two["weights"] - norms == (parts("tuning.method=lora")["weights"] - norms) // 2


def test_work_is_that_of_the_matrices_of_attention_and_of_the_head() -> None:
    # Little but the biases trains, and nothing is computed again: forward, and the gradients of the inputs.
    run = setup("tuning.method=bias_norm", "train.activation_checkpointing=false")
    # Scores and their product with the values; in the backward pass the scores again, and four gradients of such size.
    attention = LAYERS * DIM * (4 + 10)
    # The last block's output matrix of attention and its feed-forward are for what has a label, as the head is.
    last = DIM * DIM + 3 * DIM * HIDDEN
    labels, matrices, picked = 150, 4 * (MATRICES - last), 4 * (last + VOCABULARY * DIM)
    expected = matrices * 300 + attention * (100**2 + 200**2) + picked * labels
    assert work_of(run, Texts(2, 300, labels, 100**2 + 200**2)) == pytest.approx(expected, rel=0.02)
    one = replace(run, lengths=(100,), labels=100)
    assert work_of(run, Texts(1, 100, 100, 100**2)) == predict(one).flops


def test_squared_lengths_follow_from_the_quantiles(tmp_path: Path) -> None:
    lengths = {"min": 0, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"items": 10, "tokens": 500, "label_tokens": 100, "lengths": lengths}))
    assert read_texts(path).squares == pytest.approx(10 * 100**2 / 3)  # evenly between 0 and 100


def test_flash_attention_sums_the_queries_gradients_in_float32() -> None:
    q = torch.empty(100, 4, 40, dtype=torch.bfloat16)
    k = torch.empty(100, 2, 40, dtype=torch.bfloat16)
    bounds = torch.tensor([0, 60, 100], dtype=torch.int32)
    # 128 rows more for each of two documents, a width of 40 is 64; one number a row; keys and values of four heads.
    backward = torch.ops.aten._flash_attention_backward.default
    expected = 4 * (100 + 2 * 128) * 4 * (64 + 1) + 2 * 4 * 100 * 40 * 2
    assert workspace(backward, (q, q, k, k, q, None, bounds, bounds), {}) == expected
