"""Pictures: from a file, or a member of a tar shard, to 8-bit RGB, and from that to the square a model sees.

Imports no torch: worker processes do this. The arithmetic is Pillow's, which is torchvision's for pictures. Whatever is
wrong with a picture, missing, broken or too large, is an ImageError.

A reference says in text where a picture is: a path, or "shard.tar#OFFSET+SIZE", a member of a plain tar.
"""

import hashlib
import io
import math
import re
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from llama_acc.core.errors import UserError
from llama_acc.core.input_files import open_input

if TYPE_CHECKING:
    import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 100_000_000
"""Larger pictures are refused unless a recipe or a flag says otherwise: unpacked, this is 300 MB."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

Crop = Literal["random_resized_crop", "center_crop", "pad_to_square"]

# Not all that Pillow knows: to open an EPS runs a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# What Pillow's decoders raise on a broken file.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)
_MEMBER = re.compile(r"(?P<shard>.+\.tar)#(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)
_BACKGROUND = (255, 255, 255, 255)
_SCALE, _RATIO, _TRIES = (0.9, 1.0), (0.75, 1.3333), 10
_PADDING = (122, 116, 104)  # CLIP_MEAN in whole steps, as LLaMA2-Accessory has it
_MOST_PADDED = 2**27  # pixels; a long strip must not need far more memory than itself
_GRAY_STEPS = {"L;2": 85, "L;4": 17}
"""From one gray of 2 or 4 bits to the next, in 8 bits."""
_HEADER_BYTES, _END_BYTES, _MOST_BYTES = 2**15, 2**6, 2**30
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
"""With what the files of most pictures end, whole ones."""
_pillow_limit = threading.Lock()


class ImageError(UserError):
    """A picture is missing, broken or too large. The message does not say which one."""


def member_reference(shard: Path, offset: int, size: int) -> str:
    """The reference of a member of a tar, whose bytes are [offset, offset + size)."""
    return f"{shard}#{offset}+{size}"


def resolved(reference: str, root: Path) -> str:
    """A reference as it is written in the data, from any folder: relative ones begin at `root`."""
    return str(root / Path(reference).expanduser())


def shown_reference(reference: str) -> str:
    """A reference as a message says it."""
    member = _MEMBER.fullmatch(reference)
    return reference if member is None else f"{member['shard']} at byte {int(member['offset']):,}"


def read_reference(reference: str, most: int = -1, of_end: bool = False) -> bytes:
    """The bytes of a picture, or the first or last of them."""
    member = _MEMBER.fullmatch(reference)
    try:
        with open_input(Path(reference if member is None else member["shard"]), pipes=False) as file:
            begin, size = (0, file.seek(0, 2)) if member is None else (int(member["offset"]), int(member["size"]))
            most = size if most < 0 else min(most, size)
            file.seek(begin + size - most if of_end else begin)
            return file.read(most)
    except FileNotFoundError as error:
        raise ImageError("was not found") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


@lru_cache(maxsize=2**20)
def digest(reference: str) -> str:
    """sha256 of a picture's bytes, read once."""
    return hashlib.sha256(read_reference(reference)).hexdigest()


def check_header(reference: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of a picture as its header has them. Its pixels are decoded only if its end is missing."""
    try:
        image = _open_image(read_reference(reference, _HEADER_BYTES), max_pixels)
    except ImageError:  # a few have it behind a long profile, or at the end
        image = _open_image(read_reference(reference, _MOST_BYTES), max_pixels)
    with image:
        size, end = image.size, _ENDS.get(image.format or "", b"")
    if end not in read_reference(reference, _END_BYTES, of_end=True):
        decode(read_reference(reference, _MOST_BYTES), max_pixels)
    return size


def header_problems(references: Sequence[str], max_pixels: int) -> list[str | None]:
    """What `check_header` finds wrong with each picture."""
    problems: list[str | None] = []
    for reference in references:
        try:
            check_header(reference, max_pixels)
            problems.append(None)
        except ImageError as error:
            problems.append(error.message)
    return problems


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture's (first) frame in 8-bit RGB, turned as its EXIF says; what is transparent shows a white background.

    That it has more than `max_pixels` is found out before it is unpacked.
    """
    with _open_image(data, max_pixels) as image:
        try:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
        except ImageError:
            raise
        except _BROKEN as error:
            raise ImageError(f"is broken: {error}") from error
        except MemoryError as error:
            raise ImageError(f"{image.width} x {image.height} pixels do not fit in memory") from error


@dataclass(frozen=True)
class Transform:
    """What makes a square of `size` pixels a side of a picture of any shape; bicubic.

    `random_resized_crop`: 0.9 to 1 of the area, 0.75 to 1.3333 of its shape, by chance; `center_crop`: the short side
    to `size`, then the middle; `pad_to_square`: all of it on a square of CLIP's mean color.
    """

    crop: Crop
    size: int = 224

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """The square of an RGB picture."""
        box: tuple[float, float, float, float] | None = None
        if self.crop == "random_resized_crop":
            image = image.crop(random_box(*image.size, random))
        elif self.crop == "center_crop":
            box = _center_box(image, self.size)
        else:
            image = _padded(image, self.size)
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)


