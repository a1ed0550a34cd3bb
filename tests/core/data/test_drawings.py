"""Drawings show what their captions say, and those held out show nothing that is learned from."""

import io

import numpy as np
import pytest
from PIL import Image

from llama_acc.core.data.drawings import COLORS, SHAPES, SIZE, SPLITS, drawings, drawn_shard, scenes
from llama_acc.core.data.images import read_reference, resolved
from tests.core.data.reading import read_items


def test_no_scene_or_picture_is_on_both_sides_of_a_random_split() -> None:
    sides = {split: set(scenes(split)) for split in SPLITS}
    objects = len(COLORS) * len(SHAPES)
    assert [len(side) for side in sides.values()] == [3100, 344]
    assert len(sides["train"] | sides["held-out"]) == objects * (objects - 1) * 2
    assert not {scene.caption for scene in sides["train"]} & {scene.caption for scene in sides["held-out"]}
    pictures = [{png for png, _ in drawings(split, 300)} for split in SPLITS]
    assert [len(side) for side in pictures] == [300, 300]
    assert not pictures[0] & pictures[1]
    for side in sides.values():
        counts = [sum(scene.first[0] == color for scene in side) for color in COLORS]
        assert min(counts) > 0.5 * len(side) / len(COLORS)


def test_a_scene_is_drawn_anew_each_time_and_the_same_in_every_process() -> None:
    pictures = list(drawings("held-out", 345))
    assert pictures == list(drawings("held-out", 345))
    assert pictures[0][1] == pictures[-1][1]
    assert pictures[0][0] != pictures[-1][0]


def test_a_drawing_shows_what_its_caption_says() -> None:
    for png, caption in drawings("train", 60):
        words = caption.removeprefix("an ").removeprefix("a ").split()
        image = np.asarray(Image.open(io.BytesIO(png))).astype(int)
        assert image.shape == (SIZE, SIZE, 3)
        axis = 1 if "left of" in caption else 0
        places = [place(image, COLORS[word], axis) for word in (words[0], words[-2])]
        assert words[0] == words[-2] or places[0] < places[1], caption


def place(image: np.ndarray, color: tuple[int, int, int], axis: int) -> float:
    """Where along an axis the pixels of about this color are, on the average."""
    near = np.abs(image - np.array(color)).max(-1) <= 20
    assert near.sum() > 20
    return float(np.nonzero(near)[axis].mean())


def test_drawings_are_a_shard_that_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPLITS, "held-out", 20)
    shard = drawn_shard("held-out")
    items, expected = read_items(shard), list(drawings("held-out", 20))
    assert [item.output for item in items] == [caption for _, caption in expected]
    assert read_reference(resolved(items[-1].images[0], shard.parent)) == expected[-1][0]
    before = shard.stat().st_mtime_ns
    assert drawn_shard("held-out").stat().st_mtime_ns == before
    assert [path.name for path in shard.parent.iterdir()] == ["held-out.tar"]
