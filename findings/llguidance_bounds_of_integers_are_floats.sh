#!/usr/bin/env bash
# llguidance: bounds of a JSON schema's integers are rounded to float64, and from 10**18 on a lower one is refused.
#
# One would expect: {"type": "integer", "minimum": N} holds an answer to N and above, for the 64-bit numbers that ids and
# times in nanoseconds are.
# What happens: 2**53 is allowed where the minimum is 2**53 + 1, and 2**53 + 1 refused where it is the maximum; a minimum
# of 10**17 works, one of 10**18 makes the schema "Failed to generate regex for integer range".
# What follows: leave such bounds out of the schema and check the number in the answer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q llguidance==1.9.1
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

from llguidance import LLMatcher, LLTokenizer

print("llguidance", importlib.metadata.version("llguidance"))
tokenizer = LLTokenizer("byte")


def said(number, **bounds):
    grammar = LLMatcher.grammar_from_json_schema({"type": "integer", **bounds})
    if problem := LLMatcher.validate_grammar(grammar, tokenizer):
        found = problem.partition(":")[0]
    else:
        matcher, tokens = LLMatcher(tokenizer, grammar), tokenizer.tokenize_str(str(number))
        found = "allowed" if matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting() else "refused"
    print(f"{number} with {bounds}: {found}")
    return found


seen = [
    said(9, minimum=10),
    said(2**53, minimum=2**53 + 1),
    said(2**53 + 1, maximum=2**53 + 1),
    said(10**17 - 1, minimum=10**17),
    said(10**18, minimum=10**18),
]
as_seen = seen == ["refused", "allowed", "refused", "refused", "Failed to generate regex for integer range"]
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
