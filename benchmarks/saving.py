"""What a checkpoint costs a training run: written while training goes on, and written while it waits, in turns.

    OMP_NUM_THREADS=1 python benchmarks/saving.py [--rounds 3] [--steps 24] [--every 8] [--width 768]

A model of random weights (52M parameters at width 768) trains on the quickstart's data in one process, in float32, and
saves every few steps. `stall` is what one save keeps the training loop waiting: the call itself, and the wait for the
copy before the next update. `whole` is the run's time from its first step to its last. The last save of a run is left
out: nothing goes on beside it. Prints one JSON line for each run, then the medians.
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
from typing import Any


def one_run(way: str, steps: int, every: int, width: int) -> dict[str, Any]:
    """Trains once; way is "none", "synchronous" or "asynchronous"."""
    import torch

    from llama_acc import Recipe, finetune
    from llama_acc.core.checkpoint.save import Saver
    from llama_acc.core.train.loop import Loop

    stalls: list[float] = []
    save, wait = Loop._save, Saver.wait_for_copy
    marks: list[float] = []

    def timed_save(self: Loop, at_once: bool) -> None:
        start = time.perf_counter()
        save(self, at_once)
        if not at_once:
            stalls.append(time.perf_counter() - start)

    def timed_wait(self: Saver) -> None:
        start = time.perf_counter()
        wait(self)
        if stalls:
            stalls[-1] += time.perf_counter() - start
        marks.append(time.perf_counter())

    Loop._save, Saver.wait_for_copy = timed_save, timed_wait  # type: ignore[method-assign]
    torch.set_num_threads(1)
    shape = {"dim": width, "n_layers": 8, "n_heads": 8, "vocab_size": 640, "multiple_of": 256, "max_seq_len": 256}
    overrides = [
        f"train.max_steps={steps}",
        f"checkpoint.every_epochs={every // 4 if way != 'none' else 0}",  # an epoch of this data is four steps
        f"checkpoint.asynchronous={'true' if way == 'asynchronous' else 'false'}",
        "checkpoint.keep=2",
        f"model.params={json.dumps(shape)}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        finetune(Recipe.load("quickstart", overrides), Path(folder) / "run", device="cpu")
        sizes = [path.stat().st_size for path in (Path(folder) / "run").glob("epoch*/**/*") if path.is_file()]
        count = len(list((Path(folder) / "run").glob("epoch*")))
    return {
        "way": way,
        "saves": len(stalls),
        "stall": statistics.median(stalls) if stalls else 0.0,
        "whole": marks[-1] - marks[0],
        "gigabytes": sum(sizes) / count / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a checkpoint costs a training run.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_run(args.one, args.steps, args.every, args.width)))
        return
    rounds = []
    for _ in range(args.rounds):
        for way in ("none", "synchronous", "asynchronous"):
            options = [f"--{name}={getattr(args, name)}" for name in ("steps", "every", "width")]
            done = subprocess.run(
                [sys.executable, __file__, "--one", way, *options], capture_output=True, text=True, check=True
            )
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rounds[-1]), flush=True)
    middle = {
        way: {key: statistics.median(line[key] for line in rounds if line["way"] == way) for key in ("stall", "whole")}
        for way in ("none", "synchronous", "asynchronous")
    }
    print(json.dumps(middle))
    print(json.dumps({"stall_ratio": middle["asynchronous"]["stall"] / middle["synchronous"]["stall"]}))


if __name__ == "__main__":
    main()
