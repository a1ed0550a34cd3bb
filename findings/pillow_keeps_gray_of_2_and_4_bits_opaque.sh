#!/usr/bin/env bash
# Pillow: a gray PNG of 2 or 4 bits with a transparent color is opaque once it is converted to RGBA.
#
# One would expect: convert("RGBA") gives alpha 0 where the PNG's tRNS chunk says so, as it does for 1, 8 and 16 bits.
# What happens: the pixels are brought to 8 bits (x 85, x 17), info["transparency"] keeps the value of 2 or 4 bits, and
# the two are compared: nothing matches. With 2 bits, gray 2 of 3 stays 170 and opaque; only 0 is found.
# What follows: multiply info["transparency"] by 85 (2 bits) or 17 (4 bits) before converting; the raw mode of
# image.tile[0] ("L;2", "L;4") tells the depth, before the pixels are loaded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct
import sys
import zlib

import PIL
from PIL import Image


def png(depth: int, samples: list[int], transparent: int) -> bytes:
    """A gray PNG of one row, as its specification has it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = int("".join(f"{sample:0{depth}b}" for sample in samples), 2).to_bytes(len(samples) * depth // 8, "big")
    header = struct.pack(">IIBBBBB", len(samples), 1, depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", transparent))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def alphas(content: bytes) -> list[int]:
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return [image.getpixel((x, 0))[3] for x in range(image.width)]


seen = {
    1: alphas(png(1, [0, 1, 0, 1, 0, 1, 0, 1], 1)),
    2: alphas(png(2, [0, 1, 2, 3], 2)),
    4: alphas(png(4, [0, 5, 10, 15], 5)),
    8: alphas(png(8, [0, 5, 10, 15], 5)),
}
print(f"Pillow {PIL.__version__}")
for depth, alpha in seen.items():
    print(f"{depth} bit: alpha {alpha}")
wrong = seen[2] == seen[4] == [255, 255, 255, 255]
right = seen[1] == [255, 0] * 4 and seen[8] == [255, 0, 255, 255]
sys.exit(0 if wrong and right else "the behavior has changed")
PYTHON
