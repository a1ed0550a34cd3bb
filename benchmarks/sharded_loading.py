"""Loading a checkpoint of two shards at model-parallel size 2, against `cat` of the same files to /dev/null, in turns.

    python benchmarks/sharded_loading.py [--folder DIR] [--layers 6] [--rounds 5]

LLaMA2-13B's width with fewer layers, in bf16 (4.5 GB with 6 layers), from the page cache. The two ranks are two
processes that begin at the same time; a round's time is until the later one is done. Importing torch is not counted.

    map    as for generation: bf16, parameters stay in the file; every byte is then read once
    copy   bf16, in memory of its own
    train  float32 masters, in memory of its own
    clear, clear32   nothing is read: memory of the size of `copy` and of `train` is taken and set to zero; what any
           loading into memory takes at least

Prints one JSON line for each round, then the medians. Peak memory is over the start, against the rank's own part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = {
    "map": ("bfloat16", False),
    "copy": ("bfloat16", True),
    "train": ("float32", True),
    "clear": ("bfloat16", True),
    "clear32": ("float32", True),
}


def make_checkpoint(folder: Path, layers: int) -> None:
    """Two shards of random weights in Meta's layout."""
    import torch

    from llama_acc.core.model.config import ModelConfig
    from llama_acc.core.model.transformer import shapes_of, split_dimension

    config = ModelConfig(5120, layers, 40, 40, 32000, 256)
    folder.mkdir(parents=True)
    for rank in range(2):
        weights = {
            name: torch.randn([n // 2 if i == split_dimension(name) else n for i, n in enumerate(shape)])
            .mul_(0.02)
            .bfloat16()
            for name, shape in shapes_of(config).items()
        }
        torch.save(weights, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(config.to_params()))


def status(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def load(folder: Path, way: str, rank: int) -> None:
    """One rank: says that it is ready, waits for a line, loads, tells time and memory."""
    import torch
    from torch import nn

    from llama_acc.core.checkpoint.layout import inspect, read_config
    from llama_acc.core.checkpoint.load import check_tensors, fill, read_weights
    from llama_acc.core.distributed.groups import Parallel
    from llama_acc.core.model.transformer import build_on_meta, shapes_of

    torch.set_num_threads(1)
    name, copy = WAYS[way]
    dtype = getattr(torch, name)
    layout = inspect(folder)
    config = read_config([layout])
    assert config is not None
    model = build_on_meta(config, dtype, Parallel(model_rank=rank, model_size=2)).requires_grad_(False)
    print("ready", flush=True)
    sys.stdin.readline()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    weights = read_weights([layout], rank, 2)
    check_tensors(weights, shapes_of(config), folder)
    if way.startswith("clear"):
        for parameter in weights.tensors:
            owner, _, leaf = parameter.rpartition(".")
            zeros = torch.empty(weights.tensors[parameter].shape, dtype=dtype)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(zeros.zero_(), requires_grad=False))
    else:
        fill(model, weights, torch.device("cpu"), dtype, copy)
    loaded = time.perf_counter() - start
    if way == "map":
        for parameter in model.parameters():
            parameter.detach().view(-1).view(torch.int64).sum()
    seconds, peak = time.perf_counter() - start, status("VmHWM") - before
    own = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"loaded": loaded, "seconds": seconds, "peak": peak, "own": own}))


def both_ranks(folder: Path, way: str) -> dict[str, float]:
    """The later rank's times, and the higher peak over the own part."""
    command = [sys.executable, __file__, "--folder", str(folder), "--one", way, "--rank"]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    results = [json.loads(rank.communicate()[0]) for rank in ranks]
    return {
        "loaded": max(result["loaded"] for result in results),
        "seconds": max(result["seconds"] for result in results),
        "peak_over_part": max(result["peak"] / result["own"] for result in results),
    }


def cat(files: list[Path]) -> float:
    """Seconds that `cat` of the files to /dev/null takes."""
    start = time.perf_counter()
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of loading two shards on two ranks.")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "llama-acc-benchmarks" / "13B-wide"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        load(args.folder, args.one, args.rank)
        return
    if not (args.folder / "params.json").exists():
        make_checkpoint(args.folder, args.layers)
    files = sorted(args.folder.glob("*.pth"))
    cat(files)  # into the page cache
    rounds = []
    for _ in range(args.rounds):
        for way in WAYS:
            rounds.append({"way": way, "cat": cat(files), **both_ranks(args.folder, way)})
            print(json.dumps(rounds[-1]), flush=True)
    for way in WAYS:
        own = [line for line in rounds if line["way"] == way]
        medians = {key: statistics.median(line[key] for line in own) for key in own[0] if key != "way"}
        ratio = statistics.median(line["seconds"] / line["cat"] for line in own)
        print(json.dumps({"way": way, "ratio_to_cat": ratio, **medians}))


if __name__ == "__main__":
    main()
