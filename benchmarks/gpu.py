"""Correctness, speed and memory on a GPU: beside what is predicted, beside transformers with PEFT, beside the goals.

Weights and tokens are random and made on the device, so there is nothing to download. Each measurement is a process of
its own with a time limit, and a line of the results that is on disk before the next one begins. A call takes at most
nine minutes; the next one goes on where it ended, and measures again what failed.

    make gpu                                          # the same as python benchmarks/gpu.py
    python benchmarks/gpu.py training --results gpu.jsonl
    python benchmarks/gpu.py --table --results gpu.jsonl
    python benchmarks/gpu.py --tiny --device cpu      # a rehearsal
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_work import GIB, SPEED, Work, decode_ours, decode_theirs, train_ours, train_theirs

from llama_acc.core.device import prepare_cuda
from llama_acc.core.model.config import ModelConfig, named_size
from llama_acc.core.train.log import device_name

ROOT = Path(__file__).resolve().parents[1]
TINY = ModelConfig(dim=64, n_layers=2, n_heads=4, vocab_size=512, multiple_of=32, max_seq_len=1024)
# About as long as Alpaca's items.
ALPACA = tuple(int(n) for n in np.random.default_rng(0).lognormal(5.0, 0.6, 24).clip(40, 512))
PACKED, SHORT, PROMPT = (2048,), (205,) * 80, (512,)
_LORA = Work("training", SHORT)
_QLORA = replace(_LORA, nf4=True)
_70B = Work("training", PACKED * 2, "llama2-70b", nf4=True, limit=240)
_DECODING = Work("decoding", PROMPT, new=(32, 160))
_IN_TURNS = {
    "lora": replace(_LORA, lengths=ALPACA, recomputed=True),
    "qlora": replace(_QLORA, lengths=ALPACA, recomputed=True),
    "decoding": _DECODING,
}
WORK = {
    "tests": Work("correctness", limit=240),
    "full-recomputed": Work("training", PACKED * 8, full=True, recomputed=True),
    "full": Work("training", PACKED * 2, full=True, micro_batches=4),
    "lora": _LORA,
    "qlora": _QLORA,
    "qlora-recomputed": replace(_QLORA, recomputed=True),
    "qlora-2x512": replace(_QLORA, lengths=(512,) * 2, recomputed=True, micro_batches=1),
    "70b-recomputed": replace(_70B, recomputed=True),
    "70b": _70B,
    "70b-512": replace(_70B, lengths=(512,), recomputed=True, micro_batches=1),
    **{
        f"{name}-{by}-{turn}": replace(work, part="turns", by=by)
        for name, work in _IN_TURNS.items()
        for turn in (1, 2)
        for by in ("llama-acc", "transformers")
    },
    "decoding": _DECODING,
    "decoding-nf4": replace(_DECODING, nf4=True),
    "decoding-32": replace(_DECODING, lengths=PROMPT * 32),
}
PARTS = list(dict.fromkeys(work.part for work in WORK.values()))

Lines = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """What one H200 is to reach: `key` of a measurement, or of "NAME/transformers" the median ratio over turns."""

    text: str
    bound: str  # "at least" or "at most"
    value: float
    unit: str
    name: str
    key: str = SPEED

    def measured(self, lines: Lines) -> float | None:
        """In `unit`; None: not yet."""
        name, _, other = self.name.partition("/")
        if not other:
            found = lines.get(name, {}).get(self.key)
            return found and found / {"GB": 10**9, "GiB": GIB}.get(self.unit, 1)
        turns = [[lines.get(f"{name}-{by}-{turn}", {}).get(SPEED) for by in ("llama-acc", other)] for turn in (1, 2)]
        ratios = [ours / theirs for ours, theirs in turns if ours and theirs]
        return statistics.median(ratios) if ratios else None

    def row(self, lines: Lines) -> str:
        """A line of the table."""
        found, shown = self.measured(lines), "not measured yet"
        if found is not None:
            missed = found < self.value if self.bound == "at least" else found > self.value
            shown = f"{found:,.{0 if self.value >= 100 else 2}f}{', missed' if missed else ''}"
        return f"| {self.text} | {self.bound} {self.value:,g} {self.unit} | {shown} |"


GOALS = [
    Goal("7B full, packed 2,048, recomputed", "at least", 13_000, "tokens/s", "full-recomputed"),
    Goal("7B full, packed 2,048", "at least", 15_500, "tokens/s", "full"),
    Goal("7B LoRA", "at least", 20_000, "tokens/s", "lora"),
    Goal("7B QLoRA", "at least", 18_500, "tokens/s", "qlora"),
    Goal("7B QLoRA at 2 x 512, reserved", "at most", 6, "GB", "qlora-2x512", "reserved"),
    Goal("7B QLoRA over transformers with PEFT", "at least", 2, "times", "qlora/transformers"),
    Goal("70B NF4 LoRA, recomputed", "at least", 1_400, "tokens/s", "70b-recomputed"),
    Goal("70B NF4 LoRA at 512 tokens, allocated", "at most", 38, "GiB", "70b-512", "allocated"),
    Goal("decoding 7B, bf16", "at least", 250, "tokens/s", "decoding"),
    Goal("decoding 7B, NF4", "at least", 400, "tokens/s", "decoding-nf4"),
    Goal("decoding 7B, 32 answers at once", "at least", 4_000, "tokens/s", "decoding-32"),
]


def goals_table(lines: Lines) -> str:
    """The goals as Markdown, beside what was measured; a rehearsal measures nothing of them."""
    lines = {name: line for name, line in lines.items() if not line.get("tiny")}
    return "\n".join(["| one H200 | goal | measured |", "|---|---|---|", *(goal.row(lines) for goal in GOALS)])


def measurements_table(lines: Lines) -> str:
    """All that was measured, as Markdown, memory beside its prediction."""
    rows = ["| | tokens/s (range) | GiB reserved | predicted | allocated | predicted |", "|---|---|---|---|---|---|"]
    for name, line in lines.items():
        shown = line.get("error") or f"{line.get('passed')} tests passed"
        if SPEED in line:
            low, high = line["range"]
            shown = f"{line[SPEED]:,.0f} ({low:,.0f} to {high:,.0f})"
        sizes = [line.get(key) for key in ("reserved", "predicted_reserved", "allocated", "predicted_allocated")]
        cells = ["" if size is None else f"{size / GIB:.2f}" for size in sizes]
        rows.append(f"| {name} | {shown} | {' | '.join(cells)} |")
    return "\n".join(rows)


def measure(name: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Does one measurement in this process."""
    prepare_cuda()
    work, about = WORK[name], {"device": device_name(device), "tiny": tiny, "date": time.strftime("%Y-%m-%d")}
    if not work.lengths:
        return run_tests() | about
    config = TINY if tiny else named_size(work.model)
    if tiny:
        work = replace(work, lengths=tuple(n // 32 for n in work.lengths[:4]), new=work.new and (1, 33))
    torch.manual_seed(0)
    train, decode = (train_ours, decode_ours) if work.by == "llama-acc" else (train_theirs, decode_theirs)
    return (train if work.new is None else decode)(work, config, device) | about


def run_tests() -> dict[str, Any]:
    """The tests marked gpu, which compare with float64 on the CPU."""
    import pytest

    class Counted:
        outcomes: list[str] = []

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or not report.passed:
                self.outcomes.append(report.outcome)

    counted = Counted()
    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files], [counted])
    passed = counted.outcomes.count("passed")
    if code or (torch.cuda.is_available() and not passed):
        raise RuntimeError(f"{passed} of the {len(counted.outcomes)} tests marked gpu passed (pytest: {int(code)})")
    return {"passed": passed}


