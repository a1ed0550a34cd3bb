#!/usr/bin/env bash
# sentencepiece 0.2.3, transformers: beside protobuf 6, a LLaMA tokenizer.model is not read, and tiktoken is asked for.
#
# One would expect: pip has resolved what reading a SentencePiece model needs; if something is missing, that is named.
# What happens: sentencepiece 0.2.3 brings sentencepiece_model_pb2, made by protobuf 7.36.1, and names no dependency on
# protobuf. An older runtime, as wandb (>=5) or tensorboard (>=3.19) allow, is refused when that is imported.
# transformers imports it to read the model, takes the failure for a sign that the file is tiktoken's, and says that
# tiktoken is required. The same folder is read with sentencepiece 0.2.0, whose file has no such check, or with
# protobuf 7.36.
# What follows: install protobuf>=7.36.1 beside sentencepiece 0.2.3, or keep a tokenizer.json in the folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" "$@"; }
pip install -q transformers==5.24.0 sentencepiece==0.2.3 protobuf==6.33.1
export HF_HUB_OFFLINE=1 HF_HOME="$folder/home"
mkdir "$folder/model"
"$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import io
import json
import sys

import sentencepiece

words = "the model reads a text and a text is made of words that the model has seen before or has not".split()
lines = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
    hard_vocab_limit=False, minloglevel=2,
)
open(f"{sys.argv[1]}/tokenizer.model", "wb").write(model.getvalue())
config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
json.dump(config, open(f"{sys.argv[1]}/tokenizer_config.json", "w"))
PYTHON
load() {
    "$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import importlib.metadata as metadata
import logging
import sys

logging.disable(logging.CRITICAL)
from transformers import AutoTokenizer

found = {name: "none" for name in ("transformers", "sentencepiece", "protobuf")}
for name in found:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
try:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    said = f"reads 'the model' as {tokenizer.tokenize('the model')}"
except Exception as error:
    said = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
print(", ".join(f"{name} {version}" for name, version in found.items()), "->", said)
PYTHON
}
load | tee "$folder/seen"
pip install -q sentencepiece==0.2.0
load | tee -a "$folder/seen"
pip install -q sentencepiece==0.2.3 protobuf==7.36.2
load | tee -a "$folder/seen"
refused="transformers 5.24.0, sentencepiece 0.2.3, protobuf 6.33.1 -> ValueError: .*tiktoken.* is required"
reads="reads 'the model' as \['▁the', '▁model'\]"
if grep -q "^$refused" "$folder/seen" && [ "$(grep -c "$reads" "$folder/seen")" = 2 ]; then
    echo "as described"
else
    echo "the behavior changed"
    exit 1
fi
