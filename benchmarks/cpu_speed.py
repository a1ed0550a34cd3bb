"""Speed and memory on a CPU: llama-acc and its baselines in turns, so that a change of the machine's load hits both.

Each measurement is a process of its own. A round runs baseline, ours, baseline, ours, ... for every baseline of the
task; the table has medians over the rounds, and the ratio is the median of ours / baseline within the pairs.

    python benchmarks/cpu_speed.py --data alpaca.json --tokenizer tokenizer.model [--shapes 15M] [--tasks train]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from shapes import SHAPES

FOLDER = Path(__file__).resolve().parent
TASKS: dict[str, list[list[str]]] = {
    "train": [["plain"], ["trainer"]],
    "lora": [["trl"]],
    "generate": [["generate", "--dtype", "float32"], ["generate", "--dtype", "bfloat16"]],
}


@dataclass(frozen=True)
class Pair:
    """The two results of one turn: the JSON lines of a baseline and of ours."""

    baseline: dict
    ours: dict


def measure(script: str, words: list[str], threads: int) -> dict:
    """Run a benchmark script as a process and read the JSON line it ends with.

    Raises:
        SystemExit: it failed; what it wrote has gone to standard error.
    """
    command = [sys.executable, str(FOLDER / script), *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"failed with {done.returncode}: {' '.join(command)}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{script} {words[0]}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def run_pairs(task: str, shape: str, args: argparse.Namespace) -> dict[str, list[Pair]]:
    """All rounds of a task on a shape, by baseline."""
    common = ["--shape", shape, "--data", str(args.data), "--tokenizer", str(args.tokenizer)]
    common += ["--items", str(args.items), "--checkpoints", str(args.checkpoints), "--threads", str(args.threads)]
    measure("baselines.py", ["prepare", *common], args.threads)
    pairs: dict[str, list[Pair]] = {" ".join(words): [] for words in TASKS[task]}
    for _ in range(args.rounds):
        for words in TASKS[task]:
            baseline = measure("baselines.py", [*words, *common], args.threads)
            ours = measure("ours.py", [task, *words[1:], *common], args.threads)
            if task != "generate" and baseline["useful_tokens"] != ours["useful_tokens"]:
                raise SystemExit(f"not the same work: {baseline} against {ours}")
            pairs[" ".join(words)].append(Pair(baseline, ours))
    return pairs


def table_row(shape: str, baseline: str, pairs: list[Pair]) -> str:
    """One line of the Markdown table: medians of speed and peak memory, and the ratios ours / baseline."""

    def median(side: str, key: str) -> float:
        return statistics.median(getattr(pair, side)[key] for pair in pairs)

    def ratio(key: str) -> float:
        return statistics.median(pair.ours[key] / pair.baseline[key] for pair in pairs)

    speed, memory = "tokens_per_second", "peak_rss_gib"
    return (
        f"| {shape} | {baseline.replace(' --dtype', '')} "
        f"| {median('baseline', speed):.0f} | {median('ours', speed):.0f} | {ratio(speed):.2f} "
        f"| {median('baseline', memory):.2f} | {median('ours', memory):.2f} | {ratio(memory):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare llama-acc with its baselines on this machine's CPU.")
    parser.add_argument("--data", type=Path, required=True, help="an Alpaca file: a JSON array")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model of 32,000 pieces")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "llama-acc-benchmarks")
    args = parser.parse_args()

    rows = []
    for task in args.tasks:
        for shape in args.shapes:
            rows += [table_row(shape, name, pairs) for name, pairs in run_pairs(task, shape, args).items()]
    print("| shape | baseline | tokens/s | ours | ratio | peak GiB | ours | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
