#!/usr/bin/env bash
# tokenizers: an added token of a tokenizer.json whose id leaves a gap gets another id, without a word.
#
# Expected: `added_tokens` in tokenizer.json gives each token an "id", and that is the row of the embedding it was trained
#   as. Models leave ids out: a vocabulary of 32,000 padded to a round size, with the new tokens behind the padding.
# Seen: Tokenizer.from_str and from_file number added tokens on from the vocabulary's size, in order; the "id" is ignored
#   where it leaves a gap. No warning, no error; saving writes the other ids.
# What follows: the model gets the embedding of another row, an end token ends nothing. A reader has to compare the ids
#   with the file, and can keep them by writing such tokens into the model's `vocab` too, where gaps are allowed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3

"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys

import tokenizers
from tokenizers import AddedToken, Tokenizer, models

print("tokenizers", tokenizers.__version__)
first = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
first.add_special_tokens([AddedToken("<end>", special=True)])
values = json.loads(first.to_str())


def read(written):
    values["added_tokens"][0]["id"] = written
    got = Tokenizer.from_str(json.dumps(values)).encode("a<end>").ids[-1]
    print(f"id in the file: {written}; id of the token: {got}")
    return got


seen = [read(written) for written in (2, 5)]
values["model"]["vocab"]["<end>"] = 5
seen.append(read(5))
as_seen = seen == [2, 2, 5]
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
