"""Loading takes the memory of what is loaded, a rank's part alone, and no second copy of it on the way; converting
takes a few megabytes, whatever the model's size."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import shapes_of
from tests.core.checkpoint.folders import write_meta

LARGE = ModelConfig(dim=2048, n_layers=2, n_heads=8, vocab_size=16000, multiple_of=256)
TINY = ModelConfig(dim=64, n_layers=1, n_heads=8, vocab_size=104, multiple_of=32)
VALUES = sum(torch.Size(shape).numel() for shape in shapes_of(LARGE).values())
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured through /proc"
)

# In one process, each case after a tiny one of its kind.
_MEASURE = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.load import check_tensors, fill, read_weights
from llama_acc.core.model.transformer import build_on_meta, quantize_on_meta, shapes_of

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

def load(folder, dtype, way, size):
    layout = inspect(Path(folder))
    config = read_config([layout])
    weights = read_weights([layout], size - 1, size)
    check_tensors(weights, shapes_of(config), folder)
    model = build_on_meta(config, dtype).requires_grad_(False)
    if way == "nf4":
        quantize_on_meta(model)
    for name, part in weights.tensors.items() if size > 1 else ():  # a rank's parameters have its share's shape
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.empty(part.shape, device="meta")))
    fill(model, weights, torch.device("cpu"), dtype, copy=way != "map")
    sum(parameter.detach().view(-1)[::512].float().sum().item() for parameter in model.parameters())
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

def work(folder, way, dtype, size):
    if way in ("hf", "consolidated"):
        convert(Request(folder, Path(f"{folder}-{way}-{size}"), way, model_parallel_size=size))
        return 0
    return load(folder, getattr(torch, dtype), way, size)

found = {}
for name, (kind, *case) in json.loads(sys.argv[1]).items():
    work(f"tiny-{kind}", *case)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    own = work(f"large-{kind}", *case)
    found[name] = [status("VmHWM") - before, own]
print(json.dumps(found))
"""
# Of which layout, in what way, to which type, the last part of how many.
CASES = {
    "copied": ("meta-2", "copy", "bfloat16", 1),
    "widened": ("meta-2", "copy", "float32", 1),
    "a part, widened": ("meta-2", "copy", "float32", 4),
    "a part, mapped": ("hf", "map", "bfloat16", 2),
    "quantized": ("hf", "nf4", "bfloat16", 1),
    "to Hugging Face": ("meta-2", "hf", "", 1),
    "to eight shards": ("hf", "consolidated", "", 8),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """Peak over the start of each case, and the bytes of what it has loaded."""
    root = tmp_path_factory.mktemp("memory")
    for name, config in (("large", LARGE), ("tiny", TINY)):
        tensors = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes_of(config).items()}
        tensors["output.weight"] /= 2  # or it would be tied to the embedding
        write_meta(root / f"{name}-meta-2", tensors, 2, config)
        (root / f"{name}-meta-2" / "params.json").write_text(json.dumps(config.to_params()))
        convert(Request(root / f"{name}-meta-2", root / f"{name}-hf", "hf"))
    command = [sys.executable, "-c", _MEASURE, json.dumps(CASES)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    shutil.rmtree(root)
    found: dict[str, tuple[int, int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("case", "size"),
    [("copied", 2 * VALUES), ("widened", 4 * VALUES), ("a part, widened", VALUES), ("a part, mapped", VALUES)],
)
def test_loading_peaks_at_the_size_of_what_is_loaded(
    case: str, size: int, measured: dict[str, tuple[int, int]]
) -> None:
    peak, own = measured[case]
    assert own == pytest.approx(size, rel=0.01)
    assert peak < 1.1 * own


def test_quantizing_while_loading_takes_the_quantized_model_and_two_tensors(
    measured: dict[str, tuple[int, int]],
) -> None:
    peak, own = measured["quantized"]
    assert own < 0.45 * 2 * VALUES
    assert peak < own + 2 * 2 * LARGE.dim * LARGE.vocab_size


@pytest.mark.parametrize("case", ["to Hugging Face", "to eight shards"])
def test_converting_takes_little_whatever_the_models_size(case: str, measured: dict[str, tuple[int, int]]) -> None:
    assert measured[case][0] < 100e6 < 2 * VALUES / 3
