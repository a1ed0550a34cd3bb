"""Captions in batches are those of one image at a time, each at its image's place."""

from pathlib import Path

import pytest
import torch
from torch import nn

from llama_acc.core.data.image_files import ImageWorkers, Named
from llama_acc.core.data.images import ImageJob, Transform, pixels
from llama_acc.core.data.templates import get_template
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.generate.caption import Captioned, caption_prompt, captions, instruction_prompt, stream_caption
from llama_acc.core.generate.load import LoadedModel, VisionEncoder
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


def test_a_batch_says_of_each_image_what_it_does_alone(seeing: LoadedModel, tmp_path: Path) -> None:
    """Six pictures, and between them one that is missing and one that was not found at all."""
    good = [Named(reference, reference) for reference in write_pictures(tmp_path, 6)]
    images = [*good[:2], Named("lost", str(tmp_path / "lost.png")), *good[2:5], Named("odd", problem="odd"), good[5]]
    with ImageWorkers(1) as workers:
        for beginning in ("", "the answer"):
            prompt, alone = caption_prompt(seeing, beginning), {}
            for one in good:
                square = pixels(ImageJob(one.reference, Transform("pad_to_square", TINY.image_size)))
                alone[one] = "".join(stream_caption(seeing, square, prompt, NEW_TOKENS)).strip()
            assert all(text.startswith(beginning) for text in alone.values())
            assert len(set(alone.values())) > 1, "the images do not matter"
            for batch_size in (1, 2, 16):
                found = captions(
                    seeing,
                    images,
                    prompt,
                    max_new_tokens=NEW_TOKENS,
                    batch_size=batch_size,
                    max_pixels=10**6,
                    workers=workers,
                )
                problems = {"lost": "was not found", "odd": "odd"}
                assert list(found) == [
                    Captioned(one, alone.get(one, ""), problem=problems.get(one.name)) for one in images
                ]


def test_a_caption_stands_where_training_has_it_and_comes_as_it_is_written(seeing: LoadedModel, tmp_path: Path) -> None:
    words, image = seeing.tokenizer, [-1] * TINY.positions
    assert caption_prompt(seeing, "the answer ").tokens == [words.bos_id, *image, *words.encode("the answer")]
    assert caption_prompt(seeing).tokens == [words.bos_id, *image]
    with pytest.raises(UserError, match="takes no instruction"):
        instruction_prompt(seeing, "what?")
    computed: list[int] = []
    handle = seeing.model.output.register_forward_hook(lambda *_: computed.append(len(computed)))
    (reference,) = write_pictures(tmp_path, 1)
    square = pixels(ImageJob(reference, Transform("pad_to_square", TINY.image_size)))
    pieces = stream_caption(seeing, square, caption_prompt(seeing), NEW_TOKENS)
    next(pieces)
    at_first = len(computed)
    assert list(pieces)
    handle.remove()
    assert at_first < len(computed)
