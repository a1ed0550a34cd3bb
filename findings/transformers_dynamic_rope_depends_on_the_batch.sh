#!/usr/bin/env bash
# transformers 5: with rotary scaling "dynamic", a short prompt's logits depend on the longest prompt beside it.
#
# Expected: a row of a batch gets the logits that it gets alone, whatever is padded beside it, and a text's logits are the
#   same whether it is read at once or token by token with the cache. So it is with "default" and "yarn".
# Seen: the base is chosen once for the whole batch, by its longest row, padding and all: a prompt within the original
#   context, for which nothing is to be scaled, is turned by another base as soon as one beside it is longer. In
#   generation it grows with each token, while the keys in the cache stay turned by the bases of before: the logits are
#   of no length's base, and the text that is generated is another one than without the cache.
# What follows: answers and losses change with the batch size and with what else is in the batch, and training, which
#   reads at once, does not teach what generation computes. Use "yarn" or "linear"; with "dynamic", batches of one.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__)
short, long = torch.arange(3, 11), torch.arange(3, 43)
beside = torch.stack([torch.cat([short, short.new_zeros(32)]), long])  # the short one is padded on its right
mask = torch.ones_like(beside)
mask[0, 8:] = 0
as_seen = True
for kind in ("default", "yarn", "dynamic"):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    rope = {key: rope[key] for key in (list(rope)[:2] if kind == "default" else list(rope))}
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    longest = 32 if kind == "yarn" else 16
    config = LlamaConfig(
        **sizes, num_hidden_layers=2, initializer_range=0.3, max_position_embeddings=longest, rope_parameters=rope
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        alone = model(short[None]).logits[0]
        in_batch = (model(beside, attention_mask=mask).logits[0, :8] - alone).abs().max().item()
        cache, steps = None, []
        for token in long:
            out = model(token[None, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, 0])
        by_token = (torch.stack(steps)[-1] - model(long[None]).logits[0, -1]).abs().max().item()
    print(f"{kind:8} beside a longer row: {in_batch:.5f} off; token by token: {by_token:.5f}")
    changes = (in_batch > 0.5, by_token > 0.5) if kind == "dynamic" else (in_batch > 1e-3, by_token > 1e-3)
    as_seen = as_seen and changes == ((True, True) if kind == "dynamic" else (False, False))
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
