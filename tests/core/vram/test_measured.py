"""The prediction is what torch's CPU allocator measures: within 5% is promised, it is below 1% here."""

import pytest
import torch

from llama_acc.core.vram import cpu_workspaces
from llama_acc.core.vram.cpu_workspaces import cpu_workspace
from llama_acc.core.vram.measure import measure, measure_generation
from llama_acc.core.vram.predict import predict, predict_generation
from tests.core.tiny import CPU
from tests.core.vram.setups import NF4, setup

METHODS = {
    "full": ("tuning.method=full",),
    "bias_norm": ("tuning.method=bias_norm",),
    "lora": ("tuning.method=lora",),
    "lora_bias_norm": ("tuning.method=lora_bias_norm",),
    "adapter": ("tuning.method=adapter",),
    "nf4": ("tuning.method=lora_bias_norm", *NF4),
}


@pytest.mark.parametrize("lengths", [(40,), (300, 56)], ids=str)
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("method", METHODS)
def test_prediction_is_what_is_measured(method: str, checkpointing: str, lengths: tuple[int, ...]) -> None:
    run = setup(*METHODS[method], f"train.activation_checkpointing={checkpointing}", lengths=lengths)
    measured = measure(run, CPU).allocated
    assert predict(run).training.total == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("method", ["full", "adapter", "nf4"])
def test_prediction_of_a_conversation_is_what_is_measured(method: str, dim: int) -> None:
    run = setup(*METHODS[method], dim=dim)
    assert predict_generation(run, 300).total == pytest.approx(measure_generation(run, 300, CPU).allocated, rel=0.05)


def test_what_every_thread_takes_for_itself_is_in_the_prediction() -> None:
    run, before = setup(*METHODS["nf4"]), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        predicted, measured = predict_generation(run, 40).total, measure_generation(run, 40, CPU).allocated
    finally:
        torch.set_num_threads(before)
    assert predicted == pytest.approx(measured, rel=0.01)


def test_what_a_large_product_takes_is_found_with_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(64, 4096, dtype=torch.bfloat16), torch.zeros(2048, 4096, dtype=torch.bfloat16)
    whole = cpu_workspace(torch.ops.aten.mm.default, (x, weight.t()), {})
    monkeypatch.setattr(cpu_workspaces, "_WORK", 0)
    assert cpu_workspace(torch.ops.aten.mm.default, (x, weight.t()), {}) == whole
    out = torch.zeros(64, 2048, dtype=torch.bfloat16)
    assert cpu_workspace(torch.ops.aten.mm.out, (x, weight.t()), {"out": out}) == whole
    assert cpu_workspace(torch.ops.aten.addmm.default, (out[0], x, weight.t()), {}) > 0


@pytest.mark.parametrize("method", ["full", "nf4"])
def test_prediction_of_accumulated_float32_steps_is_what_is_measured(method: str) -> None:
    run = setup(*METHODS[method], "train.precision=fp32", micro_batches=3, labels=100)
    assert predict(run).training.total == pytest.approx(measure(run, CPU).allocated, rel=0.05)
