"""Files larger than memory, and filled by several writers at once: torch's .pth and safetensors, laid out first.

A .pth is a zip archive with one uncompressed record for each tensor's bytes; safetensors is 8 bytes of header length, a
JSON header and raw bytes (https://github.com/huggingface/safetensors).
"""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

_SAFETENSORS_TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int64: "I64",
}
_ALIGNMENT = 64
_LOCAL_HEADER, _CENTRAL_HEADER = 30, 46  # bytes before the record's name (APPNOTE.TXT 4.3.7, 4.3.12)
_BLOCK = 1 << 22


class Spec(NamedTuple):
    """Shape and type of a tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


Specs = Mapping[str, Spec]


def lay_out(path: Path, specs: Specs, flat: bool = False) -> None:
    """Writes a file of tensors with a hole in the place of each one's bytes.

    Args:
        path: the file to make; its ending says whether it is a .pth or safetensors.
        specs: its tensors, in the order they will lie.
        flat: a .pth is a mapping from names to tensors (Meta's); otherwise `{"model": mapping}`.
    """
    if path.suffix == ".pth":
        # Memory that is never touched is never taken.
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        with torch.serialization.skip_data():
            torch.save(tensors if flat else {"model": tensors}, path)
        return
    # transformers reads whose tensors these are.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in specs.items():
        begin, end = end, end + specs[name].nbytes
        header[name] = {"dtype": _SAFETENSORS_TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


class TensorFile:
    """A file of `lay_out`, open for writing."""

    def __init__(self, path: Path, specs: Specs) -> None:
        """Opens it; `specs` are those it was laid out with."""
        self.path, self.file = path, path.open("r+b", buffering=0)
        if path.suffix == ".pth":
            # Records are numbered in the order of the tensors.
            begins = {int(record.filename.rpartition("/")[2]): begin for record, begin in _records(path, self.file)}
            self._offsets = {name: begins[number] for number, name in enumerate(specs)}
        else:
            begin = 8 + int.from_bytes(self.file.read(8), "little")
            ends = accumulate((spec.nbytes for spec in specs.values()), initial=begin)
            self._offsets = dict(zip(specs, ends, strict=False))

    def write(self, name: str, rows: Tensor, first: int = 0) -> None:
        """Writes some rows of a tensor, the first of which has number `first`."""
        offset = self._offsets[name] + first * (rows.nbytes // max(1, len(rows)) if rows.dim() else 0)
        data = rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        while len(data):
            written = os.pwrite(self.file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def seal(self) -> None:
        """Puts a .pth's checksums in, once all is written: torch ignores them, other readers of zip archives do not."""
        if self.path.suffix != ".pth":
            return
        with zipfile.ZipFile(self.path) as archive:
            central, order = archive.start_dir, archive.infolist()
        begins = {record.filename: begin for record, begin in _records(self.path, self.file)}
        for record in order:
            if record.file_size and (begin := begins.get(record.filename)):
                checksum = struct.pack("<I", _crc32(self.file, begin, record.file_size))
                # A data descriptor follows the bytes: a signature, then the checksum.
                os.pwrite(self.file.fileno(), checksum, begin + record.file_size + 4)
                os.pwrite(self.file.fileno(), checksum, central + 16)
            central += _CENTRAL_HEADER + sum(struct.unpack("<HHH", os.pread(self.file.fileno(), 6, central + 28)))

    def close(self) -> None:
        """Waits until all is on the disk."""
        os.fsync(self.file.fileno())
        self.file.close()


def _records(path: Path, file: BinaryIO) -> list[tuple[zipfile.ZipInfo, int]]:
    """A .pth's records of tensors, and where the bytes of each begin."""
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if record.filename.rpartition("/")[0].endswith("/data")]
    found = []
    for record in records:
        lengths = struct.unpack("<HH", os.pread(file.fileno(), 4, record.header_offset + 26))  # of name and extra field
        found.append((record, record.header_offset + _LOCAL_HEADER + sum(lengths)))
    return found


def _crc32(file: BinaryIO, begin: int, size: int) -> int:
    checksum = 0
    for offset in range(begin, begin + size, _BLOCK):
        checksum = zlib.crc32(os.pread(file.fileno(), min(_BLOCK, begin + size - offset), offset), checksum)
    return checksum
