"""Drawings are the same for the same seed, and those held out show nothing that is learned from."""

import hashlib
import io

import numpy as np
from PIL import Image

from llama_acc.core.data.drawings import COLOURS, PLACES, SHAPES, SIZE, Scene, Shape, draw, drawings, scenes


def test_no_scene_or_picture_is_on_both_sides_of_the_split() -> None:
    learned, held_out = set(scenes("train")), set(scenes("held-out"))
    objects = len(COLOURS) * len(SHAPES)
    assert len(learned) + len(held_out) == objects * (objects - 1) * len(PLACES)
    assert len(held_out) == (len(learned) + len(held_out)) // 10
    assert not learned & held_out
    assert not {scene.caption for scene in learned} & {scene.caption for scene in held_out}
    pictures = [{hashlib.sha256(png).digest() for png, _ in drawings(split, 400)} for split in ("train", "held-out")]
    assert [len(side) for side in pictures] == [400, 400]
    assert not pictures[0] & pictures[1]


def test_the_split_is_random() -> None:
    """Every colour, shape and place is on both sides, about as often as there are scenes."""
    for split in ("train", "held-out"):
        chosen = scenes(split)
        for values, of in [(COLOURS, lambda s: s.first.colour), (SHAPES, lambda s: s.second.shape)]:
            counts = [sum(of(scene) == value for scene in chosen) for value in values]
            assert min(counts) > 0.5 * len(chosen) / len(values)
    assert scenes("held-out", seed=1) != scenes("held-out", seed=0)


def test_drawings_follow_from_the_seed() -> None:
    once, again, other = (list(drawings("train", 5, seed)) for seed in (0, 0, 1))
    assert once == again
    assert [png for png, _ in once] != [png for png, _ in other]


def test_a_scene_is_drawn_anew_each_time() -> None:
    held_out = len(scenes("held-out"))
    pictures = list(drawings("held-out", held_out + 1))
    assert pictures[0][1] == pictures[-1][1]
    assert pictures[0][0] != pictures[-1][0]


def test_a_drawing_shows_what_its_caption_says() -> None:
    for png, caption in drawings("train", 60):
        words = caption.removeprefix("an ").removeprefix("a ").split()
        first, second = COLOURS[words[0]], COLOURS[words[-2]]
        image = np.asarray(Image.open(io.BytesIO(png))).astype(int)
        assert image.shape == (SIZE, SIZE, 3)
        axis = 1 if "left of" in caption else 0
        places = [_place(image, colour, axis) for colour in (first, second)]
        if first != second:
            assert places[0] < places[1], caption


def _place(image: np.ndarray, colour: tuple[int, int, int], axis: int) -> float:
    """Where along an axis the pixels of about this colour are, on the average."""
    near = np.abs(image - np.array(colour)).max(-1) <= 20
    assert near.sum() > 20
    return float(np.nonzero(near)[axis].mean())


def test_captions_are_english() -> None:
    scene = Scene(Shape("orange", "star"), "left of", Shape("red", "cross"))
    assert scene.caption == "an orange star left of a red cross"
    assert draw(scene, np.random.default_rng(0)).size == (SIZE, SIZE)
