#!/usr/bin/env bash
# transformers 5: LlamaTokenizer takes the pieces of a tokenizer.json, and a normalizer and pre-tokenizer of its own.
#
# Expected: a folder with tokenizer.json gives the ids of that file, as in transformers 4 and with the library tokenizers.
#   LLaMA's own has the normalizer Prepend("▁"), Replace(" ", "▁"): "<s>hi" is <s> ▁hi, as Meta encodes a prompt.
# Seen: where tokenizer_config.json names the class LlamaTokenizer (as nearly all LLaMA 2 folders do), the tokenizer is
#   rebuilt with Metaspace(prepend_scheme="first"): no space in front behind a special token ("<s>hi" is <s> h i, so a chat
#   prompt with BOS begins otherwise than in training), and one space less for a text that begins with one. GPT2Tokenizer
#   does the same: of the pre-tokenizers Digits and ByteLevel, only ByteLevel is left, and "1  2" is cut otherwise.
# What follows: name the class PreTrainedTokenizerFast, which takes the file as it stands in 4 and 5; compare ids before
#   moving a chat model from transformers 4 to 5.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0

"$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

print("transformers", transformers.__version__)
pieces = ["<unk>", "<s>", "</s>", "▁", "h", "i", "▁h", "▁hi"]
merges = [("▁", "h"), ("▁h", "i")]
fast = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
digits = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["1", "2", "Ġ", "ĠĠ"])}, [("Ġ", "Ġ")]))
by_digits, in_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
digits.pre_tokenizer = pre_tokenizers.Sequence([by_digits, in_bytes])
seen = {}
for name, fast, texts in (
    ("LlamaTokenizer", fast, ("hi", "<s>hi", " hi")),
    ("PreTrainedTokenizerFast", fast, ("hi", "<s>hi", " hi")),
    ("GPT2Tokenizer", digits, ("12", "1  2")),
    ("PreTrainedTokenizerFast", digits, ("12", "1  2")),
):
    folder = Path(sys.argv[1]) / f"{name}{len(seen)}"
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    names = {} if fast is digits else {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": name, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        of_file = fast.encode(text, add_special_tokens=False)
        seen[name, text] = ids == of_file.ids
        print(f"{name} {text!r}: {theirs.convert_ids_to_tokens(ids)}; tokenizer.json says {of_file.tokens}")
wrong = {key for key, is_same in seen.items() if not is_same}
as_seen = wrong == {("LlamaTokenizer", "<s>hi"), ("LlamaTokenizer", " hi"), ("GPT2Tokenizer", "1  2")}
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