def in_child(name: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """`measure` in a process of its own; what goes wrong there is an `error`."""
    command = [sys.executable, __file__, "--one", name, "--device", device.type, *["--tiny"] * tiny]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said, _ = child.communicate(timeout=WORK[name].limit)
        return json.loads(said.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {WORK[name].limit} s"}
    except (IndexError, ValueError):
        return {"error": f"its process ended with {child.returncode}"}
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def read_lines(results: Path) -> Lines:
    """The newest line of each measurement; one that was cut off does not count."""
    lines: Lines = {}
    for text in results.read_text("utf-8").splitlines() if results.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        lines[line.pop("name")] = line
    return lines


def run(
    parts: list[str],
    results: Path,
    device: torch.device,
    tiny: bool,
    seconds: float,
    launch: Callable[[str, torch.device, bool], dict[str, Any]] = in_child,
) -> list[str]:
    """Measures what was not measured yet, as far as the time goes. Returns what is left."""
    begin, lines = time.monotonic(), read_lines(results)
    done = {name for name, line in lines.items() if "error" not in line and line["tiny"] is tiny}
    todo = [name for name, work in WORK.items() if work.part in parts and name not in done]
    for place, name in enumerate(todo):
        start = time.monotonic()
        if start - begin + WORK[name].limit > seconds:
            return todo[place:]
        line = {"name": name, **launch(name, device, tiny), "seconds": round(time.monotonic() - start, 1)}
        cut_off = results.exists() and not results.read_bytes().endswith(b"\n")
        with results.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_off + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps(line), file=sys.stderr, flush=True)
        if name == "tests" and "error" in line:
            raise SystemExit("what is not correct is not measured")
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; without one, all")
    parser.add_argument("--results", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing is begun that might take longer")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    parser.add_argument("--one", choices=WORK, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.one:
        try:
            found = measure(args.one, device, args.tiny)
        except Exception as error:  # of whatever kind: it becomes a line of the results
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(found))
        return
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    parts = args.parts or PARTS
    left = [] if args.table else run(parts, args.results, device, args.tiny, 60 * args.minutes)
    lines = read_lines(args.results)
    devices = ", ".join({line.get("device", "") for line in lines.values()} - {""})
    print(f"{devices}\n\n{measurements_table(lines)}\n\n{goals_table(lines)}")
    if left:
        print(f"\nleft: {', '.join(left)}; the same command goes on with it")


if __name__ == "__main__":
    main()
