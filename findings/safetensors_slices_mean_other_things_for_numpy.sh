#!/usr/bin/env bash
# safetensors 0.8: a slice of a tensor in a file that PyTorch is given is an error for numpy, of three kinds.
#
# Expected: `safe_open(file, framework).get_slice(name)[...]` reads the same rows for "pt" and for "np", with the meaning a
#   slice has in both libraries: bounds beyond the end are cut, negative ones count from it, an empty range is empty.
# Seen: for "pt" so it is. For "np" `[2:99]` of four rows is a SafetensorError, `[-2:]` an OverflowError and `[3:1]` a
#   SystemError, while `[-1]` and `[::2]` work.
# What follows: a reader of shards that was tested with torch fails with numpy where the last shard is shorter: bring
#   bounds into the range by hand (`slice.indices`), and leave out empty ranges.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6 torch==2.13.0 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - "$folder/rows.safetensors" <<'PYTHON'
import sys

import numpy
from safetensors import safe_open
from safetensors.numpy import save_file

rows = numpy.arange(24, dtype=numpy.float32).reshape(4, 6)
save_file({"rows": rows}, sys.argv[1])
asked = {"[-1]": -1, "[::2]": slice(None, None, 2), "[2:99]": slice(2, 99), "[-2:]": slice(-2, None), "[3:1]": slice(3, 1)}
seen = {}
for framework in ("pt", "np"):
    with safe_open(sys.argv[1], framework) as file:
        for text, index in asked.items():
            try:
                same = numpy.array_equal(numpy.asarray(file.get_slice("rows")[index]), rows[index])
                seen[framework, text] = "as numpy" if same else "something else"
            except Exception as error:
                seen[framework, text] = type(error).__name__
            print(framework, text, seen[framework, text])
as_seen = all(seen["pt", text] == "as numpy" for text in asked) and [seen["np", text] for text in asked] == [
    "as numpy", "as numpy", "SafetensorError", "OverflowError", "SystemError",
]
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
