"""Writing .pth and safetensors files a few megabytes at a time, whatever their size.

Both formats say first where everything will lie, so names, shapes and types are given when a file is opened, and the
tensors follow in that order.

A .pth file as torch writes it since 1.6 is an uncompressed zip archive: `data.pkl`, a pickle that names the storages,
and one member for each storage, beginning at a multiple of 64 bytes so that it can be mapped. torch.save itself wants
all tensors in memory, so the archive is made here, by Python's zipfile.
"""

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from llama_acc.core.checkpoint.parts import blocks_of

_ALIGNMENT = 64
_SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_STORAGE_TYPES: dict[torch.dtype, Any] = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}
DTYPES = tuple(_SAFETENSORS_TYPES)
"""Types that can be written."""

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each tensor, in the order of writing."""


class Source(Protocol):
    """A tensor that can be read block by block, as `parts.Part`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def rows(self, start: int, stop: int) -> "Source":
        """Its rows start to stop."""

    def copy_into(self, target: Tensor) -> None:
        """Reads it into a tensor of its shape."""


def read_block(source: Source, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start to stop of a source in a type."""
    block = torch.empty((stop - start, *source.shape[1:]), dtype=dtype)
    source.rows(start, stop).copy_into(block)
    return block


class Writer:
    """A file of tensors being written. Leaving the context closes it."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        """Args:
        path: the file to make.
        shapes: of all tensors; they are to be written in this order.
        """
        self.path, self.shapes = path, shapes

    def write(self, name: str, source: Source) -> None:
        """Writes the next tensor."""
        shape, dtype = self.shapes[name]
        assert source.shape == shape, (name, source.shape, shape)
        with self._member(name) as file:
            for start, stop in blocks_of(shape):
                file.write(read_block(source, start, stop, dtype).view(-1).view(torch.uint8).numpy().data)

    def _member(self, name: str) -> IO[bytes]:
        raise NotImplementedError

    def close(self) -> None:
        """Ends the file."""
        raise NotImplementedError

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PthWriter(Writer):
    """A file that torch.load reads with `weights_only`, mapped or not."""

    def __init__(self, path: Path, shapes: Shapes, prefix: str | None = None) -> None:
        """Args:
        path: the file to make.
        shapes: of all tensors; they are to be written in this order.
        prefix: None: a flat mapping (Meta); else `{"model": mapping}` with this before every name.
        """
        super().__init__(path, shapes)
        self._keys = {name: str(place) for place, name in enumerate(shapes)}
        self._root = path.stem
        self._raw = path.open("wb")
        self._zip = zipfile.ZipFile(self._raw, "w", zipfile.ZIP_STORED)
        named = {(prefix or "") + name: _Saved(self._keys[name], *kind) for name, kind in shapes.items()}
        self._write_text("data.pkl", _pickled(named if prefix is None else {"model": named}))
        self._write_text("byteorder", b"little")

    def _write_text(self, name: str, content: bytes) -> None:
        with self._open(name, len(content)) as file:
            file.write(content)

    def _member(self, name: str) -> IO[bytes]:
        shape, dtype = self.shapes[name]
        return self._open(f"data/{self._keys[name]}", torch.Size(shape).numel() * dtype.itemsize)

    def _open(self, name: str, size: int) -> IO[bytes]:
        """A member, whose content begins at a multiple of 64 bytes."""
        member = zipfile.ZipInfo(f"{self._root}/{name}")
        member.file_size = size
        is_large = size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule
        # What stands before the content: 30 bytes, the name, 20 bytes of sizes where these are large, and the padding,
        # a field of its own (torch's "FB") with 4 bytes of head.
        before = self._raw.tell() + 30 + len(member.filename.encode()) + (20 if is_large else 0) + 4
        padding = -before % _ALIGNMENT
        member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        return self._zip.open(member, "w", force_zip64=is_large)

    def close(self) -> None:
        """Ends the file."""
        self._write_text("version", b"3\n")
        self._zip.close()
        self._raw.close()


class _Saved:
    """Pickled, it is a tensor whose values are in the archive."""

    def __init__(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.key, self.shape, self.dtype = key, shape, dtype

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (_Storage(self), 0, self.shape, stride, False, OrderedDict())


class _Storage:
    """Stands for a tensor's values in the pickle."""

    def __init__(self, saved: _Saved) -> None:
        self.saved = saved


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        saved = obj.saved
        return "storage", _STORAGE_TYPES[saved.dtype], saved.key, "cpu", torch.Size(saved.shape).numel()


def _pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


class SafetensorsWriter(Writer):
    """A safetensors file: 8 bytes of header length, a JSON header and raw bytes."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        super().__init__(path, shapes)
        # transformers wants to be told whose tensors these are.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in shapes.items():
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _SAFETENSORS_TYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _member(self, name: str) -> IO[bytes]:
        return _Unclosed(self._file)  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


class _Unclosed:
    """A file that stays open after a `with`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write

    def __enter__(self) -> "_Unclosed":
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass
