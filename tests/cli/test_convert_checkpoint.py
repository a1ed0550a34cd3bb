"""`llama-acc convert-checkpoint` as it is typed."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import shapes_of
from llama_acc.core.tokenizer import load_tokenizer
from tests.cli.commands import QUICKSTART, invoke, refused, run, start, wait_until, words
from tests.core.checkpoint.folders import state, write_consolidated, write_huggingface, write_meta

# Large enough for a command to be caught in the middle.
LARGE = ModelConfig(dim=1024, n_layers=8, n_heads=8, vocab_size=4000, multiple_of=256)


def test_a_run_becomes_a_hugging_face_folder_and_answers_the_same(trained: Path, tmp_path: Path) -> None:
    result = invoke("convert-checkpoint", trained, tmp_path / "hf", "--to", "hf")
    assert result.exit_code == 0, result.stderr
    assert words(result.stdout).endswith("KiB in 1 file, read back and equal")
    ask = ("--prompt", "What is LLaMA?", "--temperature", "0", "--max-new-tokens", "8", "--device", "cpu")
    answers = [invoke("chat", "--ckpt", folder, *ask) for folder in (trained, tmp_path / "hf")]
    assert answers[0].exit_code == answers[1].exit_code == 0, answers[1].stderr
    assert answers[0].stdout == answers[1].stdout


def test_transformers_tokenizes_a_converted_folder_as_we_do(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    result = invoke("convert-checkpoint", trained, tmp_path / "hf", "--to", "hf")
    assert result.exit_code == 0, result.stderr
    ours, theirs = load_tokenizer(tmp_path / "hf" / "tokenizer.model"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("What is LLaMA?", "A token is a small piece of text.\n\n### Response:"):
        assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)]


def test_training_starts_from_a_hugging_face_folder(tokenizer_path: Path, tmp_path: Path) -> None:
    config = ModelConfig(32, 1, 4, 2, load_tokenizer(tokenizer_path).vocab_size, 16, max_seq_len=256)
    shutil.copy(tokenizer_path, write_huggingface(tmp_path / "hf", config))
    quickstart = [word for word in QUICKSTART if not word.startswith("model.params")]
    command = (*quickstart, "--output", tmp_path / "run", "train.epochs=1", "data.max_tokens=128")
    result = invoke(*command, "--pretrained", tmp_path / "hf", "--tokenizer", tokenizer_path)
    assert result.exit_code == 0, result.stderr
    assert f"from {tmp_path / 'hf'}" in words(result.stderr)


def test_a_diff_is_taken_and_applied(tmp_path: Path) -> None:
    base = write_meta(tmp_path / "base", state(dtype=torch.bfloat16), 2)
    tuned = write_consolidated(tmp_path / "tuned", state(dtype=torch.bfloat16, seed=1))
    diff = ("--to", "consolidated", "--base", base, "--diff", "--dtype", "fp32")
    result = invoke("convert-checkpoint", tuned, tmp_path / "diff", *diff)
    assert result.exit_code == 0, result.stderr
    assert "read back and equal; base + diff " in words(result.stdout)
    assert (tmp_path / "diff" / "consolidated.00-of-01.model-diff.pth").exists()
    applied = invoke("convert-checkpoint", tmp_path / "diff", tmp_path / "applied", "--to", "meta", "--base", base)
    assert applied.exit_code == 0, applied.stderr
    loaded = torch.load(tmp_path / "applied" / "consolidated.00.pth", weights_only=True)
    for name, tensor in state(dtype=torch.bfloat16, seed=1).items():
        assert torch.allclose(loaded[name].float(), tensor.float(), atol=1e-6), name


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "source", state())
    target = tmp_path / "target"
    command = ("convert-checkpoint", source, target)
    refused(invoke(*command), "Missing option '--to'")
    refused(invoke(*command, "--to", "gguf"), "Invalid value for '--to': 'gguf' is not one of 'meta', ")
    refused(invoke(*command, "--to", "meta", "--dtype", "int8"), "Invalid value for '--dtype'")
    refused(invoke(*command, "--to", "meta", "--model-parallel-size", 3), "size 3 is not one of 1, 2, 4, 8")
    refused(invoke("convert-checkpoint", source, source, "--to", "meta"), "is what is to be converted")
    refused(invoke(*command, "--to", "peft", "--context", 64), "an adapter has the context of its base")
    refused(invoke("convert-checkpoint", source, "", "--to", "meta"), "it is empty")
    refused(invoke("convert-checkpoint", tmp_path / "nowhere", target, "--to", "meta"), "no checkpoint folder")
    assert not target.exists()


def test_a_file_with_code_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return print, ("ran",)

    source = write_meta(tmp_path / "source", state())
    torch.save({**state(), "extra": Hostile()}, source / "consolidated.00.pth")
    result = invoke("convert-checkpoint", source, tmp_path / "target", "--to", "hf")
    refused(result, "is refused: it holds Python code besides tensors")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "source"
    tensors = {name: torch.full(shape, 0.5) for name, shape in shapes_of(LARGE).items()}
    return write_meta(folder, tensors, config=LARGE)


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda way: way.name)
def test_whoever_is_stopped_leaves_no_folder(way: signal.Signals, large: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    process = start("convert-checkpoint", large, target, "--to", "consolidated", "--model-parallel-size", 2)
    aside = tmp_path / ".writing-target"
    wait_until(lambda: aside.is_dir() and any(path.stat().st_size > 0 for path in aside.iterdir()), process)
    process.send_signal(way)
    process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[way]
    assert not target.exists()
    assert aside.exists() == (way == signal.SIGKILL), "only a kill leaves what was begun, under another name"


def test_what_a_kill_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".writing-target").mkdir()
    (tmp_path / ".writing-target" / "consolidated.00.pth").write_text("half")
    source = write_meta(tmp_path / "source", state())
    result = run("convert-checkpoint", source, tmp_path / "target", "--to", "meta")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


_PEAK = """
import json, sys
from pathlib import Path
from llama_acc.core.checkpoint.convert import Request, convert

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

source, target, to, size, small = sys.argv[1:]
convert(Request(small, Path(target + "-small"), to))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
convert(Request(source, Path(target), to, model_parallel_size=int(size)))
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured through /proc")
@pytest.mark.parametrize(("to", "size"), [("hf", 1), ("consolidated", 8)])
def test_memory_stays_small_whatever_the_models_size(to: str, size: int, large: Path, tmp_path: Path) -> None:
    small = write_meta(tmp_path / "small", state())
    command = [sys.executable, "-c", _PEAK, str(large), str(tmp_path / "target"), to, str(size), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (large / "consolidated.00.pth").stat().st_size > 400e6
    assert json.loads(done.stdout) < 100e6
