"""Encoded data files, kept under LLAMA_ACC_HOME so that the next run starts at once.

An entry's name is the sha256 of all that decides its content, so nothing ever has to be invalidated; entries unused
for longest go when the cache outgrows `LLAMA_ACC_CACHE_GIB` (10 by default; 0: no cache). The cache may fail, the
run may not: whatever goes wrong here is logged, and the file is encoded again.
"""

import hashlib
import json
import logging
import os
import time
import zipfile
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from llama_acc.core.data.encode import ENCODER_VERSION, Encoded
from llama_acc.core.data.templates import Template
from llama_acc.core.errors import UserError
from llama_acc.core.home import home
from llama_acc.core.tokenizer import Tokenizer

FORMAT_VERSION = 1
DEFAULT_GIB = 10.0
_ABANDONED_SECONDS = 24 * 3600

_logger = logging.getLogger("llama_acc")


def cache_key(
    data: bytes, suffix: str, format: str, tokenizer: Tokenizer, templates: list[Template], max_tokens: int
) -> str:
    """What names an entry: everything that decides the tokens and labels of a file.

    Args:
        data: the file's bytes.
        suffix: how its name ends, which says how it is read.
        format: the kind of items asked for.
        tokenizer: by its fingerprint.
        templates: the format to write them in; several where the kind of the items will decide.
        max_tokens: where documents are cut.
    """
    parts = {
        "data": hashlib.sha256(data).hexdigest(),
        "suffix": suffix.lower(),
        "format": format,
        "tokenizer": tokenizer.fingerprint(),
        "templates": [template.model_dump(mode="json") for template in templates],
        "max_tokens": max_tokens,
        "encoder": ENCODER_VERSION,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_cached(key: str) -> Encoded | None:
    """The entry of that key, or None where there is none that can be used.

    Raises:
        UserError: a newer llama-acc wrote it.
    """
    if _limit_bytes() == 0:
        return None
    path = _path(key)
    try:
        with np.load(path, allow_pickle=False) as entry:
            about = json.loads(bytes(entry["about"]))
            _refuse_newer(path, about)
            encoded = _unpacked(entry, about)
        os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        _logger.warning("ignoring the token cache's entry %s: %s", path, error)
        return None
    return encoded


def store(key: str, encoded: Encoded) -> None:
    """Keep an entry, and let go of old ones beyond the size limit. Failing to is only logged."""
    limit = _limit_bytes()
    size = encoded.tokens.nbytes + encoded.labelled.nbytes // 8 + encoded.offsets.nbytes
    if size > limit:
        return
    path = _path(key)
    temporary = path.with_name(f".{key}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            _write(file, encoded)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _evict(path.parent, limit)
    except OSError as error:
        _logger.warning("not keeping encoded data in %s: %s", path.parent, error.strerror or error)
        _remove(temporary)


def _path(key: str) -> Path:
    return home() / "cache" / "tokens" / f"{key}.npz"


def _limit_bytes() -> int:
    setting = os.environ.get("LLAMA_ACC_CACHE_GIB") or str(DEFAULT_GIB)
    try:
        gib = float(setting)
        if not 0 <= gib < float("inf"):
            raise ValueError
    except ValueError as error:
        raise UserError(f"LLAMA_ACC_CACHE_GIB should be a size in GiB, 0 for no cache, but is {setting!r}") from error
    return int(gib * 2**30)


def _write(file: BinaryIO, encoded: Encoded) -> None:
    about = {"format_version": FORMAT_VERSION, "items": encoded.items, "kind": encoded.kind}
    np.savez(
        file,
        about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
        tokens=encoded.tokens,
        labelled=np.packbits(encoded.labelled),
        offsets=encoded.offsets,
        item=encoded.item,
        cut=encoded.cut,
    )


def _unpacked(entry: Any, about: dict[str, Any]) -> Encoded:
    tokens, offsets = entry["tokens"], entry["offsets"]
    labelled = np.unpackbits(entry["labelled"], count=len(tokens)).astype(np.bool_)
    encoded = Encoded(tokens, labelled, offsets, entry["item"], entry["cut"], int(about["items"]), str(about["kind"]))
    documents = len(offsets) - 1
    if offsets[-1] != len(tokens) or {len(encoded.item), len(encoded.cut)} != {documents}:
        raise ValueError("its parts do not fit together")
    return encoded


def _refuse_newer(path: Path, about: dict[str, Any]) -> None:
    version = int(about["format_version"])
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}; this llama-acc reads up to {FORMAT_VERSION}",
            "update llama-acc, or delete that file",
        )


def _evict(folder: Path, limit: int) -> None:
    """Delete the entries unused for longest until the rest fits, and what killed runs have left."""
    entries = []
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:  # another run is evicting too
            continue
        if path.suffix == ".npz":
            entries.append((status.st_mtime, status.st_size, path))
        elif path.suffix == ".tmp" and status.st_mtime < time.time() - _ABANDONED_SECONDS:
            _remove(path)
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            break
        _remove(path)
        total -= size


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning("cannot delete %s: %s", path, error.strerror)
