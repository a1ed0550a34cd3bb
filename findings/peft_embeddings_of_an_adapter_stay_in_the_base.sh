#!/usr/bin/env bash
# peft 0.21: embeddings in an adapter's file go into the base: they stay when it is deleted, and are not saved again.
#
# Expected: save_pretrained(save_embedding_layers=True) puts trained embeddings into the adapter, and they are its own:
#   with disable_adapter() the base is as before, another adapter computes as it does alone, and what was read is saved.
# Seen: from_pretrained and load_adapter copy such a tensor over the base's. The model without its adapter, and others
#   beside it, have other logits from then on, after delete_adapter too. save_pretrained writes the adapter without the
#   embeddings, unless it is told again. No warning.
# What follows: a reference model by disable_adapter() is none, adapters of one server change each other, and one that is
#   read and saved has lost its embeddings. Train embeddings by modules_to_save, where all of it holds.
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
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
base = LlamaForCausalLM(config).eval()
tokens = torch.randint(0, 64, (8, 16))
root = Path(sys.argv[1])


@torch.no_grad()
def logits(model):
    return model.eval()(tokens).logits


def far(one, other):
    return (one - other).abs().max().item()


def trained(name, embeddings=None):
    """Saves an adapter that was trained on its own, and gives its logits."""
    more = {"modules_to_save": ["embed_tokens"]} if embeddings == "modules_to_save" else {}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj"], **more))
    if embeddings == "base":
        model.get_input_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
    for _ in range(5):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / name, **({"save_embedding_layers": True} if embeddings == "base" else {}))
    return logits(model)


other_alone, results = trained("other"), {}
for kind in ("base", "modules_to_save"):
    alone = trained(kind, kind)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(copy.deepcopy(base), root / kind, "first")
        model.load_adapter(root / "other", "other")
        off = {"the adapter itself": far(logits(model), alone)}
        model.save_pretrained(root / "again", selected_adapters=["first"])
        again = PeftModel.from_pretrained(copy.deepcopy(base), root / "again" / "first")
        off["saved again and read"] = far(logits(again), alone)
        with model.disable_adapter():
            disabled = logits(model)
        off["the base, by disable_adapter"] = far(disabled, logits(base))
        model.set_adapter("other")
        off["the other adapter"] = far(beside := logits(model), other_alone)
        model.delete_adapter("first")
        off["the other after delete_adapter"] = far(logits(model), other_alone)
    told = [str(one.message) for one in warned if "embed" in str(one.message).lower()]
    print("embeddings trained", "in place" if kind == "base" else "by modules_to_save", "- warnings:", told or "none")
    for what, distance in off.items():
        print(f"    {what}: {distance:.1e} off")
    if kind == "base":  # By hand: a plain LLaMA with the file's embeddings, and with the other adapter's B A on top.
        plain = copy.deepcopy(base)
        first, other = (load_file(root / name / "adapter_model.safetensors") for name in ("base", "other"))
        plain.load_state_dict({key[17:]: one for key, one in first.items() if "lora" not in key}, strict=False)
        by_hand = [far(logits(plain), disabled)]
        with torch.no_grad():
            for name, module in plain.named_modules():
                if name.endswith("q_proj"):
                    a, b = (other[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
                    module.weight += b @ a  # alpha / rank is 1
        by_hand.append(far(logits(plain), beside))
        print(f"    by hand, the first one's embeddings in the base: {max(by_hand):.1e} off what these two gave")
    results[kind] = ([distance > 1e-2 for distance in off.values()], max(off.values()) < 1e-5, bool(told))
as_seen = max(by_hand) < 1e-5 and results["base"] == ([False, True, True, True, True], False, False)
as_seen = as_seen and results["modules_to_save"][:2] == ([False] * 5, True)
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
