#!/usr/bin/env bash
# torchtune 0.6.1: what Llama 2 and Mistral models are asked with is not what stands in front of answers in training.
#
# Expected: called with inference=True and an empty last answer, as the recipes that generate do, a tokenizer gives the
#   tokens that training has up to the last answer. So it is with Llama 3's.
# Seen: Mistral's does not look at inference: the prompt ends with the end token, "[/INST]</s>", as if the answer had been
#   given, and the model goes on behind it. Gemma's is made the same way. Llama 2's leaves the end token out behind every
#   answer, the earlier ones too: "answer<s>[INST] ..", which no training had.
# What follows: a model that was tuned well answers badly, and only here. Encode as training does, and cut off what stands
#   behind the last question.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 torchtune==0.6.1 torchao==0.14.1 sentencepiece==0.2.3 2>&1 |
    grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" -W ignore - "$folder" 2> "$folder/log" <<'PYTHON' || { tail -3 "$folder/log"; exit 1; }
import base64
import sys
from importlib.metadata import version
from pathlib import Path

import sentencepiece
from torchtune.data import Message
from torchtune.models.llama2 import llama2_tokenizer
from torchtune.models.llama3 import llama3_tokenizer
from torchtune.models.mistral import mistral_tokenizer

print("torchtune", version("torchtune"))
folder = Path(sys.argv[1])
texts = ["[INST] What is two and two ? [/INST] Four it is .", "[INST] And three ? [/INST] Five it is ."]
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts * 50), model_prefix=str(folder / "pieces"), vocab_size=300, model_type="bpe",
    byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
)
lines = [base64.b64encode(bytes([byte])) + f" {byte}".encode() for byte in range(256)]
(folder / "llama3.model").write_bytes(b"\n".join(lines))
tokenizers = {
    "Llama 2": llama2_tokenizer(str(folder / "pieces.model")),
    "Mistral": mistral_tokenizer(str(folder / "pieces.model")),
    "Llama 3": llama3_tokenizer(str(folder / "llama3.model")),
}
dialogue = [
    Message(role="user", content="What is two and two ?", masked=True),
    Message(role="assistant", content="Four it is ."),
    Message(role="user", content="And three ?", masked=True),
    Message(role="assistant", content="Five it is ."),
]
question = [*dialogue[:3], Message(role="assistant", content="")]
seen = {}
for name, tokenizer in tokenizers.items():
    training = tokenizer({"messages": dialogue}, inference=False)["tokens"]
    prompt = tokenizer({"messages": question}, inference=True)["tokens"]
    without = [token for token in training if token != tokenizer.eos_id]
    seen[name] = {
        "as training begins": prompt == training[: len(prompt)],
        "with an end token last": prompt[-1] == tokenizer.eos_id and prompt[:-1] == training[: len(prompt) - 1],
        "without end tokens": tokenizer.eos_id not in prompt and prompt == without[: len(prompt)],
    }
    print(f"{name}: {[way for way, is_so in seen[name].items() if is_so]}")
as_seen = [list(ways.values()) for ways in seen.values()] == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
