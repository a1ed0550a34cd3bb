#!/usr/bin/env bash
# gguf 0.19: an array of arrays that the package writes is read back by it as one flat array.
#
# Expected: GGUF has arrays of arrays, `GGUFWriter.add_array("k", [[1, 2], [3]])` writes one, and
#   `GGUFReader.get_field("k").contents()` gives [[1, 2], [3]].
# Seen: the file is right, but contents() gives [1, 2, 3]: where each inner array ends is not told, though the field's
#   types say ARRAY, ARRAY, INT32.
# What follows: comparing metadata after writing passes or fails on the wrong thing; keep nested lists as JSON text.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q gguf==0.19.0 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - "$folder/nested.gguf" <<'PYTHON'
import struct
import sys
from pathlib import Path

from gguf import GGUFReader, GGUFWriter

nested = [[1, 2], [3]]
writer = GGUFWriter(sys.argv[1], "llama")
writer.add_array("nested", nested)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
writer.close()
# As the format has it: type 9, of type 9, two; then type 5, count, values, for each.
expected = struct.pack("<IIQ", 9, 9, 2) + struct.pack("<IQ2i", 5, 2, 1, 2) + struct.pack("<IQ1i", 5, 1, 3)
written = expected in Path(sys.argv[1]).read_bytes()
field = GGUFReader(sys.argv[1]).get_field("nested")
print(f"written whole: {written}; types {[kind.name for kind in field.types]}; read {field.contents()}")
as_seen = written and field.contents() == [1, 2, 3]
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
