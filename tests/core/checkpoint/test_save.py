import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llama_acc.core.atomic import check_manifest
from llama_acc.core.checkpoint.layout import latest_checkpoint
from llama_acc.core.checkpoint.resume import read_progress, rng_state
from llama_acc.core.checkpoint.save import (
    Rows,
    Saver,
    Snapshot,
    TensorFile,
    TensorSpec,
    checkpoints,
    lay_out,
    write_checkpoint,
)
from llama_acc.core.device import simulating
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from tests.core.tiny import CPU


def publish(folder: Path, step: int, keep: int, dtype: torch.dtype = torch.float32, **weights: torch.Tensor) -> None:
    """Writes a checkpoint of these weights, a moment of each, and that many steps."""
    pieces = {name: Rows(tensor, 0, tuple(tensor.shape), True) for name, tensor in weights.items()}
    progress = json.dumps({"format_version": 1, "step": step, "data": "v2:0"}).encode()
    snapshot = Snapshot(
        pieces,
        {f"exp_avg.{name}": piece for name, piece in pieces.items()},
        rng_state(CPU),
        dtype,
        {"state/progress.json": progress},
        Parallel(),
    )
    write_checkpoint(snapshot, folder, keep)


def test_a_copy_is_taken_before_an_update_and_the_checkpoint_is_of_that_moment(tmp_path: Path) -> None:
    x = torch.zeros(1000, 100)
    piece = Rows(x, 0, tuple(x.shape), True)
    files = {"state/progress.json": b'{"format_version": 1, "step": 1}'}
    saver = Saver()
    saver.start(Snapshot({"x": piece}, {"m": piece}, {}, torch.float32, files, Parallel()), tmp_path / "epoch0", 0)
    saver.wait_for_copy()
    x.fill_(1.0)
    assert saver.finished(wait=True) == tmp_path / "epoch0"
    assert saver.finished(wait=True) is None
    saved = torch.load(tmp_path / "epoch0" / "consolidated.00-of-01.model.pth", weights_only=True)["model"]
    assert not saved["llma.x"].any()


def test_a_gpu_copies_in_a_stream_that_waits_for_the_update_and_not_for_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    @contextlib.contextmanager
    def entered(stream: object) -> Iterator[None]:
        order.append(f"in {stream}")
        yield

    beside = SimpleNamespace(wait_stream=lambda other: order.append(f"after {other}"))
    fakes = {"Stream": lambda: beside, "current_stream": lambda: "training", "stream": entered}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    x, saver = torch.zeros(4, 2), Saver()
    with simulating("cuda"):
        saver.start(Snapshot({"x": Rows(x, 0, (4, 2), True)}, {}, {}, torch.float32, {}, Parallel()), tmp_path / "a", 0)
        saver.wait_for_copy()
    assert order == ["after training", f"in {beside}"]
    saver.finished(wait=True)


def test_an_error_of_the_writing_thread_is_raised_where_the_result_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saver = Saver()
    saver.start(Snapshot({}, {}, {}, torch.float32, {}, Parallel()), tmp_path / "file" / "epoch0", 0)
    saver.wait_for_copy()
    with pytest.raises(NotADirectoryError):
        saver.finished(wait=True)


def test_checkpoints_are_in_the_order_of_their_steps_not_of_their_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no training state to resume from"):
        read_progress(tmp_path)
    for name, step in (("epoch10", 44), ("epoch2", 12), ("epoch9-iter3", 43)):
        publish(tmp_path / name, step, keep=0)
        check_manifest(tmp_path / name, verify=True)
        assert latest_checkpoint(tmp_path) == tmp_path / name
    assert [path.name for _, path in checkpoints(tmp_path)] == ["epoch2", "epoch9-iter3", "epoch10"]


def test_a_write_that_fails_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "epoch0", 1, keep=1)

    def fail(file: TensorFile, name: str, rows: torch.Tensor, first: int = 0) -> None:
        raise OSError("no space")

    monkeypatch.setattr(TensorFile, "write", fail)
    with pytest.raises(OSError, match="no space"):
        publish(tmp_path / "epoch1", 2, keep=1, x=torch.ones(3))
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "epoch0"}
    assert latest_checkpoint(tmp_path) == tmp_path / "epoch0"


# The files


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
