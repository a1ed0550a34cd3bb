"""Captions of images: many in batches, or one as it is written; and a page that shows them."""

import base64
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_acc.core.data.image_files import ImageWorkers, Named
from llama_acc.core.data.images import MAX_PIXELS, ImageError, ImageJob, Transform, pixels_or_problem, thumbnail
from llama_acc.core.data.templates import Turn
from llama_acc.core.errors import UserError
from llama_acc.core.generate.chat import check_length, checked_text, encode_question, insert_images
from llama_acc.core.generate.engine import Engine, Prompt
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.text import escape_control_chars

# Images are loaded so many batches ahead, while the model is at work.
_BATCHES_AHEAD = 4
_THUMBNAIL = 320  # pixels of a picture's longer side on the page


class Captioned(NamedTuple):
    """An image with its caption, or the problem why there is none."""

    image: Named
    text: str = ""
    problem: str | None = None


def caption_prompt(loaded: LoadedModel, beginning: str = "") -> Prompt:
    """The prompt of a caption that begins so, as in stage one: nothing but the image before it.

    Raises:
        UserError: the model takes no images, or the beginning leaves no room.
    """
    # The space before the next word is the model's to write.
    text = checked_text(beginning).rstrip()
    prefill = loaded.tokenizer.encode(text, own=[(0, len(text))])
    tokens = insert_images(loaded, [loaded.tokenizer.bos_id], 1) + prefill
    check_length(loaded, tokens)
    return Prompt(tokens, prefill=prefill, strip=True)


def instruction_prompt(loaded: LoadedModel, instruction: str) -> Prompt:
    """The prompt of an answer to an instruction about the image, in the model's prompt format.

    Raises:
        UserError: the model takes no images, its format has no instruction, or it leaves no room.
    """
    template = loaded.template
    if template.prompt_text([Turn("human", "a")]) == template.prompt_text([Turn("human", "b")]):
        raise UserError(
            f"the prompt format {template.name!r} takes no instruction: the model was trained to caption",
            'leave --instruction out, or give the beginning of a caption with --prompt "The author"',
        )
    return encode_question(loaded, instruction, images=1)._replace(strip=True)


def follows_instructions(loaded: LoadedModel) -> bool:
    """Whether a model was given instructions in its prompt format."""
    return loaded.template.name not in ("caption", "none")


def evaluation_transform(loaded: LoadedModel) -> Transform:
    """What makes of a picture the model's input; a UserError if it takes none."""
    insert_images(loaded, [], 1)
    assert loaded.vision is not None
    return Transform("pad_to_square", loaded.vision.image_size)


def load_image(loaded: LoadedModel, reference: str, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """A picture as the model takes it."""
    pixels = pixels_or_problem(ImageJob(reference, evaluation_transform(loaded), max_pixels=max_pixels))
    if isinstance(pixels, str):
        raise UserError(f"{name}: {pixels}")
    return pixels


def captions(
    loaded: LoadedModel,
    images: Sequence[Named],
    prompt: Prompt,
    *,
    max_new_tokens: int,
    batch_size: int,
    max_pixels: int,
    workers: ImageWorkers,
) -> Iterator[Captioned]:
    """The greedy caption of each image, in their order; a bad image has a problem in its place.

    Each comes with the same prompt, at most `batch_size` of them are under way at a time, those of more than
    `max_pixels` are refused.
    """
    transform = evaluation_transform(loaded)
    done: dict[int, Captioned] = {}
    places: list[int] = []  # of the images that the model is asked about

    def prompts() -> Iterator[Prompt]:
        jobs = (
            [] if image.problem else [ImageJob(image.reference, transform, max_pixels=max_pixels)] for image in images
        )
        decoded = workers.map_ahead(pixels_or_problem, jobs, _BATCHES_AHEAD * batch_size)
        for place, (image, found) in enumerate(zip(images, decoded, strict=True)):
            pixels = found[0] if found else image.problem or ""
            if isinstance(pixels, str):
                done[place] = Captioned(image, problem=pixels)
            else:
                places.append(place)
                yield prompt._replace(images=[pixels])

    sampler = Sampler(Sampling(temperature=0, max_new_tokens=max_new_tokens))
    shown = 0
    for reply, _ in Engine(loaded).generate(prompts(), sampler, batch_size):
        if reply.ended:
            place = places[reply.index]
            done[place] = Captioned(images[place], reply.text)
        while shown in done:
            yield done.pop(shown)
            shown += 1
    yield from (done[place] for place in sorted(done))


def stream_caption(
    loaded: LoadedModel, pixels: NDArray[np.uint8], prompt: Prompt, max_new_tokens: int
) -> Iterator[str]:
    """The greedy caption of one image, piece by piece, with the beginning it was given."""
    sampler = Sampler(Sampling(temperature=0, max_new_tokens=max_new_tokens))
    replies = Engine(loaded).generate([prompt._replace(images=[pixels])], sampler)
    return (text for _, text in replies if text)


def caption_page(title: str, note: str, shown: Iterable[Captioned], max_pixels: int) -> Iterator[str]:
    """A contact sheet with a heading, a line below it and captions, each with its image as a JPEG; in parts to be
    written one after the other, as the captions come."""
    from jinja2 import Environment

    def picture(caption: Captioned) -> str:
        with contextlib.suppress(ImageError):  # it was there a moment ago
            jpeg = thumbnail(caption.image.reference, _THUMBNAIL, max_pixels)
            return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"
        return ""

    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters |= {"visible": escape_control_chars, "picture": picture}
    source = files(__package__).joinpath("caption.html").read_text(encoding="utf-8")
    yield from environment.from_string(source).generate(title=title, note=note, shown=shown)
