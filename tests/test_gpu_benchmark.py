"""benchmarks/gpu.py on a CPU with tiny shapes: on a GPU, nothing but the numbers is new."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
sys.path.append(str(ROOT / "benchmarks"))
gpu: Any = importlib.import_module("gpu")
gpu_work: Any = importlib.import_module("gpu_work")


def lines_of(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def test_every_measurement_is_made_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARM_UP", "STEPS", "ROUNDS"):
        monkeypatch.setattr(gpu_work, name, 1)
    once = {name: work for name, work in gpu.WORK.items() if name != "tests" and not name.endswith("-2")}
    monkeypatch.setattr(gpu, "WORK", once)
    results = tmp_path / "gpu.jsonl"
    assert gpu.run(gpu.PARTS, results, CPU, True, 1e9, launch=gpu.measure) == []
    lines = gpu.read_lines(results)
    assert list(lines) == list(once)
    for name, line in lines.items():
        low, high = line["range"]
        assert 0 < low <= line["tokens_per_second"] <= high, name
        assert line["tiny"]
        assert line["device"].startswith("CPU, ")
        assert ("predicted_allocated" in line) is ("transformers" not in name and name != "decoding-32"), name
    assert gpu.measurements_table(lines).count("\n") == len(once) + 1
    reached = [goal.text for goal in gpu.GOALS if goal.measured(lines) is not None]
    memory = ["7B QLoRA at 2 x 512, reserved", "70B NF4 LoRA at 512 tokens, allocated"]  # a CPU's is not measured
    assert reached == [goal.text for goal in gpu.GOALS if goal.text not in memory]


def test_a_measurement_is_a_process_that_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.in_child("tests", CPU, True)["passed"] == 0  # where there is no GPU, none of them runs
    monkeypatch.setitem(gpu.WORK, "tests", replace(gpu.WORK["tests"], limit=0.1))
    assert gpu.in_child("tests", CPU, True) == {"error": "not done in 0.1 s"}


def test_it_goes_on_where_it_ended(tmp_path: Path) -> None:
    results, measured = tmp_path / "gpu.jsonl", []

    def launch(name: str, device: torch.device, tiny: bool) -> dict[str, Any]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(name)
        failed = measured == ["full-recomputed", "full"]
        return {"error": "it failed"} if failed else {"tokens_per_second": 5.0, "tiny": tiny}

    with pytest.raises(KeyboardInterrupt):
        gpu.run(["training"], results, CPU, True, 1e9, launch)
    assert measured == ["full-recomputed", "full", "lora"]
    assert [line["name"] for line in lines_of(results)] == measured
    results.write_text(results.read_text() + '{"name": "qlora", "tokens_per')  # a power cut
    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        gpu.run(["training"], results, CPU, True, 1e9, launch)
    assert measured == ["full", "qlora", "qlora-recomputed"]
    assert gpu.read_lines(results)["qlora"]["tokens_per_second"] == 5.0
    # A rehearsal is no measurement.
    assert gpu.run(["correctness"], results, CPU, False, 1e9, lambda *_: {"passed": 1, "tiny": False}) == []
    with pytest.raises(KeyboardInterrupt):
        gpu.run(["training"], results, CPU, False, 1e9, launch)
    assert gpu.goals_table(gpu.read_lines(results)) == gpu.goals_table({})
    # What might take longer than there is time is left.
    assert gpu.run(["training"], results, CPU, True, 119.0, launch) == [
        "qlora-2x512",
        "70b-recomputed",
        "70b",
        "70b-512",
    ]


def test_nothing_is_measured_that_is_not_correct(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not correct"):
        gpu.run(gpu.PARTS, tmp_path / "gpu.jsonl", CPU, True, 1e9, lambda *_: {"error": "2 of 3 passed"})
    assert [line["name"] for line in lines_of(tmp_path / "gpu.jsonl")] == ["tests"]


def test_goals_stand_beside_what_was_measured() -> None:
    speeds = {f"qlora-{by}-{turn}": speed for turn in (1, 2) for by, speed in (("llama-acc", 5), ("transformers", 2))}
    lines: dict[str, Any] = {name: {"tokens_per_second": speed} for name, speed in speeds.items()}
    lines |= {"full": {"tokens_per_second": 15_499.0}, "qlora-2x512": {"reserved": 6 * 10**9}}
    table = gpu.goals_table(lines)
    assert "| 7B full, packed 2,048 | at least 15,500 tokens/s | 15,499, missed |" in table
    assert "| 7B QLoRA at 2 x 512, reserved | at most 6 GB | 6.00 |" in table
    assert "| 7B QLoRA over transformers with PEFT | at least 2 times | 2.50 |" in table
    assert table.count("not measured yet") == len(gpu.GOALS) - 3
    assert gpu.goals_table({}) in (ROOT / "docs/benchmarks.md").read_text()
