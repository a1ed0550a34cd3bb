#!/usr/bin/env bash
# transformers 5: adding `rope_scaling` to a config.json that transformers 5 wrote resets the rotary base to 10,000.
#
# Expected: config.json has rope_parameters = {"rope_type": "default", "rope_theta": 1000000.0}, as transformers 5 saves
#   Code Llama. A user adds the documented key of older versions, rope_scaling = {"type": "linear", "factor": 2.0}, to
#   stretch the context. The factor is added; the base stays at 1,000,000.
# Seen: rope_scaling replaces all of rope_parameters. The base is in there, so it falls back to the class's default,
#   10,000, without a warning. transformers 4 does not read rope_parameters: there the base is 10,000 in both cases.
# What follows: write the factor into rope_parameters, beside rope_theta; or say rope_theta in rope_scaling, too. A reader
#   of such files has to do as transformers does, and should say that the two disagree.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers

folder = Path(sys.argv[1])
print("transformers", transformers.__version__)


def read(name, **keys):
    values = json.loads(json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4} | keys))
    (folder / "config.json").write_text(json.dumps(values))
    rope = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    print(f"{name}: {rope}")
    return rope


saved = {"rope_type": "default", "rope_theta": 1000000.0}
before = read("rope_parameters alone", rope_parameters=saved)
after = read("rope_scaling added", rope_parameters=saved, rope_scaling={"type": "linear", "factor": 2.0})
inside = read("factor in rope_parameters", rope_parameters=saved | {"rope_type": "linear", "factor": 2.0})
as_seen = (before["rope_theta"], after["rope_theta"], inside["rope_theta"]) == (1e6, 1e4, 1e6)
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
