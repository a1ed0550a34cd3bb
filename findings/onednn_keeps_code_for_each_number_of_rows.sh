#!/usr/bin/env bash
# torch 2.13, oneDNN: a bfloat16 product on a CPU keeps 0.7 MB for each number of rows that it is ever asked for.
#
# Expected: a matrix of 1536 x 576 times 2 to 257 rows needs memory for one product at a time.
# Seen: resident memory grows by 176 MB over these 256 products, and stays; asking for the same numbers again adds nothing.
#   Each number of rows has its own compiled primitive in oneDNN's cache (1,024 entries, then the oldest goes), for each
#   shape of a matrix. float32, which torch gives to MKL, adds nothing. Only where the processor has AVX-512.
# What follows: a server whose batches and prompts have any length grows by hundreds of MB, as if it leaked: pad rows to a
#   few numbers. ONEDNN_PRIMITIVE_CACHE_CAPACITY=N keeps fewer, and compiles again.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - <<'PYTHON'
import re
import sys

import torch


def resident() -> float:
    with open("/proc/self/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1024


torch.set_num_threads(1)
grown = {}
with torch.inference_mode():
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(1536, 576).to(dtype)
        torch.nn.functional.linear(torch.randn(300, 576).to(dtype), weight)
        for turn in ("first", "second"):
            before = resident()
            for rows in range(2, 258):
                torch.nn.functional.linear(torch.randn(rows, 576).to(dtype), weight)
            grown[str(dtype), turn] = round(resident() - before, 1)
print(torch.__version__, grown)
few, many = grown["torch.float32", "first"], grown["torch.bfloat16", "first"]
as_seen = few < 20 and many > 100 and grown["torch.bfloat16", "second"] < 20
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
