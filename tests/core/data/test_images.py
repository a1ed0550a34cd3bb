"""Pictures of every kind become 8-bit RGB, and squares of pixels by torchvision's arithmetic."""

import struct
import zlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llama_acc.core.data import images
from llama_acc.core.data.images import (
    Crop,
    ImageError,
    ImageJob,
    Transform,
    check_header,
    decode,
    member_reference,
    normalize,
    pixels,
    random_box,
    read_reference,
    shown_reference,
)
from tests.core.data.pictures import encoded, pattern, plain

RANDOM = np.random.default_rng(0)

# By torchvision 0.29.1, of `pattern(width, height)`: the red and the blue pixels of both diagonals.
# center_crop: Compose([Resize(5, BICUBIC), CenterCrop(5)]); pad_to_square: Resize((5, 5), BICUBIC) of functional.pad
# to the longer side with (122, 116, 104), the smaller half before; random_resized_crop: functional.resized_crop with
# top=2, left=3, height=30, width=25, size=[5, 5], BICUBIC.
_TORCHVISION = {
    ("center_crop", 60, 40): [
        [[159, 75, 171, 124, 87], [142, 174, 171, 135, 76]],
        [[128, 160, 74, 164, 125], [149, 101, 74, 103, 143]],
    ],
    ("pad_to_square", 60, 40): [
        [[108, 133, 143, 146, 113], [131, 140, 143, 118, 110]],
        [[123, 108, 111, 110, 127], [110, 128, 111, 129, 109]],
    ],
    ("center_crop", 30, 70): [
        [[64, 191, 65, 186, 60], [183, 124, 65, 84, 136]],
        [[169, 75, 160, 83, 152], [65, 108, 160, 195, 168]],
    ],
    ("pad_to_square", 30, 70): [
        [[121, 122, 123, 119, 121], [122, 133, 123, 130, 122]],
        [[103, 118, 131, 120, 104], [103, 114, 131, 117, 103]],
    ],
    ("random_resized_crop", 60, 40): [
        [[113, 189, 71, 202, 72], [140, 65, 71, 120, 164]],
        [[201, 62, 190, 72, 143], [93, 138, 190, 191, 107]],
    ],
}


