"""Conversions are bitwise, whatever the way; and what transformers computes from the result is what we compute."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_acc.core.atomic import check_manifest
from llama_acc.core.checkpoint.convert import Converted, Request, Target, convert
from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.checkpoint.save import TensorFile
from llama_acc.core.data.templates import TEMPLATES
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import parameter_count
from tests.core.checkpoint.folders import (
    GROUPED,
    huggingface_logits,
    same_bits,
    shard,
    state,
    tensors_of,
    write_consolidated,
    write_huggingface,
    write_meta,
)
from tests.core.tiny import difference, document_logits, loaded_model

TOKENS = torch.arange(1, 60)


def converted(source: Path, target: Path, to: Target, **options: Any) -> Path:
    convert(Request(source, target, to, **options))
    return target


@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float16), (2, torch.bfloat16), (8, torch.float32)], ids=str)
def test_a_round_through_all_layouts_and_sizes_is_bitwise(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = state(dtype=dtype)
    expected["norm.weight"][0] = float("nan")
    expected["norm.weight"][1] = -0.0
    meta = write_meta(tmp_path / "meta", expected, size)
    hf = converted(meta, tmp_path / "hf", "hf")
    four = converted(hf, tmp_path / "four", "consolidated", model_parallel_size=4)
    back = converted(four, tmp_path / "back", "meta", model_parallel_size=size)
    for folder in (hf, four, back):
        assert same_bits(tensors_of(folder), expected), folder
        check_manifest(folder, verify=True)
    for rank in range(size):
        name = f"consolidated.{rank:02d}.pth"
        assert same_bits(torch.load(back / name, weights_only=True), shard(expected, rank, size))
    content = torch.load(four / "consolidated.03-of-04.model.pth", weights_only=True)
    named = {name.removeprefix("llma."): tensor for name, tensor in content["model"].items()}
    assert same_bits(named, shard(expected, 3, 4))
    assert json.loads((four / "meta.json").read_text()) == {"llama_type": "llama"}


def test_transformers_computes_the_same_from_a_folder_of_several_files(tmp_path: Path) -> None:
    """Of other shapes and families: tests/core/model/test_parity.py and test_families.py."""
    source = write_consolidated(tmp_path / "source", state())
    hf = converted(source, tmp_path / "hf", "hf", file_bytes=100_000)
    (ours,) = document_logits(loaded_model(source), [TOKENS])
    assert difference(huggingface_logits(hf, TOKENS), ours) < 1e-5
    (direct,) = document_logits(loaded_model(hf), [TOKENS])
    assert torch.equal(direct, ours)
    files = sorted(path.name for path in hf.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * parameter_count(GROUPED)
    assert len(index["weight_map"]) == len(state())


def test_a_tied_model_stays_tied_and_an_untied_one_untied(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = write_huggingface(tmp_path / "source", tie_word_embeddings=True)
    meta = converted(source, tmp_path / "meta", "meta")
    hf = converted(meta, tmp_path / "hf", "hf")
    assert same_bits(load_file(hf / "model.safetensors"), load_file(source / "model.safetensors"))
    assert json.loads((hf / "config.json").read_text())["tie_word_embeddings"] is True
    assert difference(huggingface_logits(hf, TOKENS), huggingface_logits(source, TOKENS)) < 1e-5
    other = converted(write_meta(tmp_path / "other", state()), tmp_path / "other-hf", "hf")
    assert json.loads((other / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_is_too_large_for_fp16_is_refused(tmp_path: Path) -> None:
    tensors = state()
    tensors["norm.weight"][3] = 1e5
    source = write_meta(tmp_path / "source", tensors)
    with pytest.raises(RunError, match=r"norm\.weight has values above 65504, too large for fp16"):
        converted(source, tmp_path / "half", "meta", dtype="fp16")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("size", [1, 4])
def test_a_diff_added_to_its_base_is_the_source(size: int, tmp_path: Path) -> None:
    base = write_meta(tmp_path / "base", state(dtype=torch.bfloat16), 2)
    change = {name: 0.01 * tensor for name, tensor in state(seed=1).items()}
    tuned = {name: (tensor.float() + change[name]).bfloat16() for name, tensor in state(dtype=torch.bfloat16).items()}
    source = write_consolidated(tmp_path / "tuned", tuned, 1)
    request = Request(
        source, tmp_path / "diff", "consolidated", base=base, diff=True, dtype="fp32", model_parallel_size=size
    )
    nbytes = sum(tensor.numel() * 4 for rank in range(size) for tensor in shard(tuned, rank, size).values())
    assert convert(request) == Converted(tmp_path / "diff", len(tuned), size, nbytes, largest_error=0.0)
    layout = inspect(tmp_path / "diff")
    assert (layout.format, len(layout.shards)) == ("consolidated_diff", size)
    assert same_bits(tensors_of(base, tmp_path / "diff"), tuned)
    applied = converted(tmp_path / "diff", tmp_path / "applied", "hf", base=base)
    assert same_bits(tensors_of(applied), tuned)
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"is a diff checkpoint: it is added to its base\ngive that with --base DIR"):
        converted(tmp_path / "diff", tmp_path / "alone", "meta")


def test_tokenizer_template_and_recipe_come_along(tokenizer_path: Path, tmp_path: Path) -> None:
    config = ModelConfig(64, 1, 4, 2, 512, 16, max_seq_len=64)
    root = tmp_path / "release"
    source = write_meta(root / "7B", state(config), config=config)
    shutil.copy(tokenizer_path, root / "tokenizer.model")  # one level up, as Meta has it
    (source / "template.json").write_text(TEMPLATES["alpaca"].to_json())
    (source / "recipe.yaml").write_text("name: x\n")
    (source / "notes.txt").write_text("mine")
    hf = converted(source, tmp_path / "hf", "hf")
    assert (hf / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()
    assert (hf / "template.json").exists()
    assert (hf / "recipe.yaml").exists()
    assert not (hf / "notes.txt").exists()
    settings = json.loads((hf / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, 2)
    (hf / "special_tokens_map.json").write_text("{}")
    meta = converted(hf, tmp_path / "meta", "meta")
    present = {path.name for path in meta.iterdir()}
    assert {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"} <= present


def test_too_little_disk_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_meta(tmp_path / "source", state())
    monkeypatch.setattr("llama_acc.core.checkpoint.convert.free_bytes", lambda folder: 1 << 20)
    with pytest.raises(UserError, match=r"too little disk: .*target takes 64\.5 MiB, 1\.0 MiB are free"):
        converted(source, tmp_path / "target", "hf")
    assert not (tmp_path / "target").exists()


def test_a_damaged_result_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, write, calls = write_meta(tmp_path / "source", state()), os.pwrite, list[int]()

    def forgetful(file: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        return write(file, bytes(len(data)) if len(calls) == 3 else data, offset)

    monkeypatch.setattr(os, "pwrite", forgetful)
    with pytest.raises(
        RunError, match=r"read back from the disk: layers\.0\.attention\.wk\.weight is not what was written"
    ):
        converted(source, tmp_path / "target", "meta")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_tensor_under_anothers_name_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, write = write_meta(tmp_path / "source", state()), TensorFile.write

    def confused(file: TensorFile, name: str, rows: torch.Tensor, first: int = 0, verified: bool = False) -> None:
        other = {"wk": "wv", "wv": "wk"}
        write(file, ".".join(other.get(part, part) for part in name.split(".")), rows, first, verified)

    monkeypatch.setattr(TensorFile, "write", confused)
    with pytest.raises(RunError, match=r"layers\.0\.attention\.wk\.weight is not what was meant"):
        converted(source, tmp_path / "target", "meta")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_progress_counts_every_byte_twice(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    source = write_meta(tmp_path / "source", state())
    convert(Request(source, tmp_path / "hf", "hf"), lambda *what: told.append(what))
    total = 2 * 4 * parameter_count(GROUPED)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == ("taking checksums", total, total)
    assert [what for what, done, _ in told if done == total // 2] == ["writing"]


# What vLLM runs of the architectures that `--to hf` writes: vllm/model_executor/models/registry.py.
VLLM_MODELS = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_a_hugging_face_folder_is_what_vllm_loads(family: Any, tokenizer_path: Path, tmp_path: Path) -> None:
    """The rules of vllm/model_executor/model_loader/default_loader.py, vllm/config/model.py and sampling_params.py."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = ModelConfig(
        64, 1, 4, 2, 304, 16, max_seq_len=64, family=family, qkv_bias=family == "qwen2", qk_norm=family == "qwen3"
    )
    source = write_consolidated(tmp_path / "source", state(config), config=config)
    shutil.copy(tokenizer_path, source / "tokenizer.model")
    (source / "template.json").write_text(TEMPLATES["chatml"].to_json())
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    hf = converted(source, tmp_path / "hf", "hf", file_bytes=50_000)
    # Its model: the first of the architectures that it has; the type and the context are transformers'.
    settings = AutoConfig.from_pretrained(hf)
    assert set(settings.architectures) <= VLLM_MODELS
    assert (settings.model_type, settings.max_position_embeddings, settings.dtype) == (family, 64, torch.float32)
    # Its weights: every *.safetensors that the index names; a consolidated one would make it read Mistral's form.
    files = {path.name for path in hf.glob("*.safetensors")}
    index = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"]
    assert files == set(index.values())
    assert not list(hf.glob("consolidated*"))
    named = {name: file for file in files for name in load_file(hf / file)}
    assert named == index
    # Where it stops: generation_config.json's ids, one or a list; how it is asked: the tokenizer's chat template.
    ends = GenerationConfig.from_pretrained(hf).eos_token_id
    assert {2, 7} <= set(ends)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the"}], tokenize=False, add_generation_prompt=True
    )
    assert said.endswith("<|im_start|>assistant\n")
    assert tokenizer.eos_token_id in ends
