#!/usr/bin/env bash
# tokenizers 0.23: an answer that is streamed by DecodeStream and ends within a character ends earlier than decoded whole.
#
# Expected: what `DecodeStream.step` gave for each token, put together, is what `decode` gives for all of them.
# Seen: text that ends in U+FFFD is held back until more comes, and nothing asks for it at the end: an answer that a limit
#   of tokens cuts within an emoji, or that says U+FFFD itself last, lacks it, and all tokens before it that were held
#   back with it. `decode` has the replacement character.
# What follows: at the end of a stream, decode all tokens once and send what has not been sent.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3

"$folder/venv/bin/python" - <<'PYTHON'
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

# Every byte is a token, as in the byte-level vocabularies of Llama 3 and Qwen before their merges.
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()

lost = []
for text, tokens in (("a \N{GRINNING FACE}!", None), ("a \N{GRINNING FACE}", -1), ("a \N{REPLACEMENT CHARACTER}", None)):
    ids = tokenizer.encode(text).ids[:tokens]
    stream = DecodeStream()
    streamed = "".join(stream.step(tokenizer, number) or "" for number in ids)
    lost.append(tokenizer.decode(ids).removeprefix(streamed))
    print(f"{text!a} cut at {tokens}: streamed {streamed!a}, decoded {tokenizer.decode(ids)!a}")
as_seen = lost == ["", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"]
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
