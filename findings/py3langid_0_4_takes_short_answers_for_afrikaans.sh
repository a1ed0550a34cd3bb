#!/usr/bin/env bash
# py3langid 0.4: "OK", "Paris" and "No." are Afrikaans, where 0.3 said English; a filter by language drops short answers.
#
# One would expect: of a text too short to tell, what versions before said ("en"), or that nothing is known.
# What happens: classify() of a text that has none of the model's n-grams gives the first language in alphabetical order,
# "af", with the score -3.4e38. Scores of real texts are negative, too (-92 for an English sentence), so a threshold on
# them has to be far below. With norm_probs=True it is "sr" with 0.014, the same for each of 71 languages.
# What follows: LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=0.5) says "und" of them:
# keep those.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
for version in 0.3.0 0.4.0; do
    "$folder/venv/bin/pip" install -q "py3langid==$version" numpy==2.4.6
    "$folder/venv/bin/python" - "$version" <<'PYTHON'
import sys

import py3langid

version, short, sentence = sys.argv[1], ["OK", "Paris", "No."], "The cat sat on the mat."
found = {text: py3langid.classify(text) for text in [*short, sentence]}
for text, (language, score) in found.items():
    print(f"py3langid {version}: {text!r} is {language} ({score:.4g})")
as_seen = {found[text][0] for text in short} == {"en" if version == "0.3.0" else "af"} and found[sentence][0] == "en"
if version == "0.4.0":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    for least in (None, 0.5):
        identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=least)
        language, share = identifier.classify("Paris")
        print(f"py3langid {version}, norm_probs, min_confidence {least}: 'Paris' is {language} ({share:.4g})")
        as_seen = as_seen and language == ("sr" if least is None else "und")
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
done
