#!/usr/bin/env bash
# peft 0.21: a trained adapter that began as "pissa_niter_4" gives other logits each time it is read.
#
# Expected: PiSSA takes the largest singular vectors out of a matrix, trains them, and saves them; from_pretrained does
#   "SVD again", as peft's example of just this init_lora_weights says, so that the rest is what training had.
# Seen: "pissa_niter_N" is torch.svd_lowrank, which begins with random numbers. Another seed when reading, and what is
#   taken out is not what was: the rest differs, A and B are put on it, and nothing is said. With "pissa" it is right.
#   With the rest of the training, or its seed, "pissa_niter_4" is right too.
# What follows: the model that is evaluated or merged is not the one that was trained: on these random weights, logits are
#   off by nearly as much as training moved them. Train with "pissa", or save with path_initial_model_for_weight_conversion.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2 2>&1 |
    grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" -W ignore - "$folder" 2> "$folder/log" <<'PYTHON' || { tail -3 "$folder/log"; exit 1; }
import copy
import sys
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", peft.__version__)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
base = LlamaForCausalLM(config).eval()
tokens = torch.randint(0, 64, (8, 16))
targets = ("q_proj", "v_proj", "up_proj")


@torch.no_grad()
def logits(model):
    return model.eval()(tokens).logits


def far(one, other):
    return (one - other).abs().max().item()


results = {}
for start in ("pissa", "pissa_niter_4"):
    torch.manual_seed(1)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=list(targets), init_lora_weights=start, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), lora)
    untrained = far(logits(model), logits(base))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    for _ in range(10):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model)
    by_training = far(trained, logits(base))
    folder = Path(sys.argv[1], start)
    model.save_pretrained(folder)
    off = {}
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            read = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        told = [str(one.message) for one in warned if "pissa" in str(one.message).lower()]
        off[seed] = far(logits(read), trained)
        print(f"{start}, read with seed {seed}: logits {off[seed]:.1e} off, training moved them by {by_training:.1e}")
    # By hand: the rest that training had plus B A (alpha / rank is 1) as the weights of a plain LLaMA.
    saved, plain = load_file(folder / "adapter_model.safetensors"), copy.deepcopy(base)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if name.endswith(targets):
                rest = model.get_submodule(f"base_model.model.{name}").base_layer.weight
                a, b = (saved[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
                module.weight.copy_(rest + b @ a)
    by_hand = far(logits(plain), trained)
    print(f"{start}, the adapter's file on the rest that training had: {by_hand:.1e} off")
    exact = untrained < 1e-5 and by_hand < 1e-5 and off[1] < 1e-5 and not told
    results[start] = (exact, max(off[2], off[3]) > 0.05 * by_training, max(off[2], off[3]) < 1e-5)
as_seen = results == {"pissa": (True, False, True), "pissa_niter_4": (True, True, False)}
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
