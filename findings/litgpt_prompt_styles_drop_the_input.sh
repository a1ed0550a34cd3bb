#!/usr/bin/env bash
# litgpt 0.5: with any prompt style but "alpaca", the text that an instruction is about is not in the prompt.
#
# Expected: `litgpt finetune --data JSON --data.prompt_style llama3` trains rows of "instruction", "input" and "output", as
#   the data module's help describes them, with Llama 3's headers: the question is the instruction and its input.
# Seen: of all prompt styles, only "alpaca" writes the input. The others get it and leave it out, "longform" too, whose
#   text says that the instruction is "paired with an input". No warning: "Summarize." is the whole question, and the
#   summary of a text that nobody can see is its answer.
# What follows: with data as Alpaca's, where about two rows of five have an input, these teach the model to make things up.
#   Put the input into the instruction before, or write a PromptStyle of your own.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 litgpt==0.5.13 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" -W ignore - "$folder" 2> "$folder/log" <<'PYTHON' || { tail -3 "$folder/log"; exit 1; }
import json
import sys
from importlib.metadata import version
from pathlib import Path

from litgpt.data import JSON
from litgpt.prompts import prompt_styles
from litgpt.tokenizer import Tokenizer
from tokenizers import Tokenizer as Bytes
from tokenizers import decoders, models, pre_tokenizers

print("litgpt", version("litgpt"))
folder = Path(sys.argv[1])
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
names = [*alphabet, "<s>", "</s>"]
tokenizer = Bytes(models.BPE({symbol: number for number, symbol in enumerate(names)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save(str(folder / "tokenizer.json"))
config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
(folder / "tokenizer_config.json").write_text(json.dumps(config))
tokenizer = Tokenizer(folder)

rows = [{"instruction": "Summarize.", "input": "It rained all day.", "output": "Rain."}] * 2
(folder / "rows.json").write_text(json.dumps(rows))
texts = {}
for name in prompt_styles:
    if name == "llama2-function-calling":  # is for functions, not for such rows
        continue
    data = JSON(folder / "rows.json", val_split_fraction=0.5, prompt_style=name, num_workers=0)
    data.connect(tokenizer, batch_size=1, max_seq_length=4096)
    data.setup()
    texts[name] = tokenizer.decode(data.train_dataset[0]["input_ids"])
for name in ("alpaca", "llama3", "longform"):
    print(f"{name}: ...{texts[name][-150:]!r}")
with_input = [name for name, text in texts.items() if "It rained all day." in text]
with_rest = [name for name, text in texts.items() if "Summarize." in text and "Rain." in text]
print(f"{len(with_rest)} of {len(texts)} styles have instruction and output; with the input: {with_input}")
as_seen = with_input == ["alpaca"] and len(with_rest) == len(texts) > 20
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
