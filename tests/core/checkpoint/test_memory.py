"""Loading takes the memory of what is loaded, a rank's part alone, and no second copy of it on the way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import build_on_meta, shapes_of
from tests.core.checkpoint.folders import write_meta

CONFIG = ModelConfig(dim=1024, n_layers=3, n_heads=8, vocab_size=4000, multiple_of=256)
LARGE = ModelConfig(dim=2048, n_layers=2, n_heads=8, vocab_size=16000, multiple_of=256)
TINY = ModelConfig(dim=64, n_layers=1, n_heads=8, vocab_size=104, multiple_of=32)
NEEDS_PROC = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured through /proc"
)

_LOAD = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.load import check_tensors, fill, read_weights
from llama_acc.core.model.transformer import build_on_meta, quantize_on_meta, shapes_of

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

def load(folder, dtype, copy, size):
    layout = inspect(Path(folder))
    config = read_config([layout])
    weights = read_weights([layout], size - 1, size)
    check_tensors(weights, shapes_of(config), folder)
    model = build_on_meta(config, dtype).requires_grad_(False)
    if copy == "nf4":
        quantize_on_meta(model)
        fill(model, weights, torch.device("cpu"), dtype, copy=True)
        return model
    for name, part in weights.tensors.items():  # a rank's model has parameters of its share's shape
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.empty(part.shape, device="meta")))
    fill(model, weights, torch.device("cpu"), dtype, copy=copy == "copy")
    return model

folder, dtype, copy, warm_up, size = sys.argv[1:]
dtype, size = getattr(torch, dtype), int(size)
load(warm_up, dtype, copy, size)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = load(folder, dtype, copy, size)
total = sum(parameter.detach().view(-1)[::512].float().sum().item() for parameter in model.parameters())
own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
print(json.dumps({"peak": status("VmHWM") - before, "own": own, "total": total}))
"""


def checkpoint(folder: Path, config: ModelConfig, dtype: torch.dtype) -> int:
    """Writes a checkpoint in Meta's layout; returns the bytes of its tensors."""
    folder.mkdir()
    model = build_on_meta(config, dtype)
    tensors = {name: torch.full(parameter.shape, 0.5, dtype=dtype) for name, parameter in model.named_parameters()}
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(config.to_params()))
    return sum(tensor.nbytes for tensor in tensors.values())


def measured(folder: Path, dtype: str, copy: str, warm_up: Path, size: int = 1) -> dict[str, float]:
    """Peak over the start, in bytes, of a process that loads the last of `size` parts and reads all of it."""
    command = [sys.executable, "-c", _LOAD, str(folder), dtype, copy, str(warm_up), str(size)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@NEEDS_PROC
@pytest.mark.parametrize(
    ("saved", "wanted", "copy"),
    [("float32", "float32", "copy"), ("bfloat16", "float32", "copy"), ("bfloat16", "bfloat16", "map")],
)
def test_loading_peaks_at_the_size_of_the_model(saved: str, wanted: str, copy: str, tmp_path: Path) -> None:
    size = checkpoint(tmp_path / "base", CONFIG, getattr(torch, saved))
    size *= getattr(torch, wanted).itemsize // getattr(torch, saved).itemsize
    assert size > 90e6
    checkpoint(tmp_path / "small", TINY, getattr(torch, saved))
    assert measured(tmp_path / "base", wanted, copy, tmp_path / "small")["peak"] < 1.1 * size


@pytest.fixture(scope="module", params=[("meta", 1), ("meta", 2), ("huggingface", 1)], ids=str)
def layouts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of 340 MB in bf16 and a tiny one, in the same layout."""
    root = tmp_path_factory.mktemp("parts")
    kind, size = request.param
    for name, config in (("large", LARGE), ("small", TINY)):
        tensors = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes_of(config).items()}
        write_meta(root / f"{name}-meta", tensors, size, config)
        (root / f"{name}-meta" / "params.json").write_text(json.dumps(config.to_params()))
        if kind == "huggingface":
            convert(Request(root / f"{name}-meta", root / f"{name}-{kind}", "hf"))
            shutil.rmtree(root / f"{name}-meta")
    return root / f"large-{kind}", root / f"small-{kind}"


@NEEDS_PROC
def test_quantizing_while_loading_takes_the_quantized_model_and_two_tensors(layouts: tuple[Path, Path]) -> None:
    large, small = layouts
    result = measured(large, "bfloat16", "nf4", small)
    matrices = sum(torch.Size(shape).numel() for shape in shapes_of(LARGE).values())
    assert result["own"] < 0.45 * 2 * matrices
    assert result["peak"] < result["own"] + 2 * 2 * LARGE.dim * LARGE.vocab_size


@NEEDS_PROC
@pytest.mark.parametrize(("wanted", "copy", "size"), [("bfloat16", "map", 2), ("float32", "copy", 4)])
def test_a_rank_takes_the_memory_of_its_own_part(wanted: str, copy: str, size: int, layouts: tuple[Path, Path]) -> None:
    large, small = layouts
    result = measured(large, wanted, copy, small, size)
    assert result["own"] > 160e6
    # a copy of the part would be 2; allocators and threads take up to 0.1
    assert result["peak"] < 1.25 * result["own"]
