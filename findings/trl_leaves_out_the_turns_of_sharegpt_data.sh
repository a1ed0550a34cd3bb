#!/usr/bin/env bash
# trl 1.16: ShareGPT dialogues are converted, but their roles are not, and Qwen's templates leave their turns out.
#
# Expected: SFTTrainer takes rows of "conversations" with "from" and "value", and makes messages of them that the model's
#   chat template can write: those of ShareGPT are from "human" and "gpt", which is user and assistant.
# Seen: "from" and "value" are renamed, "human" and "gpt" stay. The template of Qwen2.5 has no branch for such roles: what
#   is trained is its system text, and no question and no answer. Qwen3's writes nothing at all, Llama 3's trains the
#   headers "human" and "gpt", which no chat will ever show the model. No error and no warning.
# What follows: the loss falls fast and the model has learned nothing, or does not know its role. Rename the roles before,
#   and decode a row of trainer.train_dataset before a run.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 trl==1.16.0 2>&1 |
    grep -v "^WARNING\|notice" || true

HF_HUB_OFFLINE=1 HF_HOME="$folder/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - "$folder" \
    2> "$folder/log" <<'PYTHON' || { tail -3 "$folder/log"; exit 1; }
import sys
import warnings
from pathlib import Path

import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("trl", trl.__version__)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
bytes_only = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_only.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bytes_only, bos_token="<|begin_of_text|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
)
config = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config)
templates = Path(trl.__file__).parent / "chat_templates"
dialogue = [("human", "Capital of France?"), ("gpt", "Paris.")]
renamed = [("user", "Capital of France?"), ("assistant", "Paris.")]
trained, told = {}, []
for name in ("qwen2_5", "qwen3", "llama3"):
    tokenizer.chat_template = (templates / f"{name}.jinja").read_text()
    for turns in (dialogue, renamed):
        row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
        arguments = trl.SFTConfig(sys.argv[1] + "/out", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
        arguments.max_length = None
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            trainer = trl.SFTTrainer(
                model, arguments, train_dataset=Dataset.from_list([row]), processing_class=tokenizer
            )
        told += [str(one.message) for one in warned if "role" in str(one.message)]
        rows = list(trainer.train_dataset)
        text = tokenizer.decode([token for token in rows[0]["labels"] if token != -100]) if rows else ""
        trained[name, turns[0][0]] = text
        print(f"{name}, {turns[0][0]}: {text!r}")
as_seen = all("France" in trained[name, "user"] and "Paris" in trained[name, "user"] for name in ("qwen2_5", "qwen3"))
as_seen = as_seen and trained["qwen2_5", "human"].startswith("<|im_start|>system\n")
as_seen = as_seen and not any(word in trained["qwen2_5", "human"] for word in ("France", "Paris"))
as_seen = as_seen and trained["qwen3", "human"] == ""
as_seen = as_seen and "human<|end_header_id|>" in trained["llama3", "human"] and not told
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
