#!/usr/bin/env bash
# gguf 0.19: a LLaMA tokenizer that is only there as tokenizer.json gets the same score for every token.
#
# Expected: llama.cpp merges the pieces of a text by their scores, highest first, so a GGUF file of such a tokenizer has
#   scores in the order of its merges: "▁a" before "he".
# Seen: LlamaHfVocab, which convert_hf_to_gguf.py takes where a folder has no tokenizer.model, says -1000 for all of them.
#   llama.cpp then merges from left to right: with LLaMA's own vocabulary, 827 of 1,000 answers of the Alpaca data become
#   other tokens than those of the training ("internationally" begins with "international", no more with "intern").
# What follows: keep tokenizer.model beside the weights for that converter, or write scores that fall with the number of
#   the merge that makes a piece (of several, the first).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 transformers==5.24.0 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - "$folder" <<'PYTHON' 2>/dev/null
import sys
from pathlib import Path

from gguf.vocab import LlamaHfVocab
from tokenizers import Tokenizer, decoders, models, normalizers

folder = Path(sys.argv[1])
pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"aeht", "▁a", "he"]
vocabulary, merges = {piece: number for number, piece in enumerate(pieces)}, [("▁", "a"), ("h", "e")]
model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
tokenizer = Tokenizer(model)
tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
tokenizer.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}')

scores = {bytes(text).decode(): score for text, score, kind in LlamaHfVocab(folder).all_tokens()}
print({piece: scores[piece] for piece in ("▁a", "he")}, "of all tokens:", set(scores.values()))
as_seen = set(scores.values()) == {-1000.0}
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
