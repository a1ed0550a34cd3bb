#!/usr/bin/env bash
# torchtune 0.6.1: an answer that is cut at max_seq_len is trained to end there, in the middle of a sentence.
#
# Expected: of a dialogue longer than max_seq_len, what fits is trained, and the end token only where an answer ends.
# Seen: the last token that fits is replaced by the end token, and in the tokenizer of Llama 2 it has a label where an
#   answer is cut: the model learns to stop after "Four it".
# What follows: the more examples are longer than max_seq_len, the more the model breaks off, and always at that length.
#   Leave out what does not fit before the tokenizer sees it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 torchtune==0.6.1 torchao==0.14.1 sentencepiece==0.2.3 2>&1 |
    grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" -W ignore - "$folder" 2> "$folder/log" <<'PYTHON' || { tail -3 "$folder/log"; exit 1; }
import sys
from importlib.metadata import version

import sentencepiece
from torchtune.data import Message
from torchtune.models.llama2 import llama2_tokenizer

print("torchtune", version("torchtune"))
question, answer = "What is two and two ?", "Four it is , and not three ."
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([f"[INST] {question} [/INST] {answer}"] * 50), model_prefix=f"{sys.argv[1]}/tokenizer",
    vocab_size=300, model_type="bpe", byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False,
    minloglevel=2,
)
path = f"{sys.argv[1]}/tokenizer.model"
pieces = sentencepiece.SentencePieceProcessor(model_file=path)
dialogue = [Message(role="user", content=question, masked=True), Message(role="assistant", content=answer)]
whole, masked = llama2_tokenizer(path).tokenize_messages(dialogue)
trained = {}
for limit in (None, len(whole) - 5):
    ids, masked = llama2_tokenizer(path, max_seq_len=limit).tokenize_messages(dialogue)
    trained[limit] = [token for token, is_masked in zip(ids, masked, strict=True) if not is_masked]
    print(f"max_seq_len {limit}: {len(ids)} tokens, labels: {' '.join(pieces.id_to_piece(trained[limit]))}")
full, cut = trained.values()
end = pieces.eos_id()
as_seen = full[-1] == end and cut[-1] == end and cut[:-1] == full[: len(cut) - 1] and full[len(cut) - 1] != end
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
