#!/usr/bin/env bash
# transformers 5: Trainer's eval_loss of the same model and data changes with per_device_eval_batch_size.
#
# Expected: eval_loss is the mean loss of a token, as the training's loss is: the sum over all labels, divided by their
#   number, however rows are put into batches.
# Seen: each batch's mean over its tokens is taken, and the mean of those over the rows. A short answer weighs as much as a
#   long one with a batch size of 1, and nearly nothing in a batch beside a long one: on these rows, 4.02 and 0.28. The
#   loss of the training is 0.28 for each batch size.
# What follows: runs that differ in their batch size for evaluation cannot be compared, nor eval_loss with the training's,
#   and exp(eval_loss) is no perplexity; of two checkpoints, the better one depends on it. Sum up by hand.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 "accelerate==1.15.0" 2>&1 |
    grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" -W ignore - "$folder" 2> "$folder/log" <<'PYTHON' || { tail -3 "$folder/log"; exit 1; }
import math
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

transformers.utils.logging.set_verbosity_error()
print("transformers", transformers.__version__)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=True))
with torch.no_grad():  # a model that always says the token that came last once more, with a logit of 8, others of 0
    model.model.embed_tokens.weight.copy_(torch.eye(64))
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.layers[0].mlp.down_proj.weight.zero_()
rows = [[5] * 60, [6, 7, 8], [9] * 60, [10, 11, 12], [13] * 60, [14, 15, 16], [17] * 60, [18, 19, 20]]


def collate(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch]
    labels = [row["input_ids"] + [-100] * (longest - len(row["input_ids"])) for row in batch]
    ids, labels = torch.tensor(ids), torch.tensor(labels)
    return {"input_ids": ids, "labels": labels, "attention_mask": labels.ne(-100)}


easy = math.log(math.exp(8) + 63) - 8  # the loss of a token that repeats the last one
hard = easy + 8
count = 4 * (59 + 2)
by_hand = 4 * (59 * easy + 2 * hard) / count
print(f"by hand: mean of {count} labels {by_hand:.4f}; mean of the rows' means {(easy + hard) / 2:.4f}")
evaluated, trained = {}, {}
data = [{"input_ids": row} for row in rows]
for size in (1, 2, 8):
    arguments = TrainingArguments(
        sys.argv[1] + "/out", per_device_eval_batch_size=size, per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size, max_steps=1, learning_rate=0.0, logging_steps=1, save_strategy="no",
        use_cpu=True, report_to=[], disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data, eval_dataset=data)
    trainer.remove_callback(PrinterCallback)
    evaluated[size] = trainer.evaluate()["eval_loss"]
    trainer.train()
    trained[size] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    print(f"batch size {size}: eval_loss {evaluated[size]:.4f}, loss of the training {trained[size]:.4f}")
as_seen = all(abs(loss - by_hand) < 1e-3 for loss in (*trained.values(), evaluated[2], evaluated[8]))
as_seen = as_seen and abs(evaluated[1] - (easy + hard) / 2) < 1e-3
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
