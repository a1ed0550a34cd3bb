#!/usr/bin/env bash
# datasets 5.2: in a JSON file whose answers are all dates, the answers are no text any more.
#
# Expected: `load_dataset("json")` gives a JSON string as a string: {"output": "1914-07-28"} has the output "1914-07-28".
# Seen: where every value of a column looks like a date or a time of ISO 8601, the column becomes timestamp[s] and its
#   values datetime objects: as text "1914-07-28 00:00:00", and the Z of a time in UTC is gone. One other answer in
#   the file, and all are strings.
# What follows: a small file of questions for dates trains on other answers than it has, or is refused where a template
#   wants text; give `features=` with Value("string"), or read the lines with `json`.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0

HF_HOME="$folder/home" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from datetime import datetime
from pathlib import Path

from datasets import load_dataset

dates = ["1914-07-28", "1918-11-11"]
files = {"dates": dates, "times": ["2020-01-01T10:00:00Z"], "dates and a word": [*dates, "never"]}
kinds = {}
for name, answers in files.items():
    path = Path(sys.argv[1], f"{name}.jsonl")
    path.write_text("".join(json.dumps({"instruction": "When?", "output": answer}) + "\n" for answer in answers))
    read = load_dataset("json", data_files=str(path), split="train")["output"][:]
    kinds[name] = type(read[0])
    print(f"{name}: {answers} -> {[str(answer) for answer in read]} of {kinds[name].__name__}")
as_seen = kinds == {"dates": datetime, "times": datetime, "dates and a word": str}
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
