"""What a model says of images: many in batches, or one as it is written."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.batch_generation import encode_question, generate_batch
from llama_acc.core.data.image_files import Named
from llama_acc.core.data.image_workers import ImageWorkers
from llama_acc.core.data.images import ImageError, ImageJob, Transform
from llama_acc.core.data.templates import Turn
from llama_acc.core.errors import UserError
from llama_acc.core.generation import Generator, Sampling, checked_text, truncate_at_stop_strings, with_images
from llama_acc.core.inference import LoadedModel
from llama_acc.core.tokenizer import StreamDecoder

# Images are loaded so many batches at a time: the next ones while a model is at work.
_BATCHES = 4


class Asked(NamedTuple):
    """What is put to the model with each image.

    Attributes:
        prompt: in tokens, with the places of one image.
        given: the tokens of the prompt that begin the caption.
    """

    prompt: list[int]
    given: list[int]


class Captioned(NamedTuple):
    """A caption, or why there is none.

    Attributes:
        image: of what.
        text: what the model says.
        problem: why it says nothing.
    """

    image: Named
    text: str = ""
    problem: str | None = None


def ask_for_caption(loaded: LoadedModel, beginning: str = "") -> Asked:
    """A caption that begins so, as in stage one: nothing but the image before it.

    Raises:
        UserError: the model takes no images, or the beginning leaves no room.
    """
    # The space before the next word is the model's to write.
    text = checked_text(beginning).rstrip()
    given = loaded.tokenizer.encode(text, own=[(0, len(text))])
    prompt = with_images(loaded, [loaded.tokenizer.bos_id], 1) + given
    _check_room(loaded, prompt)
    return Asked(prompt, given)


def ask_with_instruction(loaded: LoadedModel, instruction: str) -> Asked:
    """An answer to an instruction about the image, in the model's prompt format.

    Raises:
        UserError: the model takes no images, its format has no instruction, or it leaves no room.
    """
    template = loaded.template
    if template.prompt_text([Turn("human", "a")]) == template.prompt_text([Turn("human", "b")]):
        raise UserError(
            f"the prompt format {template.name!r} takes no instruction: the model was trained to caption",
            'leave --instruction out, or give the beginning of a caption with --prompt "The author"',
        )
    return Asked(encode_question(loaded, instruction, images=1), [])


def _check_room(loaded: LoadedModel, prompt: Sequence[int]) -> None:
    context = loaded.model.config.max_seq_len
    if len(prompt) >= context:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context is {context}", "shorten it")


def follows_instructions(loaded: LoadedModel) -> bool:
    """Whether its prompt format is one that it was given instructions in."""
    return loaded.template.name not in ("caption", "none")


def captions(
    loaded: LoadedModel,
    images: Sequence[Named],
    asked: Asked,
    *,
    max_new_tokens: int,
    batch_size: int,
    max_pixels: int,
    workers: ImageWorkers,
) -> Iterator[Captioned]:
    """The greedy caption of each image, in their order; a bad image has a problem in its place.

    Args:
        loaded: a model that takes images. Where several processes share it, they caption one image at a time.
        images: of what.
        asked: what to put to the model.
        max_new_tokens: most tokens of a caption.
        batch_size: most captions under way at a time.
        max_pixels: larger images are refused.
        workers: they decode.
    """
    size = batch_size * _BATCHES
    groups = [images[start : start + size] for start in range(0, len(images), size)]
    load = _Loading(workers, evaluation_transform(loaded), max_pixels)
    following = load(groups[0]) if groups else []
    for number, group in enumerate(groups, start=1):
        # The next images are decoded while the model is at work on these.
        waiting, following = following, load(groups[number]) if number < len(groups) else []
        found = [_result(image) for image in waiting]
        good = [pixels for pixels in found if not isinstance(pixels, str)]
        texts = _texts(loaded, good, asked, max_new_tokens, batch_size)
        for image, pixels in zip(group, found, strict=True):
            yield Captioned(image, problem=pixels) if isinstance(pixels, str) else Captioned(image, next(texts))


class _Loading(NamedTuple):
    """Begins to load images."""

    workers: ImageWorkers
    transform: Transform
    max_pixels: int

    def __call__(self, images: Sequence[Named]) -> "list[Future[NDArray[np.uint8]] | str]":
        return [
            image.problem or self.workers.load(ImageJob(image.reference, self.transform, max_pixels=self.max_pixels))
            for image in images
        ]


def _result(image: "Future[NDArray[np.uint8]] | str") -> NDArray[np.uint8] | str:
    """The pixels of an image, or what is wrong with it."""
    if isinstance(image, str):
        return image
    try:
        return image.result()
    except ImageError as error:
        return error.message


def evaluation_transform(loaded: LoadedModel) -> Transform:
    """What makes of a picture what the model takes.

    Raises:
        UserError: it takes none.
    """
    with_images(loaded, [], 1)
    assert loaded.vision is not None
    return Transform("pad_to_square", loaded.vision.image_size)


def _texts(
    loaded: LoadedModel, images: Sequence[NDArray[np.uint8]], asked: Asked, max_new_tokens: int, batch_size: int
) -> Iterator[str]:
    if loaded.model.parallel.world_size > 1:
        for pixels in images:
            yield "".join(stream_caption(loaded, pixels, asked, max_new_tokens))
        return
    prompts = [asked.prompt] * len(images)
    answers = generate_batch(loaded, prompts, max_new_tokens, batch_size, images=[[pixels] for pixels in images])
    done: dict[int, list[int]] = {}
    for place in range(len(images)):
        while place not in done:
            answer = next(answers)
            done[answer.place] = answer.tokens
        yield _joined(loaded, asked.given + done.pop(place))


def _joined(loaded: LoadedModel, tokens: list[int]) -> str:
    return "".join(
        truncate_at_stop_strings(iter([loaded.tokenizer.decode(tokens)]), loaded.template.text_stops(loaded.tokenizer))
    ).strip()


def stream_caption(loaded: LoadedModel, pixels: NDArray[np.uint8], asked: Asked, max_new_tokens: int) -> Iterator[str]:
    """The greedy caption of one image, piece by piece, with the beginning it was given."""
    generator = Generator(loaded, Sampling(temperature=0, max_new_tokens=max_new_tokens))
    decoder = StreamDecoder(loaded.tokenizer)

    def pieces() -> Iterator[str]:
        for token in itertools.chain(asked.given, generator.tokens(asked.prompt, [pixels])):
            yield decoder.push(token)
        yield decoder.flush()

    begun = False
    for text in truncate_at_stop_strings(pieces(), loaded.template.text_stops(loaded.tokenizer)):
        shown = text if begun else text.lstrip()
        begun = begun or bool(shown)
        if shown:
            yield shown
