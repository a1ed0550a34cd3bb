"""Captions in batches are those of one image at a time, each at its image's place."""

from pathlib import Path

import pytest
import torch
from torch import nn

from llama_acc.core.data.image_files import Named, find_images
from llama_acc.core.data.image_workers import ImageWorkers
from llama_acc.core.data.images import ImageJob, Transform, pixels
from llama_acc.core.data.templates import get_template
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.generate.caption import Captioned, caption_prompt, captions, instruction_prompt, stream_caption
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.vision_encoder import VisionEncoder
from llama_acc.core.tokenizer import load_tokenizer
from tests.core.data.pictures import write_pictures
from tests.core.seeing import TINY, seeing_model
from tests.core.tiny import CPU

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def seeing(tokenizer_path: Path) -> LoadedModel:
    """A model of random weights, which says something else of each image."""
    model = seeing_model("tiny").requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("vision_encoder", "qformer_proj")) and parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    encoder = VisionEncoder(TINY, None, torch.float32, CPU, Parallel())
    return LoadedModel(model, load_tokenizer(tokenizer_path), get_template("caption"), "asked for", CPU, encoder)


@pytest.fixture
def images(tmp_path: Path) -> list[Named]:
    """Six pictures, and between them one that is missing and one that was not found at all."""
    good = [Named(reference, reference) for reference in write_pictures(tmp_path, 6)]
    return [*good[:2], Named("lost", str(tmp_path / "lost.png")), *good[2:5], Named("odd", problem="odd"), good[5]]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("beginning", ["", "the answer"])
def test_a_batch_says_of_each_image_what_it_does_alone(
    seeing: LoadedModel, images: list[Named], batch_size: int, beginning: str
) -> None:
    prompt = caption_prompt(seeing, beginning)
    with ImageWorkers(1) as workers:
        found = list(
            captions(
                seeing,
                images,
                prompt,
                max_new_tokens=NEW_TOKENS,
                batch_size=batch_size,
                max_pixels=10**6,
                workers=workers,
            )
        )
    assert [one.image for one in found] == images
    assert found[2] == Captioned(images[2], problem="was not found")
    assert found[6] == Captioned(images[6], problem="odd")
    for one in found:
        if one.problem is None:
            square = pixels(ImageJob(one.image.reference, Transform("pad_to_square", TINY.image_size)))
            alone = "".join(stream_caption(seeing, square, prompt, NEW_TOKENS))
            assert one.text == alone.strip()
            assert one.text.startswith(beginning)
    assert len({one.text for one in found if one.problem is None}) > 1, "the images do not matter"


def test_a_caption_stands_where_training_has_it(seeing: LoadedModel) -> None:
    words = seeing.tokenizer
    assert caption_prompt(seeing, "the answer ").tokens == [
        words.bos_id,
        *[-1] * TINY.positions,
        *words.encode("the answer"),
    ]
    assert caption_prompt(seeing).tokens == [words.bos_id, *[-1] * TINY.positions]


def test_an_instruction_needs_a_format_that_shows_it(seeing: LoadedModel) -> None:
    with pytest.raises(UserError, match="takes no instruction"):
        instruction_prompt(seeing, "what?")


def test_a_caption_of_one_image_comes_as_it_is_written(seeing: LoadedModel, images: list[Named]) -> None:
    computed: list[int] = []
    handle = seeing.model.register_forward_hook(lambda *_: computed.append(len(computed)))
    square = pixels(ImageJob(images[0].reference, Transform("pad_to_square", TINY.image_size)))
    pieces = stream_caption(seeing, square, caption_prompt(seeing), NEW_TOKENS)
    next(pieces)
    at_first = len(computed)
    assert list(pieces)
    handle.remove()
    assert at_first < len(computed)


def test_names_stand_for_images(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    first, second = tmp_path / "0000.png", tmp_path / "0001.png"
    named = list(
        find_images([str(tmp_path), str(second), f"{tmp_path}/*1.png", f"{tmp_path}/sub", f"{tmp_path}/*.gif"])
    )
    assert [image.reference for image in named] == [str(first), str(second), str(second), str(second), "", ""]
    assert [image.problem is None for image in named] == [True] * 4 + [False] * 2
    assert next(find_images(["https://example.org/a.png"])).problem == (
        "is an address: images are read from disk, download it first"
    )
    # A name with brackets is a name where there is such a file.
    odd = tmp_path / "a[1].png"
    odd.write_bytes(first.read_bytes())
    assert list(find_images([str(odd)])) == [Named(str(odd), str(odd))]
