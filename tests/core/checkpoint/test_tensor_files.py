"""Files laid out first and filled by several writers are what torch, safetensors and zip programs read."""

import contextlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llama_acc.core.checkpoint.save import TensorFile, TensorSpec, lay_out

TENSORS = {
    "matrix": torch.randn(37, 11),
    "rounded": torch.randn(3, 3, 3).bfloat16(),
    "half": torch.randn(3).half(),
    "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    "bytes": torch.arange(13, dtype=torch.uint8),
    "count": torch.tensor(2**40),
    "step": torch.tensor(3.0),
    "nothing": torch.empty(0, 4),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "part": torch.arange(20.0)[5:9],
    "trained": torch.nn.Parameter(torch.ones(2)),
}


def write(path: Path, flat: bool = False, sealed: bool = True) -> Path:
    """Two writers, one of which writes the first rows of matrices, in an order of their own."""
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}
    lay_out(path, specs, flat)
    files = [TensorFile(path, specs), TensorFile(path, specs)]
    for name, tensor in reversed(TENSORS.items()):
        rows = 2 if tensor.dim() > 1 else 0
        if rows:
            files[0].write(name, tensor[:rows])
        files[1].write(name, tensor[rows:] if rows else tensor, rows)
    if sealed:
        files[0].seal()
    for file in files:
        file.close()
    return path


def check_bits(actual: dict[str, Tensor]) -> None:
    for name, tensor in TENSORS.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape)
        bits = [each.detach().contiguous().flatten().view(torch.uint8) for each in (actual[name], tensor)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_pth_file_is_what_torch_load_reads_bit_for_bit(flat: bool, mapped: bool, tmp_path: Path) -> None:
    content = torch.load(write(tmp_path / "x.pth", flat), weights_only=True, mmap=mapped)
    found = content if flat else content["model"]
    assert list(found) == list(TENSORS)
    check_bits(found)


def test_a_pth_file_is_a_sound_archive_and_always_the_same(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    path = write(tmp_path / "x.pth")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, "a checksum is wrong"
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    reader: Any = torch._C.PyTorchFileReader(str(path))
    names = [name for name in reader.get_all_records() if name.startswith("data/")]
    assert len(names) == len(TENSORS)
    assert all(reader.get_record_offset(name) % 64 == 0 for name in names)
    assert path.read_bytes() == write(tmp_path / "other" / "x.pth").read_bytes()
    unsealed = write(tmp_path / "unsealed.pth", sealed=False)
    with contextlib.closing(zipfile.ZipFile(unsealed)) as archive:
        assert archive.testzip() is not None


def test_a_safetensors_file_is_what_the_library_reads_bit_for_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors")
    check_bits(load_file(path))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
