import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llama_acc.core.checkpoint.files import check_manifest
from llama_acc.core.checkpoint.layout import latest_checkpoint
from llama_acc.core.checkpoint.save import (
    checkpoints,
    free_bytes,
    needed_bytes,
    publish,
    read_progress,
    read_state,
    remove_checkpoint,
    write_safetensors,
    write_state,
    write_weights,
)
from llama_acc.core.errors import UserError
from tests.core.tiny import SMALL, loaded_model, random_model

NAN = float("nan")


def write(step: int):  # type: ignore[no-untyped-def]
    return lambda folder: write_state(folder, {"x": torch.tensor([float(step)])}, {"format_version": 1, "step": step})


def test_the_safetensors_library_reads_what_is_written_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "weights": torch.randn(7, 5),
        "rounded": torch.randn(3, 3, 3).bfloat16(),
        "odd": torch.tensor([NAN, float("inf"), -0.0, 1e-45]),
        "bytes": torch.arange(13, dtype=torch.uint8),
        "count": torch.tensor(2**40),
        "step": torch.tensor(3.0),
        "nothing": torch.empty(0, 4),
        "transposed": torch.arange(12.0).view(3, 4).t(),
        "part": torch.arange(20.0)[5:9],
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    write_safetensors(tensors, tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        assert torch.equal(read[name].flatten().view(torch.uint8), raw), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.keys()) == tensors.keys()


def test_weights_survive_a_round_trip_to_the_bit(tmp_path: Path) -> None:
    model = random_model()
    write_weights(model, tmp_path, torch.float32)
    again = loaded_model(tmp_path)
    assert again.config == model.config == SMALL
    for (name, parameter), read in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, read), name
    write_weights(model, tmp_path, torch.bfloat16)
    for parameter, read in zip(model.parameters(), loaded_model(tmp_path).parameters(), strict=True):
        assert torch.equal(parameter.bfloat16().float(), read)


def test_a_state_survives_a_round_trip(tmp_path: Path) -> None:
    publish(tmp_path / "epoch0", write(4), keep=0)
    assert read_progress(tmp_path / "epoch0") == {"format_version": 1, "step": 4}
    assert read_state(tmp_path / "epoch0")["x"].item() == 4.0


def test_a_folder_without_state_has_no_progress(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no training state to resume from"):
        read_progress(tmp_path)


def test_a_published_checkpoint_is_whole_and_the_latest(tmp_path: Path) -> None:
    publish(tmp_path / "epoch0", write(4), keep=0)
    check_manifest(tmp_path / "epoch0", contents=True)
    assert latest_checkpoint(tmp_path) == tmp_path / "epoch0"
    publish(tmp_path / "epoch1", write(8), keep=0)
    assert latest_checkpoint(tmp_path) == tmp_path / "epoch1"
    assert checkpoints(tmp_path) == [tmp_path / "epoch0", tmp_path / "epoch1"]


def test_checkpoints_are_in_the_order_of_their_steps_not_of_their_names(tmp_path: Path) -> None:
    for name, step in (("epoch10", 44), ("epoch2", 12), ("epoch9-iter3", 43)):
        publish(tmp_path / name, write(step), keep=0)
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch2", "epoch9-iter3", "epoch10"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_oldest_go_once_the_new_one_is_there(keep: int, tmp_path: Path) -> None:
    for epoch in range(5):
        publish(tmp_path / f"epoch{epoch}", write(epoch + 1), keep)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", *(f"epoch{epoch}" for epoch in range(5 - keep, 5))}


def test_a_write_that_fails_removes_nothing(tmp_path: Path) -> None:
    publish(tmp_path / "epoch0", write(1), keep=1)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        publish(tmp_path / "epoch1", fail, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "epoch0"}
    assert latest_checkpoint(tmp_path) == tmp_path / "epoch0"


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    publish(tmp_path / "epoch0", write(1), keep=0)

    def killed(path: Path) -> None:
        assert not (tmp_path / "epoch0").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(tmp_path / "epoch0")
    assert checkpoints(tmp_path) == []


def test_the_space_a_checkpoint_needs_is_its_weights_moments_and_masters() -> None:
    million = 1_000_000
    assert needed_bytes(million, torch.float32) == 12 * million + (1 << 20)
    assert needed_bytes(million, torch.bfloat16) == 14 * million + (1 << 20)


def test_free_space_is_that_of_the_disk_a_folder_will_be_on(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.05)


def test_config_and_meta_are_what_llama2_accessory_reads(tmp_path: Path) -> None:
    write_weights(random_model(), tmp_path, torch.float32)
    assert json.loads((tmp_path / "meta.json").read_text()) == {"llama_type": "llama"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dim"] == 32
    assert config["n_kv_heads"] == 2
    saved = torch.load(tmp_path / "consolidated.00-of-01.model.pth", weights_only=True)
    assert list(saved) == ["model"]
    assert all(name.startswith("llma.") for name in saved["model"])
