"""The images that a command line names: files, folders, globs and shards."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llama_acc.core.catalogue import is_address
from llama_acc.core.data.images import IMAGE_SUFFIXES, resolved
from llama_acc.core.data.items import SingleTurn, item_of
from llama_acc.core.data.sources import resolve_data_path
from llama_acc.core.data.tar_shards import TAR_SUFFIX, tar_rows
from llama_acc.core.errors import UserError


class Named(NamedTuple):
    """An image that was named, or what is wrong with a name."""

    name: str
    reference: str = ""
    problem: str | None = None
    """Why there is none; the reference is then empty."""
    caption: str | None = None
    """What a shard says of it."""


def find_images(names: Iterable[str]) -> Iterator[Named]:
    """The images that names stand for, in this order; a name that stands for none is given with its problem.

    Args:
        names: files; folders (the images directly in them, sorted); globs; `.tar` shards; `shipped:NAME`.
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
        for where, value, problem in tar_rows(path):
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
