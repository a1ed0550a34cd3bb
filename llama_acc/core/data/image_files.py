"""Which images a command line names; processes that open images ahead; and the check of all images before a run.

What the processes make is a function of the job alone, so their number changes nothing.
"""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from llama_acc.core.catalogue import is_address
from llama_acc.core.data.findings import MOST_PROBLEMS, Finding
from llama_acc.core.data.images import IMAGE_SUFFIXES, header_problems, resolved, shown_reference
from llama_acc.core.data.items import SingleTurn, item_of
from llama_acc.core.data.read import TAR_SUFFIX, stream_rows
from llama_acc.core.data.sources import resolve_data_path
from llama_acc.core.errors import DataError, UserError, listed
from llama_acc.core.workers import WorkerPool, cores

if TYPE_CHECKING:
    from llama_acc.core.data.dataset import Dataset

_MOST_WORKERS = 8
_CHUNK = 64
_CHUNKS_AHEAD = 32
_ROOT_HINT = "data.sources.root says where relative paths begin"

Progress = Callable[[int, int], None]
"""Called with (images opened, images in all)."""


def default_workers(processes_here: int = 1) -> int:
    """How many workers each of so many training processes on this machine takes."""
    return min(max(cores() // processes_here - 1, 1), _MOST_WORKERS)


class ImageWorkers(WorkerPool):
    """Processes that open and decode pictures."""

    def __init__(self, count: int) -> None:
        super().__init__(count, "decodes images", "if memory ran out: lower data.images.workers")


def image_problems(
    references: Iterable[str], max_pixels: int, workers: ImageWorkers, progress: Progress | None = None
) -> dict[str, str]:
    """What is wrong with images, by reference, as their headers show; those that are good are not in it."""
    unique = list(dict.fromkeys(references))
    chunks = [unique[i : i + _CHUNK] for i in range(0, len(unique), _CHUNK)]
    problems: dict[str, str] = {}
    check = partial(header_problems, max_pixels=max_pixels)
    answers = workers.map_ahead(check, ([chunk] for chunk in chunks), _CHUNKS_AHEAD) if chunks else ()
    for number, (chunk, [answer]) in enumerate(zip(chunks, answers, strict=True)):
        problems.update((reference, wrong) for reference, wrong in zip(chunk, answer, strict=True) if wrong is not None)
        if progress is not None:
            progress(number * _CHUNK + len(chunk), len(unique))
    return problems


def with_usable_images(
    datasets: Sequence["Dataset"],
    max_pixels: int,
    workers: int | None,
    *,
    one_each: bool,
    on_error: Literal["stop", "skip"],
    progress: Progress,
) -> list["Dataset"]:
    """Opens all images of the data; with `on_error` "skip", items with one that cannot be used are left out.

    So many workers open them, or as many as suit this machine. `one_each`: the model takes one image of an item.

    Raises:
        UserError: there are items of more images than the model takes, or none is left.
        DataError: images are missing, no pictures, broken or too large: all uses of them, by item.
    """
    for dataset in datasets if one_each else ():
        if many := np.flatnonzero(dataset.image_counts > 1).tolist():
            places = [f"{dataset.origin(i)} has {dataset.image_counts[i]}" for i in many]
            raise UserError(f"encoder clip takes one image for each item:\n{listed(places)}", "use encoder qformer")
    with ImageWorkers(workers or default_workers()) as pool:
        references = (reference for dataset in datasets for _, reference in _uses(dataset))
        problems = image_problems(references, max_pixels, pool, progress)
    if not problems:
        return list(datasets)
    if on_error == "skip":
        return [_without(dataset, problems) for dataset in datasets]
    wrong = (f"{dataset.origin(i)}: {said}" for dataset in datasets for i, said in _bad_uses(dataset, problems))
    lines = list(islice(wrong, MOST_PROBLEMS))
    first = f"these are the first {MOST_PROBLEMS:,}; " if len(lines) == MOST_PROBLEMS else ""
    raise DataError(lines, f"{first}mend them, or leave them out with data.on_error=skip; {_ROOT_HINT}")


def _uses(dataset: "Dataset") -> Iterator[tuple[int, str]]:
    """Every document with each of its images."""
    return ((i, reference) for i in np.flatnonzero(dataset.image_counts).tolist() for reference in dataset.images(i))


def _bad_uses(dataset: "Dataset", problems: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Every document with what is wrong with each of its images."""
    for i, reference in _uses(dataset):
        if reference in problems:
            yield i, f"the image {shown_reference(reference)} {problems[reference]}"


def _without(dataset: "Dataset", problems: dict[str, str]) -> "Dataset":
    found = ((i, Finding("image_file", dataset.where(i), "image", said)) for i, said in _bad_uses(dataset, problems))
    good = dataset.without(found)
    if not len(good):
        i, said = next(_bad_uses(dataset, problems))
        none = "nothing to train on: no item has images that can be used; the first"
        raise UserError(f"{none}: {dataset.origin(i)}: {said}", _ROOT_HINT)
    return good


class Named(NamedTuple):
    """An image that was named, or what is wrong with a name."""

    name: str
    reference: str = ""
    problem: str | None = None  # why there is none; the reference is then empty
    caption: str | None = None  # what a shard says of it


def find_images(names: Iterable[str]) -> Iterator[Named]:
    """The images that names stand for, in this order; a name that stands for none is given with its problem.

    Names are of files, folders (the images directly in them, sorted), globs, `.tar` shards, or `shipped:NAME`.
    """
    for name in names:
        try:
            yield from _images_of(name)
        except UserError as error:
            yield Named(name, problem=error.message if error.hint is None else f"{error.message}: {error.hint}")


def _images_of(name: str) -> Iterator[Named]:
    path = resolve_data_path(name) if name.startswith("shipped:") else Path(name).expanduser()
    if is_address(name) and not path.exists():
        raise UserError("is an address: images are read from disk, download it first")
    if path.is_dir():
        images = [file for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
        images = [file for file in images if not file.name.startswith(".")]
        if not images:
            raise UserError(f"no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
        yield from (Named(str(Path(name) / file.name), str(file)) for file in images)
    elif path.suffix.lower() == TAR_SUFFIX:
        for where, value, problem in stream_rows(path):
            item, found = (None, []) if problem is not None else item_of(value, "single_turn")
            if problem is not None or found:
                yield Named(f"{path}: {where}", problem=problem or found[0].message)
            elif item is not None and item.images:
                caption = item.output if isinstance(item, SingleTurn) and not item.instruction else None
                yield Named(f"{path}: {where}", resolved(item.images[0], path.parent), caption=caption)
    elif glob.has_magic(name) and not path.exists():
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not matches:
            raise UserError("no file matches")
        yield from (Named(match, match) for match in matches)
    else:
        yield Named(name, str(path))
