"""How long a run takes to its first step on much data, and what its ranks hold of it in memory.

    python benchmarks/data_scale.py [--items 10000000] [--shards 10] [--ranks 1 2 8] [--steps 300] [--folder DIR]

Generates short items (questions and answers on sums) as shards of JSON lines, encodes them once (`cold`), and then
starts a run of a tiny model with each number of ranks (`warm`): the command line as a user types it. `first step` is
from typing to the first line of metrics.jsonl. Memory is each rank's, the largest of all samples taken while it ran, in
MB (10^6 bytes):

    resident   RSS: all pages it has at hand, mapped pages of the data included, which other ranks have at hand too
    its share  PSS: the same, but a page that n processes have at hand counts as a 1/n
    its own    written by it alone: what is there n times on n ranks, and the system cannot take back

Prints one JSON line for each run, then a table. Needs 0.3 KB of disk an item under --folder (a temporary folder).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_POLL = 0.1  # seconds
_LOOKS_AT_MEMORY_EVERY = 1.0  # seconds; each look walks all pages of a process
_TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "max_seq_len": 256}


def generate(folder: Path, items: int, shards: int) -> int:
    """Writes the items; how many bytes that is."""
    folder.mkdir(parents=True)
    size = 0
    for shard in range(shards):
        with (folder / f"{shard:04d}.jsonl").open("w", encoding="ascii") as file:
            for i in range(shard * items // shards, (shard + 1) * items // shards):
                a, b = i, i * 7919 % 9973
                file.write(f'{{"instruction": "What is {a} plus {b}?", "output": "The sum is {a + b}."}}\n')
            size += file.tell()
    return size


def cold(data: Path, home: Path) -> dict[str, Any]:
    """Encodes everything, in a process of its own."""
    start = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--encode", str(data)], env=environment(home), check=True)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    entries = list((home / "cache/tokens").glob("*.tokens"))
    return {
        "run": "cold",
        "seconds": round(seconds, 1),
        "cache MB": round(sum(entry.stat().st_size for entry in entries) / 1e6),
        "CPU seconds": round(used.ru_utime + used.ru_stime, 1),
        "largest process MB": round(used.ru_maxrss * 1024 / 1e6),
    }


def encode(data: Path) -> None:
    from llama_acc.core.data.dataset import load_dataset
    from llama_acc.core.data.sources import SHIPPED, Source
    from llama_acc.core.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(SHIPPED / "quickstart/tokenizer.model")
    load_dataset([Source(str(data), "single_turn", "alpaca")], tokenizer, 256, seed=0)


def warm(data: Path, home: Path, output: Path, ranks: int, steps: int) -> dict[str, Any]:
    """Starts a run of so many steps, and looks at its ranks until it ends."""
    command = [
        *(sys.executable, "-m", "llama_acc", "finetune", "--recipe", "quickstart", "--device", "cpu"),
        *("--data", str(data), "--output", str(output), "--nproc", str(ranks)),
        *(f"model.params={json.dumps(_TINY)}", f"train.max_steps={steps}", "train.global_batch_size=64"),
        *("train.epochs=1", "train.warmup_epochs=0", "checkpoint.keep=1"),
    ]
    metrics, start, first, looked = output / "metrics.jsonl", time.perf_counter(), 0.0, 0.0
    peaks: dict[int, dict[str, int]] = {}
    process = subprocess.Popen(command, env=environment(home), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if not first and metrics.exists() and metrics.stat().st_size:
            first = time.perf_counter() - start
        if time.perf_counter() > looked + _LOOKS_AT_MEMORY_EVERY:
            looked = time.perf_counter()
            for pid in [process.pid] if ranks == 1 else children(process.pid):
                for name, value in memory(pid).items():
                    of_rank = peaks.setdefault(pid, {})
                    of_rank[name] = max(of_rank.get(name, 0), value)
        time.sleep(_POLL)
    if process.returncode or not first:
        raise SystemExit(f"the run failed: {' '.join(command)}")
    of_ranks = sorted(peaks.values(), key=lambda peak: -peak["resident"])[:ranks]
    most = {name: round(max(peak[name] for peak in of_ranks) / 1e6) for name in of_ranks[0]}
    return {"run": "warm", "ranks": ranks, "first step s": round(first, 1), **most}


def memory(pid: int) -> dict[str, int]:
    """Bytes that a process has at hand; none if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    names = {"resident": "Rss", "its share": "Pss", "its own": "Private_Dirty"}
    return {name: kilobytes[key] << 10 for name, key in names.items()}


def children(pid: int) -> list[int]:
    """Processes that one has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def environment(home: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "LLAMA_ACC_HOME": str(home), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="kept, and used again")
    parser.add_argument("--encode", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.encode:
        encode(arguments.encode)
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="data-scale-"))
    try:
        measure(arguments, folder)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    data, home = folder / f"{arguments.items}-in-{arguments.shards}", folder / "home"
    if not data.exists():
        size = generate(data, arguments.items, arguments.shards)
        print(json.dumps({"items": arguments.items, "shards": arguments.shards, "MB": round(size / 1e6)}), flush=True)
    print(json.dumps(cold(data, home)), flush=True)
    runs = []
    for ranks in arguments.ranks:
        output = folder / f"run-{ranks}"
        shutil.rmtree(output, ignore_errors=True)
        runs.append(warm(data, home, output, ranks, arguments.steps))
        print(json.dumps(runs[-1]), flush=True)
    names = list(runs[0])[1:]
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for run in runs:
        print("| " + " | ".join(str(run[name]) for name in names) + " |")


if __name__ == "__main__":
    main()
