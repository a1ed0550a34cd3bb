#!/usr/bin/env bash
# transformers 5: position_ids that start again keep packed documents apart only without a cache and without a mask.
#
# Expected: two documents are laid end to end in one row, and position_ids start again at 0 with the second. It gets the
#   logits that it gets alone, as the library looks for such starts and masks attention across them.
# Seen: so it is with use_cache=False and no attention_mask. With the default of a LLaMA, use_cache=True, or with a mask
#   of ones, which tokenizers and most collators give, the second document attends to the first: no warning, and the
#   logits are as far off as the whole of them is large, with the eager attention and with sdpa. Trainer sets
#   use_cache=False; a training loop of one's own, and a perplexity computed by hand, do not.
# What follows: give use_cache=False and leave attention_mask out where rows are packed, and compare the loss of a packed
#   row with that of its documents, each alone.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__)
first, second = torch.arange(3, 9)[None], torch.arange(20, 25)[None]
packed = torch.cat([first, second], dim=1)
positions = torch.tensor([[*range(6), *range(5)]])
ones = torch.ones_like(packed)
ways = {
    "no cache, no mask": {"use_cache": False},
    "no mask": {},
    "no cache, a mask of ones": {"use_cache": False, "attention_mask": ones},
}
as_seen = True
for attention in ("eager", "sdpa"):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=2, initializer_range=0.3, attn_implementation=attention)
    model = LlamaForCausalLM(config)
    alone = model(second).logits
    # By hand: the documents' own mask, added to the scores, and the row's positions.
    apart = torch.full((11, 11), float("-inf")).triu(1)
    apart[6:, :6] = float("-inf")
    by_hand = model(packed, position_ids=positions, attention_mask=apart[None, None], use_cache=False).logits[:, 6:]
    off = {"by hand": (by_hand - alone).abs().max().item()}
    for way, arguments in ways.items():
        logits = model(packed, position_ids=positions, **arguments).logits[:, 6:]
        off[way] = (logits - alone).abs().max().item()
    print(attention, {way: f"{value:.6f}" for way, value in off.items()}, f"logits to {alone.abs().max():.1f}")
    as_seen = as_seen and [value > 1 for value in off.values()] == [False, False, True, True]
    as_seen = as_seen and max(off["by hand"], off["no cache, no mask"]) < 1e-4
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
