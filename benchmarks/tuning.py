"""All tuning methods on one task and one base: what each costs and what it reaches.

The base is in bf16, or in NF4. Each run is `llama-acc finetune`, a process of its own, in turns. The table has what
stands in the run's folder; before it stands what each base has on the held-out items without any training.

    python benchmarks/tuning.py --pretrained DIR --data alpaca.json --output FOLDER
    python benchmarks/tuning.py --pretrained DIR --data alpaca.json --output FOLDER --runs full lora --rounds 3
    python benchmarks/tuning.py --pretrained DIR --data alpaca.json --output FOLDER --skip output wv layers.29
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Rates at which each learns in so few steps; they are not tuned.
METHODS = {
    "full": ["tuning.method=full", "optimizer.lr=5e-5"],
    "bias_norm": ["tuning.method=bias_norm", "optimizer.lr=1e-3"],
    "lora": ["tuning.method=lora", "optimizer.lr=1e-3"],
    "lora_bias_norm": ["tuning.method=lora_bias_norm", "optimizer.lr=1e-3"],
    "adapter": ["tuning.method=adapter", "tuning.prefix_layers=28", "optimizer.lr=1e-3"],
}
# How the base is kept: in the name of a run, and in the table.
BASES = {"": "bf16", "-nf4": "NF4"}
RUNS = {
    name + base: [*words, "checkpoint.trainable_only=true", *(["tuning.quantize=nf4"] if base else [])]
    for name, words in METHODS.items()
    for base in BASES
    if not base or name != "full"
}
COMMON = [
    "data.max_tokens=256",
    "data.validation.every_steps=100000",
    "optimizer.min_lr=0",
    "optimizer.weight_decay=0",
    "train.epochs=2",
    "train.warmup_epochs=0.1",
    "train.global_batch_size=8",
    "train.batch_size=8",
    "train.activation_checkpointing=false",
    "model.max_seq_len=2048",
    "checkpoint.keep=1",
    "checkpoint.every_epochs=0",
]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        trained: parameters that train.
        loss: validation loss at the end.
        seconds: of an optimizer step, the median.
        memory: peak, in GiB.
        saved: bytes of the saved weights.
    """

    trained: int
    loss: float
    seconds: float
    memory: float
    saved: int


def prepare(args: argparse.Namespace) -> tuple[Path, ...]:
    """Short items of the data, to learn and held out: two files."""
    items = json.loads(args.data.read_text(encoding="utf-8"))
    short = [item for item in items if 60 < sum(len(str(value)) for value in item.values()) < 500]
    files = tuple(args.output / f"{name}.json" for name in ("train", "validation"))
    learned, held_out = short[: args.items], short[-args.held_out :]
    if len(short) < len(learned) + len(held_out):
        raise SystemExit(f"{args.data} has {len(short)} short items: too few to hold {args.held_out} out")
    args.output.mkdir(parents=True, exist_ok=True)
    for file, chosen in zip(files, (learned, held_out), strict=True):
        file.write_text(json.dumps(chosen), encoding="utf-8")
    return files


def llama_acc(args: argparse.Namespace, *words: object) -> str:
    """Runs a command, and gives what it prints."""
    command = [sys.executable, "-m", "llama_acc", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def untrained(args: argparse.Namespace, base: str, held_out: Path) -> float:
    """The loss of a base on the held-out items."""
    how = ("--data", held_out, "--template", "alpaca", "--max-tokens", 256, "--device", "cpu", "--json")
    # Of a base that is not quantized, all matrices would be.
    quant = ("--quant", "nf4") if base == "-nf4" else ()
    found: float = json.loads(llama_acc(args, "evaluate", "perplexity", "--ckpt", args.pretrained, *how, *quant))[
        "loss"
    ]
    return found


def run(name: str, number: int, files: tuple[Path, ...], args: argparse.Namespace) -> Result:
    """Trains once and reads the run's folder."""
    folder = args.output / f"{name}-{number}"
    command = ["finetune", "--recipe", "alpaca", "--device", "cpu", "--pretrained", args.pretrained, "--output", folder]
    command += ["--data", files[0], *COMMON, f"data.validation.path={files[1]}", *RUNS[name]]
    if args.skip and "tuning.quantize=nf4" in RUNS[name]:
        command += [f"tuning.quantize_skip=[{','.join(args.skip)}]"]
    llama_acc(args, *command, *([f"train.max_steps={args.steps}"] if args.steps else []))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    report = (folder / "report.md").read_text()
    trained = report.partition("of which ")[2].partition(" train")[0].replace(",", "")
    checkpoint = folder / (folder / "latest").read_text().strip()
    result = Result(
        int(trained),
        next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line),
        # Of the first ones, code is still being made.
        statistics.median(line["tokens"] / line["tokens_per_second"] for line in steps[2:]),
        max(line["peak_memory_gib"] for line in steps),
        sum(path.stat().st_size for path in checkpoint.glob("*.pth")),
    )
    print(f"{name}: {result}", file=sys.stderr, flush=True)
    return result


def row(name: str, results: list[Result], full: list[Result] | None) -> str:
    """A line of the table: medians, and the ratio of the step's time to that of full training in the same round."""
    one = results[-1]
    ratio = "" if full is None else statistics.median(a.seconds / b.seconds for a, b in zip(results, full, strict=True))
    shown = ratio if isinstance(ratio, str) else f"{ratio:.2f}"
    seconds = statistics.median(result.seconds for result in results)
    memory = statistics.median(result.memory for result in results)
    method, dash, base = name.partition("-")
    cells = [f"`{method}`", BASES[dash + base], f"{one.trained:,}", f"{one.loss:.4f}", f"{seconds:.2f}", shown]
    return f"| {' | '.join(cells)} | {memory:.2f} | {one.saved / 2**20:.1f} MiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the tuning methods on this machine's CPU.")
    parser.add_argument("--pretrained", type=Path, required=True, help="a checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="an Alpaca file: a JSON array")
    parser.add_argument("--output", type=Path, required=True, help="where the runs go")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--items", type=int, default=160)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--skip", nargs="*", default=[], help="in NF4 runs, leave these matrices in bf16")
    parser.add_argument("--steps", type=int, default=0, help="end after so many; 0 = two epochs")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    files = prepare(args)
    bases = [base for base in BASES if any(name.partition("-")[2] == base[1:] for name in args.runs)]
    for base in bases:
        print(f"{BASES[base]}, before training: validation loss {untrained(args, base, files[1]):.4f}", flush=True)
    results: dict[str, list[Result]] = {name: [] for name in args.runs}
    for number in range(args.rounds):
        for name in args.runs:
            results[name].append(run(name, number, files, args))
    print("| method | base | parameters that train | validation loss | s/step | to `full` | peak GiB | saved |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(row(name, found, results.get("full")) for name, found in results.items()))


if __name__ == "__main__":
    main()
