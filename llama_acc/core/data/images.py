"""Pictures: from a file, or a member of a tar shard, to 8-bit RGB, and from that to the square a model sees.

Imports no torch: worker processes do this. The arithmetic is Pillow's, which is torchvision's for pictures.

A reference says in text where a picture is: a path, or "shard.tar#OFFSET+SIZE", a member of a plain tar.
"""

import hashlib
import io
import math
import re
import struct
import threading
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

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

Crop = Literal["random_resized_crop", "centre_crop", "pad_to_square"]
CROPS: tuple[Crop, ...] = get_args(Crop)

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
_GROUND = (255, 255, 255, 255)
_SCALE, _RATIO, _TRIES = (0.9, 1.0), (0.75, 1.3333), 10
_PADDING = (122, 116, 104)  # CLIP_MEAN in whole steps, as LLaMA2-Accessory has it
_AT_ONCE = 2**27  # pixels; a long strip must not need far more memory than itself
_GREY_STEPS = {"L;2": 85, "L;4": 17}
"""From one value of grey with 2 or 4 bits to the next, in 8 bits."""
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


def read_reference(reference: str) -> bytes:
    """The bytes of a picture.

    Raises:
        ImageError: it is not there, or cannot be read.
    """
    with _open_reference(reference) as file:
        try:
            return file.read()
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error


def digest(reference: str) -> str:
    """sha256 of a picture's bytes; remembered as long as its file is not written to.

    Raises:
        ImageError: it is not there, or cannot be read.
    """
    member = _MEMBER.fullmatch(reference)
    try:
        status = Path(reference if member is None else member["shard"]).stat()
    except (OSError, ValueError) as error:
        raise _unreadable(error) from error
    return _digest(reference, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2**20)
def _digest(reference: str, modified: int, size: int) -> str:
    return hashlib.sha256(read_reference(reference)).hexdigest()


def check_header(reference: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of a picture as its header has them; the pixels are not decoded.

    Raises:
        ImageError: missing, no picture, or of more than `max_pixels`.
    """
    with _open_reference(reference) as file, _opened(file, max_pixels) as image:
        return image.size


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture's (first) frame in 8-bit RGB, turned as its EXIF says; what is transparent shows a white ground.

    Raises:
        ImageError: no picture, broken, or of more than `max_pixels`, which is found out before it is unpacked.
    """
    with _opened(io.BytesIO(data), max_pixels) as image:
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
    """What makes a square of `size` pixels of a picture of any shape; bicubic.

    Attributes:
        crop: `random_resized_crop`: 0.9 to 1 of the area, 0.75 to 1.3333 of its shape, by chance; `centre_crop`: the
            short side to `size`, then the middle; `pad_to_square`: all of it on a square of CLIP's mean colour.
        size: of the square's side.
    """

    crop: Crop
    size: int = 224

    @property
    def is_random(self) -> bool:
        """Whether it uses a generator."""
        return self.crop == "random_resized_crop"

    def key(self) -> str:
        """What decides its result, besides the picture and chance."""
        return f"{self.crop}-{self.size}"

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """The square of an RGB picture."""
        if self.crop == "random_resized_crop":
            return _resized(image.crop(random_box(*image.size, random)), self.size)
        if self.crop == "centre_crop":
            return _centre_cropped(image, self.size)
        return _resized(_padded(image, self.size), self.size)


@dataclass(frozen=True)
class ImageJob:
    """One square of pixels to make. `seed` is (run's seed, epoch, document, number of the picture in it)."""

    reference: str
    transform: Transform
    seed: tuple[int, ...] = (0,)
    max_pixels: int = MAX_PIXELS


def pixels(job: ImageJob) -> NDArray[np.uint8]:
    """The pixels that a job asks for, a function of the job alone. [3, size, size]

    Raises:
        ImageError: as `decode`, and if the file is not there.
    """
    image = decode(read_reference(job.reference), job.max_pixels)
    square = job.transform(image, np.random.default_rng(job.seed))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def thumbnail(reference: str, side: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """A picture within a square of `side` pixels, as JPEG.

    Raises:
        ImageError: as `pixels`.
    """
    image = decode(read_reference(reference), max_pixels)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def normalised(pixels: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """Pixels [..., 3, H, W] from 0 to 255 as CLIP's encoders want them: (x / 255 - mean) / std, on their device.

    They are computed in float32, and rounded to `dtype` once.
    """
    wide = pixels.float()
    mean, std = (wide.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((wide / 255 - mean) / std).to(dtype)


def random_box(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of a random resized crop, as torchvision draws it."""
    for _ in range(_TRIES):
        area = width * height * random.uniform(*_SCALE)
        ratio = math.exp(random.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
            return left, top, left + w, top + h
    return fallback_box(width, height)


def fallback_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The middle, cut to the nearest shape that is allowed: for pictures too long for a random box."""
    w, h = width, height
    if width / height < _RATIO[0]:
        h = min(round(width / _RATIO[0]), height)
    elif width / height > _RATIO[1]:
        w = min(round(height * _RATIO[1]), width)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resized(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _centre_cropped(image: Image.Image, size: int) -> Image.Image:
    short = min(image.size)
    width, height = (int(size * length / short) for length in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if width * height <= _AT_ONCE:
        whole = image.resize((width, height), Image.Resampling.BICUBIC)
        return whole.crop((left, top, left + size, top + size))
    # Of a long strip only the middle is made, equal but for rounding.
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min((left + size) * x, image.width), min((top + size) * y, image.height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _padded(image: Image.Image, size: int) -> Image.Image:
    side = max(image.size)
    if side**2 > _AT_ONCE:
        side = 4 * size
        width, height = (max(round(length * side / max(image.size)), 1) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), _PADDING)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode == "F":
        raise ImageError("has floating-point pixels, whose range is not known: save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _GROUND), rgba)
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits in 8. (Pillow's own conversion cuts off at 255.)"""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("has pixels of more than 16 bits: save it with 8 or 16")
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _opened(file: IO[bytes], max_pixels: int) -> Image.Image:
    try:
        # Pillow's own limit is one for the whole program, and warns below the number at which it refuses.
        with _pillow_limit:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(file, formats=_FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except UnidentifiedImageError as error:
        raise ImageError(_not_an_image(file)) from error
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
    if raw in _GREY_STEPS and isinstance(color, int):
        image.info["transparency"] = color * _GREY_STEPS[raw]
    elif raw == "RGB;16B" and isinstance(color, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _not_an_image(file: IO[bytes]) -> str:
    file.seek(0)
    start = file.read(64)
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the picture itself: run git lfs pull"
    return f"is not a picture of a known kind ({', '.join(_FORMATS)})"


def _open_reference(reference: str) -> IO[bytes]:
    member = _MEMBER.fullmatch(reference)
    try:
        if member is None:
            return open_input(Path(reference), pipes=False, buffered=True)
        return io.BufferedReader(_Slice(Path(member["shard"]), int(member["offset"]), int(member["size"])))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(error) from error


def _unreadable(error: OSError | ValueError) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError("is not there")
    return ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}")


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = open_input(path, pipes=False)
        self._offset, self._size, self._place = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(base + offset, 0)
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        room = memoryview(buffer)[: max(self._size - self._place, 0)]
        self._file.seek(self._offset + self._place)
        count = self._file.readinto(room) or 0
        self._place += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
