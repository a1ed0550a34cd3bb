"""Exporting a 2.2 GB bf16 checkpoint (1.1 billion parameters, random), and copying its files, in turns.

    python benchmarks/exporting.py --tokenizer tokenizer.model [--to hf] [--folder DIR] [--rounds 4]

A round is a copy, then an export, each in a process of its own; which goes first changes from round to round. The copy
is `shutil.copyfile` of every file, and fsync of what was written; the export is all of `convert`: written, synced, read
back, compared and hashed. Importing torch is not counted. The source is in the page cache, what was written is deleted
between the turns. Memory is the largest anonymous resident memory of the process during the export over that before,
sampled every 0.1 s: pages of mapped files, which the system takes back when it wants to, are not counted. Just before
its turn each process makes a copy and removes it: a virtual machine may have to ask its host for memory, which takes
several times as long as writing to it, and gives what is free for some seconds back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from loading import make_checkpoint


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    with open("/proc/self/status") as file:
        sizes = {line.split(":")[0]: line.split()[1] for line in file if line.startswith("Rss")}
    return 1024 * (int(sizes["RssAnon"]) + int(sizes["RssShmem"]))


def copy(source: Path, target: Path) -> None:
    """As `cp` and `sync` do."""
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
    for path in (*target.iterdir(), target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(name: str, source: Path, target: Path, to: str) -> dict:
    """One copy or export."""
    from llama_acc.core.checkpoint.convert import Request, convert

    copy(source, target)
    shutil.rmtree(target)
    before, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if name == "copy":
        copy(source, target)
    else:
        convert(Request(source, target, to))  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"name": name, "seconds": seconds, "own_gb": max(0, peak - before) / 1e9}


def main() -> None:
    """Measures in turns, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--to", default="hf")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "llama-acc-benchmarks" / "1.1B")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    target = args.folder.with_name("exported")
    if args.one:
        print(json.dumps(measure(args.one, args.folder, target, args.to)))
        return
    if not (args.folder / "params.json").exists():
        make_checkpoint(args.folder, args.tokenizer)
    found: dict[str, list[dict]] = {"copy": [], "export": []}
    for number in range(args.rounds):
        for name in ("copy", "export") if number % 2 == 0 else ("export", "copy"):
            for path in args.folder.iterdir():  # into the page cache
                with path.open("rb") as file:
                    while file.read(1 << 24):
                        pass
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            command = [sys.executable, __file__, "--tokenizer", str(args.tokenizer), "--folder", str(args.folder)]
            command += ["--to", args.to, "--one", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(done.stdout))
            print(done.stdout.strip(), flush=True)
    shutil.rmtree(target, ignore_errors=True)
    copied, exported = (statistics.median(one["seconds"] for one in found[name]) for name in ("copy", "export"))
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(found["copy"], found["export"], strict=True)]
    print(
        f"copy {copied:.2f} s, export {exported:.2f} s; speed of the export over that of the copy, by rounds: "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}, median {statistics.median(ratios):.2f}; "
        f"memory of its own {max(one['own_gb'] for one in found['export']):.2f} GB"
    )


if __name__ == "__main__":
    main()
