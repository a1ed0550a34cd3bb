#!/usr/bin/env bash
# transformers 5: weights that are saved in shards into a folder with model.safetensors are not those that are read.
#
# Expected: `save_pretrained(folder, max_shard_size=...)` into a folder that has a model replaces it, as it does the other
#   way round, where the shards are deleted; `from_pretrained(folder)` gives what was saved last.
# Seen: model.safetensors stays beside the shards and their index, and from_pretrained prefers it: the model from before,
#   without a word. The other way round, model.safetensors.index.json stays and names shards that are no longer there.
# What follows: a model that was tuned and saved over its base (which is one file, as version 5 writes up to 50 GB)
#   answers as if it had not been trained. Programs that go by the index read the new weights, so two that read the same
#   folder differ. Save into an empty folder.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'PYTHON' || { tail -3 "$folder/log"; exit 1; }
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
model, name = LlamaForCausalLM(config), "model.norm.weight"
results = {}
for first, second in (("1GB", "20KB"), ("20KB", "1GB")):
    folder = Path(sys.argv[1], first)
    for value, size in ((1.0, first), (2.0, second)):
        torch.nn.init.constant_(model.model.norm.weight, value)
        model.save_pretrained(folder, max_shard_size=size)
    read = LlamaForCausalLM.from_pretrained(folder).model.norm.weight[0].item()
    named = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    of_index = load_file(folder / named)[name][0].item() if (folder / named).exists() else None
    results[first, second] = (read, of_index)
    print(f"saved 1.0 in files of {first}, then 2.0 of {second}: read {read}; by the index {of_index}")
    print("  ", ", ".join(sorted(path.name for path in folder.glob("*.safetensors*"))))
as_seen = results == {("1GB", "20KB"): (1.0, 2.0), ("20KB", "1GB"): (2.0, None)}
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