def middle(image: Image.Image) -> Any:
    """The pixel in the middle of a picture."""
    return image.getpixel((image.width // 2, image.height // 2))


@pytest.mark.parametrize(("crop", "width", "height"), list(_TORCHVISION))
def test_crops_are_torchvisions(crop: Any, width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "random_box", lambda *_: (3, 2, 28, 32))
    square = np.asarray(Transform(crop, 5)(pattern(width, height), RANDOM)).astype(int)
    places = np.arange(5)
    for channel, diagonals in zip((0, 2), _TORCHVISION[crop, width, height], strict=True):
        found = [square[places, places, channel], square[places, 4 - places, channel]]
        assert np.abs(np.subtract(found, diagonals)).max() <= 1


def test_random_boxes_are_torchvisions() -> None:
    boxes = np.array([random_box(640, 480, np.random.default_rng([1, i])) for i in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= [640, 480]).all()
    assert (boxes[:, :2].max(0) > 20).all()
    areas, ratios = width * height / (640 * 480), width / height
    assert 0.895 < areas.min() < 0.91 < 0.97 < areas.max() <= 1
    assert 1.1 < ratios.min() < 1.3 < ratios.max() < 1.34
    # RandomResizedCrop.get_params of pictures no box fits in.
    assert random_box(100, 10, RANDOM) == (43, 0, 56, 10)
    assert random_box(10, 100, RANDOM) == (0, 43, 10, 56)
    assert random_box(640, 1, RANDOM) == (319, 0, 320, 1)


def test_normalized_pixels_are_torchvisions() -> None:
    # Compose([ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])(pattern(60, 40))[:, 7, 11]
    values = torch.from_numpy(np.asarray(pattern(60, 40)).transpose(2, 0, 1).copy())
    assert normalize(values, torch.float32)[:, 7, 11].tolist() == pytest.approx([0.8792, 1.7447, -1.0963], abs=1e-4)


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (1, 1), (5, 7)])
def test_any_shape_becomes_a_square(size: tuple[int, int]) -> None:
    for crop in get_args(Crop):
        assert Transform(crop, 16)(plain((9, 9, 9), size=size), RANDOM).size == (16, 16)


def test_what_chance_decides_follows_from_the_seed_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pattern(80, 60)))
    transform = Transform("random_resized_crop", 16)
    once, again, other = (pixels(ImageJob(str(path), transform, seed)) for seed in [(0, 1, 2, 0), (0, 1, 2, 0), (0, 2)])
    assert (once == again).all()
    assert (once != other).any()
    assert (once.shape, once.dtype) == ((3, 16, 16), np.uint8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_file_format_is_read_and_of_several_frames_the_first(format: str) -> None:
    more = {"save_all": True, "append_images": [plain((0, 250, 0))]} if format in ("GIF", "WEBP", "TIFF") else {}
    assert np.abs(np.subtract(middle(decode(encoded(plain((200, 40, 90)), format, **more))), (200, 40, 90))).max() <= 4


@pytest.mark.parametrize(("value", "gray"), [(0, 0), (257, 1), (32768, 128), (65535, 255)])
def test_16_bits_become_8_without_being_cut_off(value: int, gray: int) -> None:
    image = Image.fromarray(np.full((6, 8), value, np.uint16))
    assert middle(decode(encoded(image))) == (gray,) * 3
    assert middle(decode(encoded(image, "TIFF"))) == (gray,) * 3


@pytest.mark.parametrize(
    ("mode", "color", "format", "expected"),
    [
        ("L", 77, "PNG", (77, 77, 77)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), "TIFF", (0, 255, 255)),
        ("CMYK", (0, 0, 255, 0), "JPEG", (255, 255, 0)),
        # Half transparent black on white is gray; what cannot be seen at all is white.
        ("LA", (0, 128), "PNG", (127, 127, 127)),
        ("RGBA", (0, 0, 0, 0), "PNG", (255, 255, 255)),
        ("RGBA", (255, 0, 0, 128), "WEBP", (255, 127, 127)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, color: Any, format: str, expected: tuple[int, int, int]) -> None:
    settings = {"lossless": True} if format == "WEBP" else {}
    assert np.abs(np.subtract(middle(decode(encoded(plain(color, mode), format, **settings))), expected)).max() <= 2


GRAY, RGB = 0, 2


def png(depth: int, color: int, samples: list[int], transparent: tuple[int, ...] | None) -> bytes:
    """A PNG of one row, as its specification has it; Pillow writes gray and RGB with 8 bits only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", len(samples) // (3 if color == RGB else 1), 1, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")]
    if transparent is not None:
        parts.insert(1, chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "pixels"),
    [
        (png(16, RGB, [65535, 32896, 0], None), [(255, 128, 0)]),
        (png(1, GRAY, [0, 1] * 4, (1,)), [(0, 0, 0), (255, 255, 255)] * 4),
        (png(2, GRAY, [0, 1, 2, 3], (2,)), [(0, 0, 0), (85, 85, 85), (255, 255, 255), (255, 255, 255)]),
        (png(4, GRAY, [0, 5, 10, 15], (5,)), [(0, 0, 0), (255, 255, 255), (170, 170, 170), (255, 255, 255)]),
        (png(8, GRAY, [0, 5, 10], (5,)), [(0, 0, 0), (255, 255, 255), (10, 10, 10)]),
        (png(16, GRAY, [0, 0x1234, 0x8080], (0x1234,)), [(0, 0, 0), (255, 255, 255), (128, 128, 128)]),
        (png(8, RGB, [1, 2, 3, 4, 5, 6], (1, 2, 3)), [(255, 255, 255), (4, 5, 6)]),
        (png(16, RGB, [0x1234, 0, 0, 0xFFFF, 0, 0], (0x1234, 0, 0)), [(255, 255, 255), (255, 0, 0)]),
    ],
)
def test_the_one_transparent_color_of_a_png_shows_the_background_at_every_depth(
    content: bytes, pixels: list[tuple[int, ...]]
) -> None:
    image = decode(content)
    assert [image.getpixel((x, 0)) for x in range(image.width)] == pixels


def test_a_transparent_color_of_a_palette_shows_the_background() -> None:
    image = plain(0, "P")
    image.putpalette([200, 0, 0, 0, 200, 0])
    for format, transparent, color in [
        ("PNG", 0, (255, 255, 255)),
        ("GIF", 0, (255, 255, 255)),
        ("PNG", 1, (200, 0, 0)),
    ]:
        assert middle(decode(encoded(image, format, transparency=transparent))) == color


def test_a_picture_is_turned_as_its_exif_says() -> None:
    image = Image.new("RGB", (8, 4), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 4, 4))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned by a quarter, clockwise
    turned = decode(encoded(image, "PNG", exif=exif))
    assert turned.size == (4, 8)
    assert turned.getpixel((2, 1)) == (255, 255, 255)
    assert turned.getpixel((2, 6)) == (0, 0, 0)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_unpacked() -> None:
    small, limit = encoded(plain(0, size=(100, 100))), Image.MAX_IMAGE_PIXELS
    header = b"IHDR" + struct.pack(">II", 30000, 20000) + small[24:29]  # that of 600 million pixels
    bomb = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    with pytest.raises(ImageError, match="30,000 x 20,000 pixels, more than 100,000,000"):
        decode(bomb)
    with pytest.raises(ImageError, match="more than 9,999"):
        decode(small, max_pixels=9_999)
    assert decode(small, max_pixels=10_000).size == (100, 100)
    assert limit == Image.MAX_IMAGE_PIXELS, "Pillow's own limit is left alone"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"just text, no picture", "is not a picture of a known kind"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture of a known kind"),
        (encoded(pattern(90, 90), "JPEG")[:900], "is broken"),
        (encoded(pattern(90, 90))[:-900], "is broken"),
        (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "more than 16 bits"),
    ],
)
def test_what_is_no_picture_says_why(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        decode(data)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    st.floats(0.2, 1),
)
def test_a_damaged_file_is_a_picture_or_an_image_error(
    format: str, changes: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(encoded(pattern(40, 30), format))
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        assert decode(bytes(data[: int(kept * len(data))]), max_pixels=10**6).mode == "RGB"
    except ImageError as error:
        assert error.message  # noqa: PT017  (either is right)


def test_a_member_of_a_tar_is_read_by_its_place(tmp_path: Path) -> None:
    picture = encoded(plain((1, 2, 3)))
    shard = tmp_path / "a b#1.tar"
    shard.write_bytes(b"x" * 700 + picture + b"y" * 100)
    reference = member_reference(shard, 700, len(picture))
    assert read_reference(reference) == picture
    assert check_header(reference) == (8, 6)
    assert pixels(ImageJob(reference, Transform("center_crop", 4)))[:, 2, 2].tolist() == [1, 2, 3]
    assert shown_reference(reference) == f"{shard} at byte 700"


def test_a_header_is_checked_without_the_pixels_unless_the_end_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    profile = {"icc_profile": bytes(40_000)}  # the header stands behind it
    for kind, end, more in (("PNG", 12, {}), ("JPEG", 2, {}), ("JPEG", 2, profile)):
        picture = encoded(pattern(90, 90), kind, quality=95, **more)
        broken_inside = picture[:-500] + picture[-end:]
        for whole in (picture, picture + bytes(100), broken_inside, *([picture[:-end]] if kind == "PNG" else [])):
            path.write_bytes(whole)
            assert check_header(str(path)) == (90, 90)
        path.write_bytes(picture[:-500])
        with pytest.raises(ImageError, match="is broken: image file is truncated"):
            check_header(str(path))
    for reference, said in [
        (str(tmp_path / "no.png"), "was not found"),
        (str(tmp_path), "cannot be read: it is a folder"),
        ("a\0b.png", "cannot be read"),
        (member_reference(tmp_path / "no.tar", 0, 9), "was not found"),
    ]:
        with pytest.raises(ImageError, match=said):
            check_header(reference)
