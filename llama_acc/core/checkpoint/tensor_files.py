"""Files that several writers fill at once: torch's .pth and safetensors, laid out first, each tensor's place known.

A .pth is a zip archive with one uncompressed record for each tensor's bytes; safetensors is 8 bytes of header length, a
JSON header and raw bytes (https://github.com/huggingface/safetensors).
"""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


def lay_out_pth(path: Path, specs: Specs, flat: bool = False) -> None:
    """Writes the file torch.save would, with a hole in the place of each tensor's bytes.

    Args:
        path: the file to make.
        specs: its tensors, in the order they will lie.
        flat: the file is a mapping from names to tensors (Meta's); otherwise `{"model": mapping}`.
    """
    # Memory that is never touched is never taken.
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    with torch.serialization.skip_data():
        torch.save(tensors if flat else {"model": tensors}, path)


def pth_offsets(path: Path, specs: Specs) -> dict[str, int]:
    """Where in a file of `lay_out_pth` each tensor's bytes begin."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        begins = {_number(record): _data_begin(file, record) for record in archive.infolist() if _is_data(record)}
    return {name: begins[number] for number, name in enumerate(specs)}


def _is_data(record: zipfile.ZipInfo) -> bool:
    return record.filename.rpartition("/")[0].endswith("/data")


def _number(record: zipfile.ZipInfo) -> int:
    return int(record.filename.rpartition("/")[2])


def _data_begin(file: Any, record: zipfile.ZipInfo) -> int:
    file.seek(record.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return record.header_offset + _LOCAL_HEADER + name + extra


def seal_pth(path: Path) -> None:
    """Puts the records' checksums in, once all bytes are there: torch does not look at them, other programs do."""
    with zipfile.ZipFile(path) as archive:
        records, central = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:
        for record in records:
            if _is_data(record) and record.file_size:
                begin = _data_begin(file, record)
                checksum = struct.pack("<I", _crc32(file, begin, record.file_size))
                # A data descriptor follows the bytes: a signature, then the checksum.
                file.seek(begin + record.file_size + 4)
                file.write(checksum)
                file.seek(central + 16)
                file.write(checksum)
            file.seek(central + 28)
            central += _CENTRAL_HEADER + sum(struct.unpack("<HHH", file.read(6)))


def _crc32(file: Any, begin: int, size: int) -> int:
    file.seek(begin)
    checksum = 0
    while size:
        block = file.read(min(size, _BLOCK))
        checksum = zlib.crc32(block, checksum)
        size -= len(block)
    return checksum


def lay_out_safetensors(path: Path, specs: Specs) -> None:
    """Writes the header, and a hole in the place of each tensor's bytes."""
    # transformers wants to be told whose tensors these are.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def safetensors_offsets(path: Path) -> dict[str, int]:
    """Where in a safetensors file each tensor's bytes begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def write_at(descriptor: int, offset: int, tensor: Tensor) -> None:
    """Writes a tensor's bytes at a place in an open file."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
