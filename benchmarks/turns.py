"""Wall and CPU time of one command with several trees of this package, in turns (A B A B).

    python benchmarks/turns.py --trees ../old . -- -m llama_acc --help
    python benchmarks/turns.py --trees ../old . --encode lima.json tokenizer.model

What follows `--` is what Python is given. `--encode` reads, checks and encodes a file of dialogues with a tokenizer.
Every run has a LLAMA_ACC_HOME of its own, so nothing is found in the token cache. Prints a line of JSON for each tree:
medians, and the smallest wall time, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ENCODE = """
import sys
from llama_acc.core.data.sources import Source
from llama_acc.core.tokenizer import load_tokenizer
try:
    from llama_acc.core.data.dataset import load_dataset
except ImportError:  # as it was called until 2026-11-29
    from llama_acc.core.data.load import load_dataset
load_dataset([Source(sys.argv[1], "dialogue", "auto")], load_tokenizer(sys.argv[2]), 2048, seed=0)
"""


def once(tree: Path, words: list[str]) -> tuple[float, float]:
    """Seconds of wall and of CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "PYTHONPATH": str(tree.absolute()), "LLAMA_ACC_HOME": home}
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], env=environment, cwd=home, stdout=subprocess.DEVNULL, check=True)
        seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trees", type=Path, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--encode", type=Path, nargs=2, metavar=("DATA", "TOKENIZER"))
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args()
    words = arguments.words
    if arguments.encode:
        words = ["-c", ENCODE, *(str(path.absolute()) for path in arguments.encode)]
    runs = [[once(tree, words) for tree in arguments.trees] for _ in range(arguments.rounds)]
    for tree, of_tree in zip(arguments.trees, zip(*runs, strict=True), strict=True):
        wall, cpu = zip(*of_tree, strict=True)
        figures = {"wall": median(wall), "least": min(wall), "CPU": median(cpu)}
        print(json.dumps({"tree": str(tree), **{name: round(value, 3) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
