#!/usr/bin/env bash
# llguidance: an answer held to a JSON schema cannot write "\u00e9", so not what json.dumps wrote in the training data.
#
# One would expect: what is valid JSON and fits the schema may be generated, whichever way a character is written.
# What happens: in strings of a schema only the escapes \" \\ \b \f \n \r \t are allowed, and \u for control characters.
# "\u00e9", "\/" and surrogate pairs are valid JSON, and json.dumps writes the first and the last by default; a token
# that begins them is masked.
# What follows: a model that was tuned on json.dumps's output writes accents and emoji as escapes, and is cut off from
# them by the grammar: write training data with ensure_ascii=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q llguidance==1.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import json
import sys

from llguidance import LLMatcher, LLTokenizer

print("llguidance", importlib.metadata.version("llguidance"))
tokenizer = LLTokenizer("byte")
grammar = LLMatcher.grammar_from_json_schema({"type": "string"})
assert not LLMatcher.validate_grammar(grammar, tokenizer)


def allows(text):
    assert isinstance(json.loads(text), str)
    matcher = LLMatcher(tokenizer, grammar)
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


raw, escaped = ['"é"', '"😀"', '"\\n"', '"\\u0001"'], [json.dumps("é"), json.dumps("😀"), '"\\/"', '"\\u0041"']
for text in raw + escaped:
    print(f"{text:18} {'allowed' if allows(text) else 'refused'}")
as_seen = all(map(allows, raw)) and not any(map(allows, escaped))
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
