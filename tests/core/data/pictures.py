"""Made pictures of every kind there is, for tests."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pattern(width: int, height: int) -> Image.Image:
    """A picture whose every pixel follows from its place."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray(((7 * x + 13 * y + 50 * c + x * y % 31) % 256).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **settings: Any) -> bytes:
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def plain(color: Any, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Image.Image:
    """A picture of one color."""
    return Image.new(mode, size, color)


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (40, 30)) -> list[str]:
    """So many different pictures, as PNG; their references."""
    references = []
    for number in range(count):
        path = folder / f"{number:04}.png"
        path.write_bytes(encoded(plain((number * 7 % 256, number * 31 % 256, 90), size=size)))
        references.append(str(path))
    return references
