"""Shards as WebDataset has them: plain .tar files in which a picture stands beside its text, under one name.

`0001.jpg` goes with `0001.txt`, a caption, or `0001.json`: an item, or an object with a `caption` (as img2dataset
writes it). The members of a sample follow each other. Pictures are not read here: a row says at which bytes of the
shard its picture stands, and there it is read when its turn comes. So a shard is data like any other file: checked and
encoded before training, in an order of (seed, epoch), resumed to the bit, split among ranks without overlap.
"""

import hashlib
import json
import logging
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from llama_acc.core.atomic import write_text_whole
from llama_acc.core.data.images import IMAGE_SUFFIXES, member_reference
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import home

VERSION = 1
"""Raise it whenever the same shard may give other rows."""

_TEXTS = (".txt", ".json")
_LARGEST_TEXT = 2**24  # bytes
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")

_logger = logging.getLogger("llama_acc")


@dataclass
class _Sample:
    """The members of one name."""

    name: str
    image: tuple[int, int] | None = None  # its place: offset and size
    texts: dict[str, bytes] = field(default_factory=dict)  # by suffix
    problem: str | None = None


def tar_rows(path: Path) -> Iterator[tuple[str, Any, str | None]]:
    """The rows of a shard: (its place, the item, None), or (its place, None, why it cannot be used).

    An item's `image` is a reference relative to the shard's folder. A shard that is damaged or compressed is a
    UserError.
    """
    for number, sample in enumerate(_samples(path), start=1):
        where = f"item {number} ({sample.name})"
        try:
            yield where, _item(sample, path.name), None
        except ValueError as error:
            yield where, None, str(error)


def tar_digest(path: Path) -> str:
    """sha256 of all that decides a shard's rows: its name, its texts, and where its pictures stand.

    Kept under LLAMA_ACC_HOME until the file changes: to find the members of a large shard takes a while. A shard that
    is missing is an OSError, one that is damaged or compressed a UserError.
    """
    status = path.stat()
    facts = [str(path.absolute()), status.st_size, status.st_mtime_ns, VERSION]
    kept = home() / "cache" / "tars" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    try:
        return kept.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        digest = hashlib.sha256(path.name.encode(errors="surrogateescape"))
    for sample in _samples(path):
        texts = {suffix: hashlib.sha256(text).hexdigest() for suffix, text in sample.texts.items()}
        digest.update(json.dumps([sample.name, sample.image, texts, sample.problem]).encode())
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(kept, digest.hexdigest())
    except OSError as error:
        _logger.warning("not keeping the index of %s: %s", path, error.strerror or error)
    return digest.hexdigest()


def _samples(path: Path) -> Iterator[_Sample]:
    """The samples of a shard in the order they stand there."""
    sample = None
    with _opened(path) as tar:
        for name, members in groupby(_members(tar), key=lambda found: found[0]):
            sample = _Sample(name)
            for _, suffix, member in members:
                if member.sparse is not None:
                    sample.problem = f"{member.name} is a sparse file"
                elif suffix in IMAGE_SUFFIXES:
                    if sample.image is not None:
                        sample.problem = "more than one picture of this name"
                    sample.image = member.offset_data, member.size
                elif member.size > _LARGEST_TEXT:
                    sample.problem = f"{member.name} is larger than {_LARGEST_TEXT >> 20} MiB"
                else:
                    file = tar.extractfile(member)
                    assert file is not None  # it is a regular file
                    sample.texts[suffix] = file.read()
            yield sample
        # Where the members end there must be a block of zeros; tarfile takes a damaged header for the end, too.
        with path.open("rb") as shard:
            shard.seek(tar.offset)
            if shard.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset:,}")
    if sample is None:
        hint = "a shard holds pictures (.jpg, .png, .webp, ...) beside .txt or .json"
        raise UserError(f"{path} holds no samples", hint)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Pictures and texts: the name up to the first dot of its last part, what follows, and the member itself."""
    for member in tar:
        path = PurePosixPath(member.name)
        stem, dot, end = path.name.partition(".")
        suffix = (dot + end).lower()
        if member.isreg() and stem and suffix in (*IMAGE_SUFFIXES, *_TEXTS):
            yield str(path.parent / stem), suffix, member


def _item(sample: _Sample, shard: str) -> dict[str, Any]:
    """A sample as an item; ValueError: it is none."""
    if sample.problem is not None:
        raise ValueError(sample.problem)
    image = {} if sample.image is None else {"image": member_reference(Path(shard), *sample.image)}
    facts: Any = {}
    if ".json" in sample.texts:
        try:
            facts = json.loads(_decoded(sample, ".json"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{sample.name}.json cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{sample.name}.json should hold an object")
    if facts.keys() & {"conversations", "instruction", "output"}:
        return {**facts, **image}
    if not image:
        raise ValueError(f"no picture beside {' and '.join(sample.name + suffix for suffix in sample.texts)}")
    if ".txt" in sample.texts:
        return {"caption": _decoded(sample, ".txt").strip(), **image}
    for key in ("caption", "text"):
        if key in facts:
            return {"caption": facts[key], **image}
    raise ValueError("no caption in .json" if facts else "no .txt and no .json with a caption beside the picture")


def _decoded(sample: _Sample, suffix: str) -> str:
    try:
        return sample.texts[suffix].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{sample.name}{suffix} is not UTF-8 at byte {error.start}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError) as error:
        with path.open("rb") as file:
            is_compressed = file.read(4).startswith(_COMPRESSED)
        if is_compressed:
            hint = f"unpack it: gzip -dc {path} > {path.with_suffix('')}-plain.tar"
            raise UserError(f"{path} is compressed: its pictures cannot be reached one by one", hint) from error
        raise UserError(f"{path} is not a whole tar file: {error}", "was the download or the copy cut off?") from error
