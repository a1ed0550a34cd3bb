"""Every image of the data is opened before training starts: header and size, in parallel."""

from collections.abc import Callable, Sequence

from llama_acc.core.data.image_workers import ImageWorkers
from llama_acc.core.data.images import shown_reference

_CHUNK = 64

Tell = Callable[[int, int], None]
"""Called with (images opened, images in all)."""


def check_images(
    images: Sequence[tuple[str, str]], max_pixels: int, workers: int, tell: Tell | None = None
) -> list[str]:
    """What is wrong with images: those that are missing, no pictures, broken or too large.

    Args:
        images: for each use of an image where it is used, such as "llava.json item 17", and its reference.
        max_pixels: larger ones are refused.
        workers: processes that open them.
        tell: told how far it is.

    Returns:
        A line for each use of a bad image, in the order of `images`.
    """
    references = list(dict.fromkeys(reference for _, reference in images))
    chunks = [references[i : i + _CHUNK] for i in range(0, len(references), _CHUNK)]
    problems: dict[str, str] = {}
    if not chunks:
        return []
    with ImageWorkers(min(workers, len(chunks))) as pool:
        answers = [pool.check(chunk, max_pixels) for chunk in chunks]
        done = 0
        for chunk, answer in zip(chunks, answers, strict=True):
            problems |= {reference: p for reference, p in zip(chunk, answer.result(), strict=True) if p is not None}
            done += len(chunk)
            if tell is not None:
                tell(done, len(references))
    return [f"{where}: the image {shown_reference(r)} {problems[r]}" for where, r in images if r in problems]
