#!/usr/bin/env bash
# peft 0.21: modules_to_save=["norm"] trains and saves every module whose name ends with these letters.
#
# Expected: "norm" is the model's last norm, model.norm: target_modules, in the same LoraConfig, takes a whole name or what
#   ends with "." and the name, so target_modules=["proj"] finds nothing in a Qwen3 and is refused.
# Seen: modules_to_save asks for the letters alone. input_layernorm, post_attention_layernorm, q_norm and k_norm of each
#   block are copied, trained and saved too, without a word; ["head"] takes lm_head.
# What follows: a run trains more than it was told, which adapter_config.json does not show, and a comparison of what
#   training one module does is of something else. Write ["model.norm"], and list the parameters that require gradients.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2 2>&1 |
    grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" -W ignore - "$folder" 2> "$folder/log" <<'PYTHON' || { tail -3 "$folder/log"; exit 1; }
import json
import sys
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

print("peft", peft.__version__)
config = Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
)  # fmt: skip


def changed_and_saved(name):
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(config)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    lora = LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=[name], task_type="CAUSAL_LM")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = get_peft_model(base, lora)
    told = [str(one.message) for one in warned if "modules_to_save" in str(one.message)]
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    tokens = torch.randint(0, 64, (4, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    folder = Path(sys.argv[1], name)
    model.save_pretrained(folder)
    saved = {key.removeprefix("base_model.model.") for key in load_file(folder / "adapter_model.safetensors")}
    # By hand: what differs from the base after one step, the matrices that LoRA adds to left out.
    after = model.merge_and_unload().state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key]) and "v_proj" not in key}
    listed = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    print(f'modules_to_save={listed}: trained {", ".join(sorted(changed))}')
    return changed, {key for key in saved if "lora" not in key}, told


blocks = {
    f"model.layers.{number}.{name}.weight"
    for number in range(2)
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
}
named = {"model.norm.weight"}
as_seen = changed_and_saved("norm") == (named | blocks, named | blocks, [])
as_seen = as_seen and changed_and_saved("model.norm") == (named, named, [])
as_seen = as_seen and changed_and_saved("head") == ({"lm_head.weight"}, {"lm_head.weight"}, [])
try:
    get_peft_model(Qwen3ForCausalLM(config), LoraConfig(target_modules=["proj"]))
    as_seen = False
except ValueError as error:
    print('target_modules=["proj"]:', str(error)[:50])
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
