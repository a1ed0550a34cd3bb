#!/usr/bin/env bash
# safetensors 0.8: numpy arrays that are transposed or strided are saved with other values, without an error.
#
# One would expect: save and load give the array back, as 0.7 does, or an error, as safetensors.torch raises.
# What happens: 0.8.0 writes the bytes from the array's first address on under its shape: of [[0, 1, 2], [3, 4, 5]]
# transposed, [[0, 1], [2, 3], [4, 5]] comes back, and of every second column the wrong ones. (Reported as issue 825.)
# Names, types and shapes are right, so a converter that transposes matrices makes a checkpoint that every check of
# shapes passes and no model answers from.
# What follows: give safetensors.numpy np.ascontiguousarray(x), and compare values after a conversion, not shapes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
for version in 0.7.0 0.8.0; do
    "$folder/venv/bin/pip" install -q "safetensors==$version" numpy==2.4.6
    "$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

whole = np.arange(6, dtype=np.float32).reshape(2, 3)
right = {}
for name, array in {"transposed": whole.T, "every second column": whole[:, ::2], "whole": whole}.items():
    back = load(save({"a": array}))["a"]
    right[name] = bool((back == array).all())
    print(f"safetensors {safetensors.__version__}, {name}: {array.tolist()} came back as {back.tolist()}")
expected = [True] * 3 if safetensors.__version__ == "0.7.0" else [False, False, True]
as_seen = list(right.values()) == expected
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
done
