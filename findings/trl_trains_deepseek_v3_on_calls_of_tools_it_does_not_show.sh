#!/usr/bin/env bash
# trl 1.16: a DeepSeek-V3 is trained to call tools that its prompt does not mention; the column "tools" is dropped.
#
# Expected: rows with "tools" and messages with "tool_calls" become a text that says which functions there are, as trl
#   writes it for Qwen3, and then the call; or trl says that the template cannot.
# Seen: the chat template that trl swaps in for DeepSeek-V3's with assistant_only_loss=True does not read `tools`, as the
#   model's own does not: the text is that of the same row without tools, and the call has labels. No warning, and
#   supports_tool_calling, by which GRPOTrainer takes tools or refuses, says True: it looks at calls and results only.
# What follows: the model learns to call functions out of nothing, by names that it has to guess. Put the tools into the
#   system message, and decode a row of trainer.train_dataset before a run.
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
config = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config)
templates = Path(trl.__file__).parent / "chat_templates"
city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
about = "Tells how many millimeters it rains."
tools = [{"type": "function", "function": {"name": "rain", "description": about, "parameters": city}}]
call = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Rome"}}}
messages = [
    {"role": "user", "content": "Is it wet there?"},
    {"role": "assistant", "content": "", "tool_calls": [call]},
    {"role": "tool", "name": "rain", "content": "0"},
    {"role": "assistant", "content": "No."},
]


def encoded(name, row, ends):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<s>", eos_token=ends, pad_token="<pad>"
    )
    tokenizer.chat_template = (templates / f"{name}.jinja").read_text()
    arguments = trl.SFTConfig(sys.argv[1] + "/out", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
    arguments.max_length, arguments.assistant_only_loss = None, True
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    told = [str(one.message) for one in warned if "tool" in str(one.message)]
    first = trainer.train_dataset[0]
    trained = [token for token, label in zip(first["input_ids"], first["labels"], strict=True) if label != -100]
    return tokenizer.decode(first["input_ids"]), tokenizer.decode(trained), told, trl.supports_tool_calling(tokenizer)


seen = {}
for name, ends in (("deepseekv3", "<｜end▁of▁sentence｜>"), ("qwen3", "<|im_end|>")):
    text, trained, told, supported = encoded(name, {"messages": messages, "tools": tools}, ends)
    without = encoded(name, {"messages": messages}, ends)[0]
    call_trained = "rain" in trained and '{"city": "Rome"}' in trained
    seen[name] = (about in text, text == without, call_trained, supported, bool(told))
    print(f"{name}: tools in the text {about in text}, the text is that without tools {text == without},")
    print(f"    calls trained {call_trained}, supports_tool_calling {supported}, warnings of tools {len(told)}")
    print(f"    trained: {trained!r}")
as_seen = seen == {"deepseekv3": (False, True, True, True, False), "qwen3": (True, False, True, True, False)}
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
