"""`benchmark-vram`: what users type, and what they get."""

import json
from pathlib import Path

import pytest

from llama_acc.core.memory import fit
from llama_acc.core.memory.predict import PARTS
from tests.cli.commands import complete, invoke

TINY = "model.params={dim: 64, n_layers: 1, n_heads: 4, multiple_of: 16, vocab_size: 300, max_seq_len: 512}"
RUN = ("benchmark-vram", "--recipe", "alpaca", TINY, "model.max_seq_len=512", "--batch-size", 1, "--max-tokens", 64)


def table(text: str) -> dict[str, list[str]]:
    """Rows by their first cell; cells are set apart by two spaces."""
    rows = ([cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines() if line.strip())
    return {first: others for first, *others in rows}


def test_the_parts_of_a_run_and_its_fullest_moments() -> None:
    flags = (*RUN, "--tuning", "lora", "--quantize", "nf4")
    result = complete(*flags)
    rows = table(result.stdout)
    assert rows["MiB"] == ["training", "inference"]
    assert rows["training peak"][0].split(", ")[1].split(" of ")[0] in ("forward", "loss", "backward", "optimizer step")
    assert "neither is measured" in result.stderr
    found = json.loads(invoke(*flags, "--json").stdout)
    for column, work in enumerate(("training", "inference")):
        assert sum(found[work]["parts"].values()) == found[work]["total"]
        shown = {part: float(rows[part][column]) for part in PARTS if part in rows}
        assert shown == {part: pytest.approx(found[work]["parts"][part] / 2**20, abs=0.006) for part in shown}
        assert float(rows["all"][column]) == pytest.approx(found[work]["total"] / 2**20, abs=0.006)
    assert json.loads(invoke(*RUN, "--json", "--gpus", 2).stdout)["gpus"] == 2


def test_a_measurement_agrees_on_a_cpu_and_an_error_above_the_tolerance_ends_with_1() -> None:
    flags = (*RUN, "--device", "cpu", "--measure")
    result = complete(*flags)
    assert abs(float(table(result.stdout)["allocated"][2].rstrip("%"))) < 5
    result = invoke(*flags, "--tolerance", "0", "--json")
    assert result.exit_code == 1
    assert 0 < abs(json.loads(result.stdout)["error"]) < 0.05
    assert "the prediction is off by" in result.stderr
    assert "off by +0.0%" not in result.stderr


def test_a_sweep_is_drawn(tmp_path: Path) -> None:
    result = complete(*RUN, "--sweep", "max_tokens=32,64", "--plot", tmp_path / "memory.png")
    assert table(result.stdout)["max_tokens, MiB"] == ["32", "64"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_what_fits_is_listed_best_first_and_a_batch_above_the_largest_one_tried_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "LARGEST_BATCH", 3)
    flags = (*RUN, "--tuning", "bias_norm", "--fit")
    plain, nf4 = json.loads(invoke(*flags, "513MB", "--json").stdout)["methods"]
    assert (plain["quantize"], nf4["quantize"]) == ("none", "nf4")
    assert nf4["batch_size"] >= plain["batch_size"] > 0
    assert 64 <= plain["longest"] <= 512
    result = complete(*flags, "900GB", "--quantize", "none")
    assert "3 or more" in result.stdout


def test_a_named_gpu_is_asked_whether_it_fits_then_for_the_hours_of_a_data_set(tmp_path: Path) -> None:
    # The recipe leaves it to the GPU, of which so small a model fills nothing.
    one = json.loads(invoke(*RUN, "train.activation_checkpointing=false", "--json").stdout)
    found = json.loads(invoke(*RUN, "--kind", "h100-80gb", "--json").stdout)
    assert (found["activation_checkpointing"], found["lengths"]) == (False, [64])
    assert (found["memory"], found["fits"]) == (one["training"]["total"], True)
    assert found["lengths_from"].startswith("assumed: 1,000 items of 64 tokens, all trained; --data-json")
    rate = 989e12 * found["efficiency"]
    assert found["gpu_hours"] == pytest.approx(one["flops"] * 1000 * found["epochs"] / rate / 3600, rel=0.02)
    lengths = dict.fromkeys(("min", "p25", "p50", "p75", "p95", "p99", "max"), 64)
    data = {"items": 1000, "tokens": 64000, "label_tokens": 64000, "lengths": lengths}
    (tmp_path / "data.json").write_text(json.dumps(data))
    flags = (*RUN, "--data-json", tmp_path / "data.json", "train.epochs=2", "train.warmup_epochs=0")
    found = json.loads(invoke(*flags, "--efficiency", "0.5", "--json").stdout)
    assert found["gpu_hours"] == pytest.approx(one["flops"] * 1000 * 2 / (312e12 * 0.5) / 3600, rel=0.02)
    assert [row["hours"] for row in found["published"]] == [100, 80, 170, 88]
    shown = invoke(*flags).stdout
    assert shown.splitlines()[0].endswith(" 1 x 64 tokens, no activation checkpointing")
    assert shown.splitlines()[1].startswith("memory ")
    assert invoke(*flags, "train.micro_batch_tokens=null", "train.activation_checkpointing=true").stdout.startswith(
        "memory "
    )
    assert table(shown)["LLaMA2-Accessory"][-1] == "88"
    assert "counted with template not said and tokenizer not said" in shown
