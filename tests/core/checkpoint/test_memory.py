"""Loading takes the memory of what is loaded, and no second copy of it on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import build_on_meta

CONFIG = ModelConfig(dim=1024, n_layers=3, n_heads=8, vocab_size=4000, multiple_of=256)

_LOAD = """
import json, sys
from pathlib import Path
import torch
from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.shards import check_tensors, fill, read_weights
from llama_acc.core.model.transformer import build_on_meta

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

def load(folder, dtype, copy):
    layout = inspect(Path(folder))
    config = read_config([layout])
    weights = read_weights([layout])
    check_tensors(weights, config.parameter_shapes(), folder)
    model = build_on_meta(config, dtype)
    fill(model, weights, torch.device("cpu"), dtype, copy=copy)
    return model

folder, dtype, copy, warm_up = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "copy", sys.argv[4]
load(warm_up, dtype, copy)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = load(folder, dtype, copy)
total = sum(parameter.detach().view(-1)[::512].float().sum().item() for parameter in model.parameters())
print(json.dumps({"peak": status("VmHWM") - before, "total": total}))
"""


def checkpoint(folder: Path, config: ModelConfig, dtype: torch.dtype) -> int:
    """Writes a checkpoint in Meta's layout; returns the bytes of its tensors."""
    folder.mkdir()
    model = build_on_meta(config, dtype)
    tensors = {name: torch.full(parameter.shape, 0.5, dtype=dtype) for name, parameter in model.named_parameters()}
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(config.to_params()))
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured through /proc")
@pytest.mark.parametrize(
    ("saved", "wanted", "copy"),
    [("float32", "float32", "copy"), ("bfloat16", "float32", "copy"), ("bfloat16", "bfloat16", "map")],
)
def test_loading_peaks_at_the_size_of_the_model(saved: str, wanted: str, copy: str, tmp_path: Path) -> None:
    size = checkpoint(tmp_path / "base", CONFIG, getattr(torch, saved))
    size *= getattr(torch, wanted).itemsize // getattr(torch, saved).itemsize
    assert size > 90e6
    small = ModelConfig(dim=64, n_layers=1, n_heads=2, vocab_size=100, multiple_of=32)
    checkpoint(tmp_path / "small", small, getattr(torch, saved))
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path / "base"), wanted, copy, str(tmp_path / "small")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout)["peak"] < 1.1 * size
