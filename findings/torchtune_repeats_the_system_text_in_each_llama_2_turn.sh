#!/usr/bin/env bash
# torchtune 0.6.1: a dialogue of several turns with a system text is not what Llama 2's chat models were trained on.
#
# Expected: Meta's format has the system text within <<SYS>> in front of the first question only, and a question and its
#   answer are encoded as one text, "[INST] question [/INST] answer".
# Seen: Llama2ChatTemplate puts the system text in front of every question, and the tokenizer takes each part by itself,
#   with a piece "▁" of its own in front of "▁[/INST]": ids that the same text as a whole does not have.
# What follows: a model tuned so answers worse in other programs than its loss says, and the longer the dialogue, the more
#   of its context repeats the system text. Compare ids with `apply_chat_template` of the checkpoint before a run.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 torchtune==0.6.1 torchao==0.14.1 sentencepiece==0.2.3 2>&1 |
    grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" -W ignore - "$folder" 2> "$folder/log" <<'PYTHON' || { tail -3 "$folder/log"; exit 1; }
import sys

import sentencepiece
from torchtune.data import Message
from torchtune.models.llama2 import Llama2ChatTemplate, llama2_tokenizer

texts = ["[INST] What is two and two ? [/INST] Four it is .", "[INST] And three ? [/INST] Five it is ."]
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts * 50), model_prefix=f"{sys.argv[1]}/tokenizer", vocab_size=300, model_type="bpe",
    byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    normalization_rule_name="identity", remove_extra_whitespaces=False,  # as of Llama 2
)
path = f"{sys.argv[1]}/tokenizer.model"
dialogue = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="What is two and two ?", masked=True),
    Message(role="assistant", content="Four it is ."),
    Message(role="user", content="And three ?", masked=True),
    Message(role="assistant", content="Five it is ."),
]
turns = ["".join(part["content"] for part in message.content) for message in Llama2ChatTemplate()(dialogue)]
for turn in turns:
    print(repr(turn))
ids, _ = llama2_tokenizer(path).tokenize_messages(dialogue[1:3])
pieces = sentencepiece.SentencePieceProcessor(model_file=path)
whole = pieces.encode(texts[0], add_bos=True, add_eos=True)
print("torchtune:", " ".join(pieces.id_to_piece(ids)))
print("the text: ", " ".join(pieces.id_to_piece(whole)))
repeated = [turn.count("Be brief.") for turn in turns] == [1, 0, 1, 0]
space = ids.index(pieces.encode("[/INST]")[0]) - 1
as_seen = repeated and pieces.id_to_piece(ids[space]) == "▁" and [*ids[:space], *ids[space + 1 :]] == whole
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
