#!/usr/bin/env bash
# litgpt 0.5: with include_multiturn_conversations, LIMA's follow-up questions are trained without what they follow.
#
# Expected: of a dialogue of two questions, the second answer is learned after the first question and its answer, which
#   it refers to; or, without the option, the first pair alone, as the help says.
# Seen: every pair becomes an example of its own, with an empty input: "And of Italy?" is the whole prompt of "Rome.".
# What follows: such a run teaches answers to questions that nobody could answer; leave the option off, or make examples
#   with the dialogue so far in the instruction.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 litgpt==0.5.13 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

from litgpt.data.lima import format_dataset

dialogue = ["What is the capital of France?", "Paris.", "And of Italy?", "Rome."]
examples = format_dataset([{"conversations": dialogue}], True)
for example in examples:
    print(example)
as_seen = examples == [
    {"instruction": dialogue[0], "input": "", "output": dialogue[1]},
    {"instruction": dialogue[2], "input": "", "output": dialogue[3]},
]
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
