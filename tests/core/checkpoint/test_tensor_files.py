import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_acc.core.checkpoint.lazy import blocks_of
from llama_acc.core.checkpoint.tensor_files import (
    Spec,
    lay_out_pth,
    lay_out_safetensors,
    pth_offsets,
    safetensors_offsets,
    seal_pth,
    write_at,
)

TENSORS = {
    "matrix": torch.randn(37, 11),
    "rounded": torch.randn(8, 16).bfloat16(),
    "half": torch.randn(3).half(),
    "one": torch.randn(1, 1),
    "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
}


def write(path: Path, tensors: dict[str, Tensor], flat: bool = False) -> None:
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if path.suffix == ".pth":
        lay_out_pth(path, specs, flat)
        offsets = pth_offsets(path, specs)
    else:
        lay_out_safetensors(path, specs)
        offsets = safetensors_offsets(path)
    descriptor = os.open(path, os.O_WRONLY)
    # The order of writing is anyone's.
    for name, tensor in reversed(tensors.items()):
        write_at(descriptor, offsets[name], tensor)
    os.close(descriptor)
    if path.suffix == ".pth":
        seal_pth(path)


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(actual) == list(expected) and all(
        actual[name].dtype == tensor.dtype
        and actual[name].shape == tensor.shape
        and torch.equal(actual[name].contiguous().view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_pth_file_is_what_torch_load_reads(flat: bool, mapped: bool, tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00.pth"
    write(path, TENSORS, flat)
    content = torch.load(path, weights_only=True, mmap=mapped)
    assert same_bits(content if flat else content["model"], TENSORS)


def test_a_pth_file_is_a_sound_archive_with_every_tensor_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00-of-01.model.pth"
    write(path, TENSORS)
    reader = torch._C.PyTorchFileReader(str(path))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None, "a checksum is wrong"
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    names = [name for name in reader.get_all_records() if name.startswith("data/")]
    assert len(names) == len(TENSORS)
    assert all(reader.get_record_offset(name) % 64 == 0 for name in names)


def test_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.pth", TENSORS)
    assert (tmp_path / "a" / "x.pth").read_bytes() == (tmp_path / "b" / "x.pth").read_bytes()


def test_a_safetensors_file_is_what_the_library_reads(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    write(tmp_path / "x.safetensors", TENSORS)
    loaded = load_file(tmp_path / "x.safetensors")
    assert same_bits({name: loaded[name] for name in TENSORS}, TENSORS)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_blocks_cover_all_rows_once() -> None:
    assert blocks_of((10, 4), 3 * 16) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert blocks_of((3, 1000), 1) == [(0, 1), (1, 2), (2, 3)]
    assert blocks_of((5,), 8) == [(0, 2), (2, 4), (4, 5)]
