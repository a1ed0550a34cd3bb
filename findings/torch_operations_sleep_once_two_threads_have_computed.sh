#!/usr/bin/env bash
# torch 2.13 on a CPU: once two of a program's threads have computed, each operation of either ends with a sleep.
#
# Expected: a model that is loaded in the main thread and generates in another, as servers do, generates as fast as in the
#   main thread: only one of them computes at a time.
# Seen: with as many OpenMP threads as cores, all operations in the second thread wake and stop its helpers through the
#   kernel: thousands of context switches for 2,000 small sums, where the main thread alone had next to none. libgomp
#   counts the helpers of all threads, the idle ones too; with more of them than cores, it spins a three-hundredth as long.
#   A 135M model's tokens took 1.25 times as long.
# What follows: load and compute in one thread; or end the helpers of the thread that is done, by OpenMP 5's
#   omp_pause_resource_all in the libgomp that torch has brought. GOMP_SPINCOUNT does not lengthen the short wait.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>&1 | grep -v "^WARNING\|notice" || true

OMP_NUM_THREADS=$(nproc) "$folder/venv/bin/python" - <<'PYTHON'
import ctypes
import resource
import sys
import threading

import torch

numbers = torch.ones(1 << 17)
sleeps = {}


def compute(name: str) -> None:
    for turn in ("start", name):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        for _ in range(2000):
            numbers.add_(1)
        sleeps[turn] = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before


def in_thread(name: str) -> None:
    thread = threading.Thread(target=compute, args=(name,))
    thread.start()
    thread.join()


if torch.get_num_threads() == 1:
    sys.exit("one core has no helpers: run it where there are more")
compute("main thread")
in_thread("a second thread")
ctypes.CDLL(None).omp_pause_resource_all(1)
in_thread("a second thread, helpers of the first ended")
del sleeps["start"]
for name, count in sleeps.items():
    print(f"{count:6} voluntary context switches: {name}")
alone, second, ended = sleeps.values()
as_seen = second > 1000 and alone < second / 4 and ended < second / 4
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