@dataclass(frozen=True)
class ImageJob:
    """One square of pixels to make. `seed` is (run's seed, epoch, document, number of the picture in it)."""

    reference: str
    transform: Transform
    seed: tuple[int, ...] = (0,)
    max_pixels: int = MAX_PIXELS


def pixels(job: ImageJob) -> NDArray[np.uint8]:
    """The pixels that a job asks for, a function of the job alone. [3, size, size]"""
    image = decode(read_reference(job.reference), job.max_pixels)
    square = job.transform(image, np.random.default_rng(job.seed))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def pixels_or_problem(job: ImageJob) -> NDArray[np.uint8] | str:
    """The pixels that a job asks for, or what is wrong with the picture."""
    try:
        return pixels(job)
    except ImageError as error:
        return error.message


def thumbnail(reference: str, side: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """A picture within a square of `side` pixels, as JPEG."""
    image = decode(read_reference(reference), max_pixels)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def normalize(pixels: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """Pixels [..., 3, H, W] from 0 to 255 as CLIP's encoders want them: (x / 255 - mean) / std, on their device.

    They are computed in float32, and rounded to `dtype` once.
    """
    wide = pixels.float()
    mean, std = wide.new_empty(2, 3, 1, 1)
    for tensor, values in ((mean, CLIP_MEAN), (std, CLIP_STD)):
        for channel, value in zip(tensor, values, strict=True):
            channel.fill_(value)  # for a copy to a GPU, the host would wait
    return ((wide / 255 - mean) / std).to(dtype)


def random_box(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of a random resized crop, as torchvision draws it.

    In a picture too long for such a box it is the middle, cut to the nearest shape that is allowed.
    """
    for _ in range(_TRIES):
        area = width * height * random.uniform(*_SCALE)
        ratio = math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
            return left, top, left + w, top + h
    w, h = min(round(height * _RATIO[1]), width), min(round(width / _RATIO[0]), height)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _center_box(image: Image.Image, size: int) -> tuple[float, float, float, float]:
    """The part of a picture that is the middle once its short side has become `size`."""
    short = min(image.size)
    width, height = (int(size * length / short) for length in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    x, y = image.width / width, image.height / height
    return left * x, top * y, min((left + size) * x, image.width), min((top + size) * y, image.height)


def _padded(image: Image.Image, size: int) -> Image.Image:
    side = max(image.size)
    if side**2 > _MOST_PADDED:
        side = 4 * size
        width, height = (max(round(length * side / max(image.size)), 1) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), _PADDING)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode == "F":
        raise ImageError("has floating-point pixels, whose range is not known: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image.convert("RGBA"))
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grayscale of 16 bits in 8. (Pillow's own conversion cuts off at 255.)"""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("has pixels of more than 16 bits: save it with 8 or 16")
    gray = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    try:
        # Pillow's own limit is one for the whole program, and warns below the number at which it refuses.
        with _pillow_limit:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(io.BytesIO(data), formats=_FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except UnidentifiedImageError as error:
        if not data:
            raise ImageError("is empty") from error
        if data.startswith(b"version https://git-lfs"):
            raise ImageError("is a Git LFS pointer, not the picture itself: run git lfs pull") from error
        raise ImageError(f"is not a picture of a known kind ({', '.join(_FORMATS)})") from error
    except _BROKEN as error:
        raise ImageError(f"is broken: {error}") from error
    _scale_transparency(image)
    if image.width * image.height > max_pixels:
        raise ImageError(f"has {image.width:,} x {image.height:,} pixels, more than {max_pixels:,}")
    if not image.width * image.height:
        raise ImageError(f"has {image.width} x {image.height} pixels")
    return image


def _scale_transparency(image: Image.Image) -> None:
    """Brings a PNG's transparent color to the 8 bits that its pixels are read with; Pillow does so for 1 bit only.

    Of colors with 16 bits each the high bytes are compared, as Pillow keeps no more of the pixels.
    """
    color = image.info.get("transparency")
    if not isinstance(image, PngImageFile) or color is None or not image.tile:
        return
    raw: Any = image.tile[0][3]
    if raw in _GRAY_STEPS and isinstance(color, int):
        image.info["transparency"] = color * _GRAY_STEPS[raw]
    elif raw == "RGB;16B" and isinstance(color, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in color)
