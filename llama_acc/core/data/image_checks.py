"""Every image of the data is opened before training starts: header and size, in parallel."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Literal, NamedTuple

import numpy as np

from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.findings import MOST_PROBLEMS, Finding, beginning
from llama_acc.core.data.image_workers import ImageWorkers, default_workers
from llama_acc.core.data.images import shown_reference
from llama_acc.core.errors import DataError, UserError, listed

_CHUNK = 64
_AT_ONCE = 64  # chunks
_ROOT_HINT = "data.sources.root says where relative paths begin"
Tell = Callable[[int, int], None]
"""Called with (images opened, images in all)."""


class BadImage(NamedTuple):
    """An image that cannot be used.

    Attributes:
        document: of the data set, the one that has it.
        reference: which.
        problem: missing, no picture, broken, or too large.
    """

    document: int
    reference: str
    problem: str

    def __str__(self) -> str:
        return f"the image {shown_reference(self.reference)} {self.problem}"


def with_usable_images(
    datasets: Sequence[Dataset],
    max_pixels: int,
    workers: int | None,
    *,
    one_each: bool,
    on_error: Literal["stop", "skip"],
    progress: Tell,
) -> list[Dataset]:
    """Opens all images of the data.

    Args:
        datasets: what is trained and what is held out.
        max_pixels: larger images are refused.
        workers: processes that open them; None = as many as suit this machine.
        one_each: the model takes one image of an item.
        on_error: "skip": items with an image that cannot be used are left out.
        progress: receives how far it is.

    Raises:
        UserError: there are items of more images than the model takes, or none is left.
        DataError: images are missing, no pictures, broken or too large: all uses of them, by item.
    """
    for dataset in datasets if one_each else ():
        if many := np.flatnonzero(dataset.image_counts > 1).tolist():
            places = [f"{dataset.origin(i)} has {dataset.image_counts[i]}" for i in many]
            raise UserError(f"encoder clip takes one image for each item:\n{listed(places)}", "use encoder qformer")
    found = [(dataset, bad_images(dataset, max_pixels, workers or default_workers(), progress)) for dataset in datasets]
    if on_error == "skip":
        return [_without(dataset, bad) for dataset, bad in found]
    lines = (f"{dataset.origin(one.document)}: {one}" for dataset, bad in found for one in bad)
    if problems := list(islice(lines, MOST_PROBLEMS)):
        first = f"these are the first {MOST_PROBLEMS:,}; " if len(problems) == MOST_PROBLEMS else ""
        fix = "mend them, or leave them out with data.on_error=skip"
        raise DataError(problems, f"{first}{fix}; {_ROOT_HINT}")
    return list(datasets)


def _without(dataset: Dataset, bad: Iterator[BadImage]) -> Dataset:
    if (first := next(bad, None)) is None:
        return dataset
    good = dataset.without(
        (one.document, Finding("image_file", dataset.where(one.document), "image", str(one), beginning(one.reference)))
        for one in chain([first], bad)
    )
    if not len(good):
        raise UserError(
            "nothing to train on: no item has images that can be used; "
            f"the first: {dataset.origin(first.document)}: {first}",
            _ROOT_HINT,
        )
    return good


def bad_images(dataset: Dataset, max_pixels: int, workers: int, tell: Tell | None = None) -> Iterator[BadImage]:
    """Opens the images of all documents, then gives each use of one that cannot be used, in the documents' order.

    Args:
        dataset: what will be trained on.
        max_pixels: larger images are refused.
        workers: processes that open them.
        tell: told how far it is.
    """
    documents = np.flatnonzero(dataset.image_counts).tolist()
    references = list(dict.fromkeys(reference for i in documents for reference in dataset.images(i)))
    problems = image_problems(references, max_pixels, workers, tell)
    uses = ((i, reference) for i in documents for reference in dataset.images(i)) if problems else ()
    return (BadImage(i, reference, problems[reference]) for i, reference in uses if reference in problems)


def image_problems(
    references: Sequence[str], max_pixels: int, workers: int, tell: Tell | None = None
) -> dict[str, str]:
    """What is wrong with images, by reference; those that are good are not in it."""
    chunks = [references[i : i + _CHUNK] for i in range(0, len(references), _CHUNK)]
    problems: dict[str, str] = {}
    if not chunks:
        return problems
    with ImageWorkers(min(workers, len(chunks))) as pool:
        for done, chunk, found in _answers(pool, chunks, max_pixels):
            # Where many are not there, they share what is said of them.
            problems |= {reference: sys.intern(p) for reference, p in zip(chunk, found, strict=True) if p is not None}
            if tell is not None:
                tell(done, len(references))
    return problems


def _answers(
    pool: ImageWorkers, chunks: Sequence[Sequence[str]], max_pixels: int
) -> Iterator[tuple[int, Sequence[str], list[str | None]]]:
    """For each chunk the images done so far, the chunk, and what is wrong with its images."""
    waiting: Iterable[Sequence[str]] = iter(chunks)
    done = 0
    while group := list(islice(waiting, _AT_ONCE)):
        for chunk, answer in [(chunk, pool.check(chunk, max_pixels)) for chunk in group]:
            done += len(chunk)
            yield done, chunk, answer.result()
