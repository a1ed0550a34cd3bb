#!/usr/bin/env bash
# transformers 5: SmolLM3's `use_sliding_window: false` does not switch off the windows that `layer_types` names, or
#   only for some ways of attention.
#
# Expected: as the key says, with it false no layer has a window: the logits are those of full attention. So
#   it is with Qwen2, whose configuration takes `sliding_window` away.
# Seen: the mask is made by `layer_types` alone, so "eager" and "sdpa" compute with the window. Each such layer itself
#   was told that it has none (`self_attn.sliding_window` is None), and that is what ways without a mask are given.
# What follows: one config.json is two models, by the way attention is computed. A program that reads the key as it is
#   meant gets other logits than `from_pretrained` gives on a CPU; who writes the file should leave `layer_types` out,
#   or write "full_attention" for all layers.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import sys

import torch
import transformers
from transformers import Qwen2Config, SmolLM3Config, SmolLM3ForCausalLM

print("transformers", transformers.__version__)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
tokens = torch.arange(3, 43)[None]


def logits(kinds: list[str], use: bool, way: str) -> tuple[torch.Tensor, object]:
    config = SmolLM3Config(
        **sizes, num_hidden_layers=2, layer_types=kinds, sliding_window=8, use_sliding_window=use,
        initializer_range=0.3, pad_token_id=0,
    )
    config._attn_implementation = way
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(config).eval()
    with torch.no_grad():
        return model(tokens).logits, model.model.layers[0].self_attn.sliding_window


windows, full = ["sliding_attention"] * 2, ["full_attention"] * 2
as_seen = True
for way in ("eager", "sdpa"):
    off, of_layer = logits(windows, False, way)
    on, _ = logits(windows, True, way)
    none, _ = logits(full, False, way)
    to_on, to_none = (off - on).abs().max().item(), (off - none).abs().max().item()
    print(f"{way}: switched off, {to_on:.6f} from switched on, {to_none:.3f} from full attention; the layer has {of_layer}")
    as_seen = as_seen and to_on == 0 and to_none > 0.1 and of_layer is None
qwen = Qwen2Config(**sizes, num_hidden_layers=2, sliding_window=8, use_sliding_window=False)
print("Qwen2's sliding_window, switched off:", qwen.sliding_window)
as_seen = as_seen and qwen.sliding_window is None
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
