#!/usr/bin/env bash
# gguf 0.19: reading one key of a GGUF file takes hundreds of megabytes and a minute where the vocabulary is large.
#
# Expected: the keys in front of the weights of a Llama 3 take 10 MB (128,256 tokens, 280,147 merges). GGUFReader maps the
#   file, and `fields["llama.context_length"]` costs about as much.
# Seen: it makes two numpy views for each string of each array when it is opened, 800,000 of them: over 300 MB.
# What follows: for one key, or for the tensors alone, read the header by hand; the format is described in
#   https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import resource
import sys
import time

from gguf import GGUFReader, GGUFWriter

path = f"{sys.argv[1]}/model.gguf"
writer = GGUFWriter(path, "llama")
writer.add_context_length(8192)
writer.add_token_list([f"token {number}" for number in range(128256)])
writer.add_token_merges([f"left{number} right{number}" for number in range(280147)])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
writer.close()
child = os.fork()
if child == 0:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    context = GGUFReader(path).fields["llama.context_length"].contents()
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(f"{context} of {os.path.getsize(path) >> 20} MB, with {taken} MB in {time.monotonic() - start:.0f} s")
    os._exit(0 if taken > 300 else 1)
as_seen = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
