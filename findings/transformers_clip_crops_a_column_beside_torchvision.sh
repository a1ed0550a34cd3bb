#!/usr/bin/env bash
# transformers 5: the center crop of CLIP's image processors begins a column (or row) before torchvision's, for half of
#   the pictures of which an odd number is cut off.
#
# Expected: CLIPImageProcessor gives the pixels of the transform that CLIP was published and trained with, torchvision's
#   Resize, then CenterCrop, as open_clip and LLaMA-Adapter's code still do.
# Seen: of 335 columns for 224, transformers leaves out 111 // 2 = 55 on the left, torchvision round(55.5) = 56. Python
#   rounds halves to the even number, so of 333 columns both leave out 54. The same with rows.
# What follows: a photo of 640 x 427, which becomes 335 x 224, is seen shifted by a pixel by the two: features computed
#   with one are not those of the other, though sizes, mean and resampling agree. Compare with pictures of such shapes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 pillow==13.0.0 transformers==5.24.0 2>&1 | grep -v "^WARNING\|notice" || true
# Of torchvision only what is written in Python is needed, no CUDA.
"$folder/venv/bin/pip" install -q --no-deps torchvision==0.28.0 2>&1 | grep -v "^WARNING\|notice" || true

"$folder/venv/bin/python" - 2> /dev/null <<'PYTHON'
import sys

import numpy as np
import torch
import transformers
from PIL import Image

# The compiled operators of torchvision's wheel may be for another build of torch: they are not described to it.
describe, torch.library.register_fake = torch.library.register_fake, lambda *args, **kwargs: lambda function: function
import torchvision  # noqa: E402
from torchvision.transforms import CenterCrop  # noqa: E402

torch.library.register_fake = describe
from transformers import CLIPImageProcessorPil  # noqa: E402

print("transformers", transformers.__version__, "torchvision", torchvision.__version__)
theirs = CLIPImageProcessorPil(do_rescale=False, do_normalize=False)
found = {}
for width, height in ((334, 224), (335, 224), (333, 224), (224, 335)):
    # A pixel's red is its column, its green its row; the short side is 224 already, so nothing is resized.
    rows, columns = np.mgrid[0:height, 0:width]
    picture = Image.fromarray(np.stack([columns % 256, rows % 256, 0 * rows], -1).astype(np.uint8))
    by_transformers = theirs(picture, return_tensors="np")["pixel_values"][0][:, 0, 0]
    by_torchvision = np.asarray(CenterCrop(224)(picture))[0, 0]
    side = int(height > width)
    found[width, height] = int(by_transformers[side]), int(by_torchvision[side])
    print(f"{width} x {height}: the crop begins at {found[width, height][0]} (transformers), {found[width, height][1]} (torchvision)")
as_seen = list(found.values()) == [(55, 55), (55, 56), (54, 54), (55, 56)]
print("as described" if as_seen else "the behavior changed")
sys.exit(0 if as_seen else 1)
PYTHON
