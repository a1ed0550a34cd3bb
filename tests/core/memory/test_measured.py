"""The prediction is what torch's CPU allocator measures: within 5% is promised, it is below 1% here."""

from typing import Any

import pytest
import torch

from llama_acc.core.memory.measure import measure, measure_generation
from llama_acc.core.memory.predict import predict, predict_generation
from llama_acc.core.memory.workspaces import peak_cpu_bytes
from tests.core.memory.setups import NF4, setup
from tests.core.ranks import run_ranks
from tests.core.tiny import CPU

METHODS = {
    "full": ("tuning.method=full",),
    "bias_norm": ("tuning.method=bias_norm",),
    "lora": ("tuning.method=lora",),
    "adapter": ("tuning.method=adapter",),
    "nf4": ("tuning.method=lora_bias_norm", "tuning.lora_dropout=0.1", *NF4),
}


def test_the_peak_is_what_is_held_at_a_time() -> None:
    def take() -> None:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        torch.empty(3 << 20, dtype=torch.uint8)

    assert peak_cpu_bytes(take) == 3 << 20
    assert peak_cpu_bytes(lambda: None) == 0


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("method", METHODS)
def test_prediction_is_what_is_measured(method: str, checkpointing: str) -> None:
    lengths = (40,) if method in ("bias_norm", "lora") else (300, 56)
    run = setup(*METHODS[method], f"train.activation_checkpointing={checkpointing}", lengths=lengths, n_layers=2)
    assert predict(run).total == pytest.approx(measure(run, CPU).allocated, rel=0.01)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama3.2": {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "vocab_size": 4000},
    "mistral": {"family": "mistral", "sliding_window": 50, "head_dim": 16},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 64, "tie_word_embeddings": True},
    "granite": {"family": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    "smollm3": {"family": "smollm3", "nope_layers": [1], "sliding_window": 60, "window_layers": [1]},
}


@pytest.mark.parametrize("method", ["full", "nf4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prediction_of_each_family_is_what_is_measured(name: str, method: str) -> None:
    run = setup(*METHODS[method], lengths=(300, 56), n_layers=2 if name == "smollm3" else 1, params=FAMILIES[name])
    assert predict(run).total == pytest.approx(measure(run, CPU).allocated, rel=0.01)
    if method == "nf4":
        predicted, measured = predict_generation(run, 70).total, measure_generation(run, 70, CPU).allocated
        assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("method", ["full", "nf4"])
def test_prediction_of_accumulated_float32_steps_is_what_is_measured(method: str) -> None:
    run = setup(*METHODS[method], "train.precision=fp32", micro_batches=3, labels=100, n_layers=2)
    assert predict(run).total == pytest.approx(measure(run, CPU).allocated, rel=0.01)


@pytest.mark.parametrize(
    ("method", "dim", "length", "threads"), [("full", 128, 70, 2), ("adapter", 256, 40, 1), ("nf4", 128, 40, 1)]
)
def test_prediction_of_a_conversation_is_what_is_measured(method: str, dim: int, length: int, threads: int) -> None:
    run, before = setup(*METHODS[method], dim=dim), torch.get_num_threads()
    torch.set_num_threads(threads)  # every thread takes something for itself
    try:
        predicted, measured = predict_generation(run, length).total, measure_generation(run, length, CPU).allocated
    finally:
        torch.set_num_threads(before)
    assert predicted == pytest.approx(measured, rel=0.01)


KINDS = {"SSE41": "default", "AVX2": "avx2", "AVX512_CORE": "avx512", "AVX512_CORE_AMX": "avx512"}
"""oneDNN's and torch's names of kinds of CPU, none better than the one at hand is used."""


@pytest.mark.parametrize(
    ("kind", "threads"),
    [("AVX512_CORE", 2), *(pytest.param(kind, count, marks=pytest.mark.soak) for kind in KINDS for count in (1, 4))],
)
def test_what_a_large_product_takes_is_found_with_a_part_of_it_on_any_cpu(kind: str, threads: int) -> None:
    variables = {"ONEDNN_MAX_CPU_ISA": kind, "ATEN_CPU_CAPABILITY": KINDS[kind], "OMP_NUM_THREADS": str(threads)}
    (found,) = run_ranks(1, "tests.core.memory.setups:of_operations", variables=variables)
    for name, (whole, of_part, operands) in found.items():
        assert of_part == pytest.approx(whole, abs=0.05 * operands), name


RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"overrides": ["parallel.data_parallel=ddp"], "micro_batches": 2},
    "sdp": {"overrides": ["parallel.data_parallel=sdp"], "micro_batches": 2},
    "fsdp": {"overrides": ["parallel.data_parallel=fsdp"], "micro_batches": 2},
    "fsdp, gradients gathered": {
        "overrides": ["parallel.data_parallel=fsdp", "parallel.accumulate_unsharded=true"],
        "micro_batches": 2,
    },
    "model parallel 2": {"overrides": ["parallel.model_parallel_size=2"], "micro_batches": 1},
}


@pytest.mark.soak
@pytest.mark.parametrize("count", [2, 4])
def test_prediction_is_what_ranks_joined_by_gloo_take(count: int) -> None:
    measured = run_ranks(count, "tests.core.memory.setups:peaks", runs=list(RUNS.values()), world_size=count)
    for number, (name, run) in enumerate(RUNS.items()):
        one = setup(*run["overrides"], world_size=count, micro_batches=run["micro_batches"])
        peaks = [of_rank[number] for of_rank in measured]
        assert peaks == [pytest.approx(predict(one).total, rel=0.05)] * count, name
