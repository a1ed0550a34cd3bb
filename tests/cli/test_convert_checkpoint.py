"""`llama-acc convert-checkpoint` as it is typed."""

import signal
from pathlib import Path

import pytest
import torch

from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import shapes_of
from tests.cli.commands import complete, invoke, start, wait_until, words
from tests.core.checkpoint.folders import state, write_consolidated, write_meta

# Large enough for a command to be caught in the middle.
LARGE = ModelConfig(dim=1024, n_layers=8, n_heads=8, vocab_size=4000, multiple_of=256)


def test_a_run_becomes_a_folder_for_llama_cpp(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    command = ("convert-checkpoint", trained, tmp_path / "gguf", "--to", "gguf", "--gguf-type", "q8_0")
    result = complete(*command)
    assert words(result.stdout).endswith("KiB in 1 file, read back and equal")
    files = sorted(path.name for path in (tmp_path / "gguf").iterdir())
    assert files == ["Modelfile", "manifest.json", "model-q8_0.gguf"]
    assert "is not empty" in words(invoke(*command).stderr)


def test_a_diff_is_taken_and_applied(tmp_path: Path) -> None:
    base = write_meta(tmp_path / "base", state(dtype=torch.bfloat16), 2)
    tuned = write_consolidated(tmp_path / "tuned", state(dtype=torch.bfloat16, seed=1))
    diff = ("--to", "consolidated", "--base", base, "--diff", "--dtype", "fp32")
    result = complete("convert-checkpoint", tuned, tmp_path / "diff", *diff)
    assert "read back and equal; base + diff " in words(result.stdout)
    assert (tmp_path / "diff" / "consolidated.00-of-01.model-diff.pth").exists()
    complete("convert-checkpoint", tmp_path / "diff", tmp_path / "applied", "--to", "meta", "--base", base)
    loaded = torch.load(tmp_path / "applied" / "consolidated.00.pth", weights_only=True)
    for name, tensor in state(dtype=torch.bfloat16, seed=1).items():
        assert torch.allclose(loaded[name].float(), tensor.float(), atol=1e-6), name


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "source"
    tensors = {name: torch.full(shape, 0.5) for name, shape in shapes_of(LARGE).items()}
    return write_meta(folder, tensors, config=LARGE)


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL], ids=lambda way: way.name)
def test_whoever_is_stopped_leaves_no_folder(way: signal.Signals, large: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    process = start("convert-checkpoint", large, target, "--to", "consolidated", "--model-parallel-size", 2)
    aside = tmp_path / ".writing-target"
    wait_until(lambda: aside.is_dir() and any(path.stat().st_size > 0 for path in aside.iterdir()), process)
    process.send_signal(way)
    process.communicate()
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[way]
    assert not target.exists()
    assert aside.exists() == (way == signal.SIGKILL), "only a kill leaves what was begun, under another name"
    if aside.exists():  # and that is no obstacle
        source = write_meta(tmp_path / "source", state())
        assert invoke("convert-checkpoint", source, target, "--to", "meta").exit_code == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
