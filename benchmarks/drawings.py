"""Draws the pictures that the recipe `caption-quickstart` learns from: colored shapes with captions, in two tar shards.

    python benchmarks/drawings.py llama_acc/recipes/caption-quickstart

A scene is two shapes, one left of the other or one above the other, and its caption says so: "a red circle above a
blue star". A drawing of a scene varies in place, size, shade and background. The scenes are split at random: no scene,
and so no caption and no picture, of the held-out drawings is among those to learn from.
"""

import io
import itertools
import math
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
"""Pixels of a drawing's side."""
_SEED = 1
COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 20),
    "purple": (138, 43, 190),
    "orange": (240, 125, 20),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
SPLITS = {"train": 6200, "held-out": 344}
"""How many drawings there are of each: two of every scene to learn from, one of every other."""
_SUPERSAMPLED = 4


class Scene(NamedTuple):
    """What is to be seen: `first` stands `place` ("left of", "above") `second`, each a color and a shape."""

    first: tuple[str, str]
    place: str
    second: tuple[str, str]

    @property
    def caption(self) -> str:
        """It in words."""
        first, second = (
            f"{'an' if color == 'orange' else 'a'} {color} {shape}" for color, shape in (self.first, self.second)
        )
        return f"{first} {self.place} {second}"


def scenes(split: str) -> list[Scene]:
    """The scenes of "train" or "held-out": a random tenth of all is held out."""
    shapes = list(itertools.product(COLORS, SHAPES))
    pairs = itertools.product(shapes, ("left of", "above"), shapes)
    everything = [Scene(*pair) for pair in pairs if pair[0] != pair[2]]
    order = np.random.default_rng([0, _SEED]).permutation(len(everything))
    held_out = len(everything) // 10
    return [everything[i] for i in (order[:held_out] if split == "held-out" else order[held_out:])]


def drawings(split: str) -> Iterator[tuple[bytes, str]]:
    """The drawings of a split as WebP without loss, with their captions: its scenes in turn, each time drawn anew."""
    for number, scene in enumerate(itertools.islice(itertools.cycle(scenes(split)), SPLITS[split])):
        file = io.BytesIO()
        image = _draw(scene, np.random.default_rng([0, _SEED, list(SPLITS).index(split), number]))
        image.save(file, "WEBP", lossless=True, method=6)
        yield file.getvalue(), scene.caption


def write_shard(path: Path, split: str) -> None:
    """A split's drawings as a tar, each with its caption beside it."""
    with tarfile.open(path, "w") as shard:
        for number, (picture, caption) in enumerate(drawings(split)):
            for suffix, data in (("webp", picture), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:05}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


def _draw(scene: Scene, random: np.random.Generator) -> Image.Image:
    side = SIZE * _SUPERSAMPLED
    image = Image.new("RGB", (side, side), _shaded((245, 245, 245), random, 10))
    # Far apart along one axis, near to the middle along the other, in parts of the side.
    along = random.uniform((0.21, 0.69), (0.31, 0.79))
    across = random.uniform(0.4, 0.6) + random.uniform(-0.06, 0.06, 2)
    x, y = (along, across) if scene.place == "left of" else (across, along)
    for (color, shape), place in zip((scene.first, scene.second), zip(x, y, strict=True), strict=True):
        radius = random.uniform(0.14, 0.2)
        fill = _shaded(COLORS[color], random, 18)
        _draw_shape(ImageDraw.Draw(image), shape, place[0] * side, place[1] * side, radius * side, fill)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _shaded(color: tuple[int, int, int], random: np.random.Generator, most: int) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.add(color, random.integers(-most, most + 1, 3)), 0, 255).tolist()
    return red, green, blue


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int]
) -> None:
    def box(width: float, height: float) -> tuple[float, float, float, float]:
        return x - width, y - height, x + width, y + height

    if shape == "circle":
        canvas.ellipse(box(r, r), fill=fill)
    elif shape == "ring":
        canvas.ellipse(box(r, r), outline=fill, width=round(0.4 * r))
    elif shape == "square":
        canvas.rectangle(box(0.85 * r, 0.85 * r), fill=fill)
    elif shape == "cross":
        canvas.rectangle(box(r, 0.3 * r), fill=fill)
        canvas.rectangle(box(0.3 * r, r), fill=fill)
    else:
        # Corners at these distances from the center, the first one at the top, at equal angles.
        radii = [r] * 3 if shape == "triangle" else [r, 0.42 * r] * 5
        angles = (2 * math.pi * i / len(radii) for i in range(len(radii)))
        corners = [(x + d * math.sin(a), y - d * math.cos(a)) for d, a in zip(radii, angles, strict=True)]
        canvas.polygon(corners, fill=fill)


if __name__ == "__main__":
    for split in SPLITS:
        write_shard(Path(sys.argv[1]) / f"{split}.tar", split)
