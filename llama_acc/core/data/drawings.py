"""Coloured shapes with captions, drawn by code: image-text data that needs no download.

A scene is two shapes, one left of the other or one above the other, and its caption says so: "a red circle above a
blue star". A drawing of a scene varies in place, size, shade and ground. The scenes are split at random: no scene, and
so no caption and no picture, of the held-out drawings is among those to learn from.
"""

import io
import itertools
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
from PIL import Image, ImageDraw

from llama_acc.core.errors import UserError
from llama_acc.core.home import home

SIZE = 64
"""Pixels of a drawing's side."""

VERSION = 1
"""Raise it whenever the same seed may give other drawings."""

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 20),
    "purple": (138, 43, 190),
    "orange": (240, 125, 20),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
PLACES = ("left of", "above")

_HELD_OUT = 0.1
_SUPERSAMPLED = 4


class Shape(NamedTuple):
    """A coloured shape."""

    colour: str
    shape: str


SPLITS = {"train": 6200, "held-out": 344}
"""How many drawings there are of each: two of every scene to learn from, one of every other."""


class Scene(NamedTuple):
    """What is to be seen: `first` stands `place` `second`."""

    first: Shape
    place: str
    second: Shape

    @property
    def caption(self) -> str:
        """It in words."""
        return f"{_with_article(self.first)} {self.place} {_with_article(self.second)}"


def scenes(split: str, seed: int = 0) -> list[Scene]:
    """The scenes of "train" or "held-out": a random tenth of all is held out."""
    shapes = [Shape(*pair) for pair in itertools.product(COLOURS, SHAPES)]
    everything = [
        Scene(first, place, second)
        for first, place, second in itertools.product(shapes, PLACES, shapes)
        if first != second
    ]
    order = np.random.default_rng([seed, VERSION]).permutation(len(everything))
    held_out = int(len(everything) * _HELD_OUT)
    return [everything[i] for i in (order[:held_out] if split == "held-out" else order[held_out:])]


def drawings(split: str, count: int, seed: int = 0) -> Iterator[tuple[bytes, str]]:
    """The first `count` drawings of a split as PNG with their captions: its scenes in turn, each time drawn anew."""
    chosen = scenes(split, seed)
    for number in range(count):
        scene = chosen[number % len(chosen)]
        image = draw(scene, np.random.default_rng([seed, VERSION, list(SPLITS).index(split), number]))
        file = io.BytesIO()
        image.save(file, "PNG")
        yield file.getvalue(), scene.caption


def drawn_shard(name: str) -> Path:
    """The tar shard of a split's drawings, which is made where it is not there yet.

    Raises:
        UserError: it cannot be written.
    """
    path = home() / "data" / f"drawings-{VERSION}" / str(SPLITS[name]) / f"{name}.tar"
    if path.is_file():
        return path
    temporary = path.with_name(f".{name}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(temporary, "w") as shard:
            for number, (png, caption) in enumerate(drawings(name, SPLITS[name])):
                _add(shard, f"{number:05}.png", png)
                _add(shard, f"{number:05}.txt", caption.encode())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write drawings to {path.parent}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))


def draw(scene: Scene, random: np.random.Generator) -> Image.Image:
    """A drawing of a scene; place, size, shade and ground are random."""
    side = SIZE * _SUPERSAMPLED
    image = Image.new("RGB", (side, side), _shaded((245, 245, 245), random, 10))
    canvas = ImageDraw.Draw(image)
    for shape, (x, y) in zip((scene.first, scene.second), _centres(scene.place, random), strict=True):
        radius = random.uniform(0.14, 0.2)
        colour = _shaded(COLOURS[shape.colour], random, 18)
        _SHAPES[shape.shape](canvas, x * side, y * side, radius * side, colour)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _centres(place: str, random: np.random.Generator) -> list[tuple[float, float]]:
    """Of both shapes, in parts of the side: far apart along one axis, near to the middle along the other."""
    along = random.uniform((0.21, 0.69), (0.31, 0.79))
    across = random.uniform(0.4, 0.6) + random.uniform(-0.06, 0.06, 2)
    pairs = zip(along, across, strict=True) if place == "left of" else zip(across, along, strict=True)
    return [(float(x), float(y)) for x, y in pairs]


def _shaded(colour: tuple[int, int, int], random: np.random.Generator, most: int) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.add(colour, random.integers(-most, most + 1, 3)), 0, 255).tolist()
    return red, green, blue


def _with_article(shape: Shape) -> str:
    return f"{'an' if shape.colour[0] in 'aeiou' else 'a'} {shape.colour} {shape.shape}"


_Colour = tuple[int, int, int]


def _circle(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: _Colour) -> None:
    canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _ring(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: _Colour) -> None:
    canvas.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=round(0.4 * r))


def _square(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: _Colour) -> None:
    half = 0.85 * r
    canvas.rectangle((x - half, y - half, x + half, y + half), fill=colour)


def _cross(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: _Colour) -> None:
    arm = 0.3 * r
    canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
    canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)


def _triangle(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: _Colour) -> None:
    canvas.polygon(_corners(x, y, [r] * 3), fill=colour)


def _star(canvas: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: _Colour) -> None:
    canvas.polygon(_corners(x, y, [r, 0.42 * r] * 5), fill=colour)


def _corners(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    """Corners at these distances from the centre, the first one at the top, at equal angles."""
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(x + r * math.sin(angle), y - r * math.cos(angle)) for r, angle in zip(radii, angles, strict=True)]


_SHAPES = dict(zip(SHAPES, (_circle, _square, _triangle, _cross, _ring, _star), strict=True))
