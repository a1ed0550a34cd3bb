import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_acc.core.checkpoint.parts import Part, blocks_of
from llama_acc.core.checkpoint.writers import DTYPES, PthWriter, SafetensorsWriter, Writer

TENSORS = {
    "matrix": torch.randn(37, 11),
    "rounded": torch.randn(8, 16).bfloat16(),
    "half": torch.randn(3).half(),
    "one": torch.randn(1, 1),
    "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
}


def write(writer: Writer, tensors: dict[str, Tensor]) -> None:
    with writer:
        for name, tensor in tensors.items():
            writer.write(name, Part.of(tensor))


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(actual) == list(expected) and all(
        actual[name].dtype == tensor.dtype
        and actual[name].shape == tensor.shape
        and torch.equal(actual[name].contiguous().view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("prefix", [None, "llma."])
def test_a_pth_file_is_what_torch_load_reads(prefix: str | None, mapped: bool, tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00.pth"
    write(PthWriter(path, shapes(TENSORS), prefix), TENSORS)
    content = torch.load(path, weights_only=True, mmap=mapped)
    if prefix is not None:
        content = {name.removeprefix(prefix): tensor for name, tensor in content["model"].items()}
    assert same_bits(content, TENSORS)


def test_a_pth_file_is_a_sound_archive_with_every_tensor_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00-of-01.model.pth"
    write(PthWriter(path, shapes(TENSORS), "llma."), TENSORS)
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
        write(PthWriter(tmp_path / name / "x.pth", shapes(TENSORS)), TENSORS)
    assert (tmp_path / "a" / "x.pth").read_bytes() == (tmp_path / "b" / "x.pth").read_bytes()


def test_a_member_above_the_old_limit_of_zip_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    path = tmp_path / "consolidated.00.pth"
    write(PthWriter(path, shapes(TENSORS)), TENSORS)
    assert same_bits(torch.load(path, weights_only=True, mmap=True), TENSORS)
    assert same_bits(torch.load(path, weights_only=True), TENSORS)
    reader = torch._C.PyTorchFileReader(str(path))
    assert all(reader.get_record_offset(f"data/{i}") % 64 == 0 for i in range(len(TENSORS)))


def test_a_safetensors_file_is_what_the_library_reads(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    write(SafetensorsWriter(tmp_path / "x.safetensors", shapes(TENSORS)), TENSORS)
    loaded = load_file(tmp_path / "x.safetensors")
    assert same_bits({name: loaded[name] for name in TENSORS}, TENSORS)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_rounded_to_the_type_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(100, 7)
    with PthWriter(tmp_path / "x.pth", {"a": ((100, 7), dtype)}) as writer:
        writer.write("a", Part.of(tensor))
    assert torch.equal(torch.load(tmp_path / "x.pth", weights_only=True)["a"], tensor.to(dtype))


def test_blocks_cover_all_rows_once() -> None:
    assert blocks_of((10, 4), 3 * 16) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert blocks_of((3, 1000), 1) == [(0, 1), (1, 2), (2, 3)]
    assert blocks_of((5,), 8) == [(0, 2), (2, 4), (4, 5)]
