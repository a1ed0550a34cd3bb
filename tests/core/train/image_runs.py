"""Runs of models that see: small data with no image, one or two images an item, mixed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.core.seeing import CLIP, QFORMER, TINY, Vision

COLOURS = ("red", "green", "blue", "white", "black")


def write_data(folder: Path, items: int = 16, most_images: int = 2) -> Path:
    """An items file; item i has i % (most_images + 1) images, of different shapes, in a folder beside it."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for item in range(items):
        names = []
        for nth in range(item % (most_images + 1)):
            shape = (*draw.integers(10, 40, 2), 3)
            Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / "images" / f"{item}-{nth}.png")
            names.append(f"images/{item}-{nth}.png")
        row: dict[str, Any] = {"instruction": f"What is in {item}?", "output": COLOURS[item % 5] * (1 + item % 3)}
        if names:
            row["image"] = names[0] if len(names) == 1 else names
        rows.append(row)
    path = folder / "items.json"
    path.write_text(json.dumps(rows))
    return path


def words_for(vision: Vision, data: Path, *more: str) -> list[str]:
    """The overrides that make a run see."""
    sizes = ", ".join(f"{key}: {value}" for key, value in asdict(vision).items())
    return [
        f"data.sources=[{{path: {data}}}]",
        f"vision={{encoder: {vision.encoder}, params: {{{sizes}}}, stage: 1}}",
        "train.global_batch_size=6",
        "train.batch_size=3",
        "train.epochs=2",
        "optimizer.lr=5e-3",
        *more,
    ]


TUNED = {
    "qformer": (QFORMER, ["tuning.method=lora_bias_norm", "tuning.lora_rank=4"]),
    "clip": (
        CLIP,
        ["tuning.method=adapter", "tuning.prefix_layers=1", "tuning.prefix_len=5", "tuning.lora_rank=3"],
    ),
    "tiny": (TINY, []),
}


def overrides_of(name: str, folder: Path) -> list[str]:
    """Of a kind's run on `write_data`'s data in a folder of its own in `folder`."""
    vision, more = TUNED[name]
    data = folder / f"data-{name}"
    path = data / "items.json"
    return words_for(vision, path if path.exists() else write_data(data, most_images=1 if name == "clip" else 2), *more)
