"""What a frozen encoder makes of images, kept on disk: after the first epoch it need not run again.

A file for each image: its features as they are in memory. Its name is the SHA-256 of the image's bytes; its folder says
which encoder and which transform. Nothing has to be invalidated, and a folder that is not needed can be deleted.
"""

import errno
import hashlib
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from llama_acc.core.data.images import Transform, digest
from llama_acc.core.home import home
from llama_acc.core.units import size_text

_logger = logging.getLogger("llama_acc")


class FeatureCache:
    """The features of one encoder after one transform.

    Attributes:
        folder: where they are.
    """

    def __init__(
        self, encoder: str, transform: Transform, shape: tuple[int, ...], dtype: torch.dtype, leave: int = 0
    ) -> None:
        """Args:
        encoder: its fingerprint.
        transform: what was done to the images; not a random one.
        shape: of an image's features.
        dtype: their type.
        leave: bytes of the disk that are not taken: the run's checkpoints may need them.
        """
        assert not transform.is_random
        name = hashlib.sha256(f"{encoder} {transform.key()}".encode()).hexdigest()[:32]
        self.folder = home() / "features" / name
        self._shape, self._dtype, self._keeps = shape, dtype, True
        self._bytes, self._leave = torch.Size(shape).numel() * dtype.itemsize, leave

    def path(self, reference: str) -> Path:
        """Where the features of an image are, or would be."""
        name = digest(reference)
        return self.folder / name[:2] / name

    def has(self, reference: str) -> bool:
        """Whether an image's features are there, whole."""
        try:
            return self.path(reference).stat().st_size == self._bytes
        except OSError:
            return False

    def load(self, reference: str) -> Tensor:
        """An image's features; it must be there."""
        data = bytearray(self.path(reference).read_bytes())
        return torch.frombuffer(data, dtype=self._dtype).view(self._shape)

    def store(self, reference: str, features: Tensor) -> None:
        """Keeps an image's features, whole or not at all. What goes wrong first is logged; no more are kept then."""
        if not self._keeps:
            return
        path = self.path(reference)
        aside = path.with_name(f".{path.name}-{uuid4().hex}")
        data = features.to("cpu", self._dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < self._bytes + self._leave:
                raise OSError(
                    errno.ENOSPC, f"the disk has only the {size_text(self._leave)} left that checkpoints need"
                )
            aside.write_bytes(data)
            os.replace(aside, path)
        except OSError as error:
            reason = error.strerror or error
            _logger.warning("cannot keep features in %s: %s; from here on they are made each time", self.folder, reason)
            self._keeps = False
            with suppress(OSError):
                aside.unlink()
