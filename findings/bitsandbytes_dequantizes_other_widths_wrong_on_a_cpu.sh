#!/usr/bin/env bash
# bitsandbytes 0.50: on a CPU, a 4-bit matrix whose width is no multiple of the block size is read back wrong, in silence.
#
# Expected: a matrix comes back from `dequantize_4bit` within the rounding of its 4 bits, whatever its width: blocks of 64
#   values run through all of it, row after row, and `quantize_4bit` made the same bytes as for one long row.
# Seen: with a width of 96, the mean error is more than twice that of the same bytes read as one long row, and `Linear4bit`
#   computes with the wrong matrix: the scales of row i are looked for as if a row had `width // 64` blocks. A width of 128
#   is right.
# What follows: tell `dequantize_4bit` that the matrix is one row (QuantState.shape = 1, n), and reshape what it gives.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit

torch.manual_seed(0)
errors = {}
for width in (128, 96):
    matrix = torch.randn(64, width)
    codes, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    row_codes, row_state = quantize_4bit(matrix.reshape(1, -1), blocksize=64, quant_type="nf4")
    assert torch.equal(codes, row_codes) and torch.equal(state.absmax, row_state.absmax)
    as_row = dequantize_4bit(row_codes, row_state).reshape(matrix.shape)
    layer = Linear4bit(width, 64, bias=False, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict({"weight": matrix})
    inputs = torch.randn(8, width)
    errors[width] = {
        "matrix": (dequantize_4bit(codes, state) - matrix).abs().mean().item(),
        "one row": (as_row - matrix).abs().mean().item(),
        "layer": (layer.to("cpu")(inputs) - inputs @ as_row.T).abs().max().item(),
    }
    print(width, {name: round(error, 3) for name, error in errors[width].items()})
right, wrong = errors[128], errors[96]
as_seen = right["matrix"] == right["one row"] and wrong["matrix"] > 2 * wrong["one row"]
as_seen = as_seen and right["layer"] < 0.01 and wrong["layer"] > 1
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
