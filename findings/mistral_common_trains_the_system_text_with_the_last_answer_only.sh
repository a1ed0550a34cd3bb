#!/usr/bin/env bash
# mistral-common 1.13: prepared for fine-tuning, a dialogue has its system text in front of the last question only.
#
# Expected: in fine-tuning mode a dialogue becomes one text in which each answer stands behind what was asked of the model
#   then: the first behind "[INST]Be brief.\n\nquestion[/INST]", as the same library writes the prompt of a first turn.
# Seen: version 3's tokenizers (Mistral 7B v0.3, Nemo) put the system text in front of the last question, in prompts and in
#   dialogues to train: only the prompt of the last answer is what was trained. All answers before it are learned without
#   the system text, brief ones though nobody asked for that, and a first turn with it is never trained.
# What follows: the model becomes what the system text says without it, and obeys it less. Make an example of each answer,
#   with the dialogue up to it, and train the last one only; version 7's tokenizers have the text in front, once.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mistral-common[sentencepiece]==1.13.1" 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import mistral_common
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

print("mistral-common", version("mistral-common"))
data = Path(mistral_common.__file__).parent / "data"  # the tokenizers that come with it
files = {"v3": data / "tekken_240911.json", "v7": data / "mistral_instruct_tokenizer_241114.model.v7"}
dialogue = [
    SystemMessage(content="Be brief."),
    UserMessage(content="Two and two?"),
    AssistantMessage(content="Four."),
    UserMessage(content="And three?"),
    AssistantMessage(content="Five."),
]
seen = {}
for name, file in files.items():
    tuning = MistralTokenizer.from_file(file, ValidationMode.finetuning)
    encoded = tuning.encode_chat_completion(ChatCompletionRequest(messages=dialogue))
    prompts = MistralTokenizer.from_file(file, ValidationMode.test)
    first, second = (
        prompts.encode_chat_completion(ChatCompletionRequest(messages=dialogue[:count])) for count in (2, 4)
    )
    print(f"{name}: trained      {encoded.text!r}")
    print(f"    first prompt  {first.text!r}")
    print(f"    second prompt {second.text!r}")
    begins = [encoded.tokens[: len(prompt.tokens)] == prompt.tokens for prompt in (first, second)]
    seen[name] = (begins, encoded.text.index("Be") < encoded.text.index("Two"), encoded.text.count("brief"))
as_seen = seen == {"v3": ([False, True], False, 1), "v7": ([True, True], True, 1)}
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
