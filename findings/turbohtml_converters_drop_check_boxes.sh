#!/usr/bin/env bash
# turbohtml's to_markdown: one converter, for any tag, and the check boxes of all task lists are gone.
#
# One would expect: `Markdown(converters={"sup": ...})` changes how <sup> is written, and nothing else. The documentation
# calls converters "per-tag overrides".
# What happens: with any converter at all, also one for a tag that the page does not have, `<li><input type="checkbox"
# checked> done</li>` is written as "- done"; without converters as "- [x] done". No error, no warning.
# What follows: pages of chats that are made training data this way lose which steps are done and which are not. Change
# the document before it is written (here: put texts around the tag with insert_before and insert_after) instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q turbohtml==1.15.4
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from turbohtml import Markdown, parse

page = '<ul><li><input type="checkbox" checked> done</li><li><input type="checkbox"> to do</li></ul>'
plain = parse(page).to_markdown(Markdown())
converted = parse(page).to_markdown(Markdown(converters={"sup": lambda element, text: text}))
print(f"turbohtml {version('turbohtml')}")
print(f"without converters:          {plain!r}")
print(f"with a converter for <sup>:  {converted!r}")
if plain != "- [x] done\n- [ ] to do" or converted != "- done\n- to do":
    sys.exit("the behavior has changed")
print("as described: a converter for another tag drops the check boxes")
PYTHON
