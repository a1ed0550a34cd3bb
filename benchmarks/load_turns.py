"""Loading and a first answer with this tree and an older one, in turns, on one 0.5 GB checkpoint (random, page cache).

    git worktree add --detach /tmp/old d1b9af8
    python benchmarks/load_turns.py --old /tmp/old --tokenizer tokenizer.model [--turns 6]

Each turn is a process of its own for each tree, which imports that tree's package; which goes first changes from turn
to turn. Three times are taken: `load_model`, that with an answer of one token (which reads every weight), and the whole
of `llama-acc chat --prompt` by the clock, its start included. The medians of new over old are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARAMS = {"dim": 1024, "n_layers": 12, "n_heads": 16, "n_kv_heads": 4, "vocab_size": 32000, "multiple_of": 256}
MEASURE = """
import json, sys, time
import torch
from llama_acc import generate, load_model
start = time.perf_counter()
loaded = load_model(sys.argv[1], device="cpu")
seconds = time.perf_counter() - start
generate(loaded, "Hello", max_new_tokens=1)
print(json.dumps([seconds, time.perf_counter() - start]))
"""
NAMES = ("load", "load and first token", "chat --prompt")


def make_checkpoint(folder: Path, tokenizer: Path, dtype: str) -> None:
    """Random weights in Meta's layout, half a gigabyte of them."""
    import shutil

    import torch

    from llama_acc.core.model.config import config_from_params
    from llama_acc.core.model.transformer import shapes_of

    kind = getattr(torch, dtype)
    params = {**PARAMS, "n_layers": PARAMS["n_layers"] if kind.itemsize == 2 else 5}
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: torch.randn(shape).mul_(0.02).to(kind) for name, shape in shapes_of(config_from_params(params)).items()
    }
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(tokenizer, folder / "tokenizer.model")


def measure(tree: Path, folder: Path) -> list[float]:
    """The three times with one tree's package."""
    variables = {**os.environ, "PYTHONPATH": str(tree)}
    # Not from a folder with a package of the same name in it.
    where = folder.parent
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], env=variables, cwd=where, stdout=subprocess.PIPE, check=True
    )
    chat = ["chat", "--ckpt", str(folder), "--device", "cpu", "--prompt", "Hello", "--max-new-tokens", "1"]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "llama_acc", *chat], env=variables, cwd=where, stdout=subprocess.DEVNULL, check=True
    )
    return [*json.loads(done.stdout), time.perf_counter() - start]


def main() -> None:
    """Measures in turns, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="the older tree")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32"])
    args = parser.parse_args()
    new = Path(__file__).resolve().parents[1]
    for dtype in args.types:
        folder = Path(tempfile.gettempdir()) / "llama-acc-benchmarks" / f"half-{dtype}"
        if not (folder / "params.json").exists():
            make_checkpoint(folder, args.tokenizer, dtype)
        trees = {"new": new, "old": args.old.resolve()}
        found: dict[str, list[list[float]]] = {"new": [], "old": []}
        for turn in range(args.turns + 1):
            for name in ("new", "old") if turn % 2 else ("old", "new"):
                found[name].append(measure(trees[name], folder))
        print(f"{dtype}, {(folder / 'consolidated.00.pth').stat().st_size / 1e9:.2f} GB, {args.turns} turns:")
        for place, what in enumerate(NAMES):  # the first turn warms the page cache
            times = {name: [one[place] for one in found[name][1:]] for name in found}
            ratios = [a / b for a, b in zip(times["new"], times["old"], strict=True)]
            print(
                f"  {what}: new {statistics.median(times['new']):.2f} s, old {statistics.median(times['old']):.2f} s, "
                f"new over old {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
