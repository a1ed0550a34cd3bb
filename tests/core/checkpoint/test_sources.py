"""Where a checkpoint folder says something twice: what counts is right, and it is reported."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_acc.core.checkpoint.convert import Converted, Request, convert
from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.load import main_dtype, read_weights
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import config_from_params
from llama_acc.core.model.tuning.adapter import Adapter
from tests.core.checkpoint.folders import (
    GROUPED,
    huggingface_logits,
    state,
    write_consolidated,
    write_huggingface,
    write_meta,
)
from tests.core.tiny import difference, document_logits, loaded_model

TOKENS = torch.arange(1, 60)
SMALL = replace(GROUPED, n_layers=1, vocab_size=80)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def save(folder: Path, tensors: dict[str, Tensor], file: str = "model.safetensors") -> None:
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file, {"format": "pt"})


def say(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | values))


def in_files(folder: Path, *files: str) -> None:
    """Puts the weights into files in turn, and an index that names them beside these."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    places = {name: files[number % len(files)] for number, name in enumerate(tensors)}
    for file in files:
        save(folder, {name: tensor for name, tensor in tensors.items() if places[name] == file}, file)
    stem = "pytorch_model.bin" if files[0].endswith(".bin") else "model.safetensors"
    say(folder, f"{stem}.index.json", metadata={}, weight_map=places)


def whole_beside_an_index(folder: Path) -> None:
    tensors = tensors_of(folder)
    in_files(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save(folder, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})


def other_head(folder: Path) -> None:
    save(folder, tensors_of(folder) | {HEAD: torch.randn(80, 64) * 0.1})


def same_head(folder: Path) -> None:
    tensors = tensors_of(folder)
    save(folder, tensors | {HEAD: tensors[EMBEDDING].clone()})


def only_head(folder: Path) -> None:
    tensors = tensors_of(folder)
    save(folder, {HEAD: tensors.pop(EMBEDDING), **tensors})


def overlaid_head(folder: Path) -> None:
    in_files(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save(folder, {HEAD: torch.randn(80, 64) * 0.1}, "overlay.safetensors")
    say(folder, "model.safetensors.index.json", weight_map=index["weight_map"] | {HEAD: "overlay.safetensors"})


def beside_an_adapter(folder: Path) -> None:
    in_files(folder, "one.safetensors", "two.safetensors")
    save(folder, {"some": torch.ones(1)}, "adapter_model.safetensors")


def two_in_bin(folder: Path) -> None:
    in_files(folder, "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def tied_in_bin(folder: Path) -> None:
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    # As torch saves tied weights: two names of one memory, parameters among them.
    embedding = torch.nn.Parameter(tensors[EMBEDDING])
    save(folder, tensors | {EMBEDDING: embedding, HEAD: embedding}, "pytorch_model.bin")


def bin_beside(folder: Path) -> None:
    save(folder, {HEAD: torch.randn(80, 64)}, "pytorch_model.bin")


TIED = {"tie_word_embeddings": True}
PLAIN = {"rope_type": "default"}
THETA = PLAIN | {"rope_theta": 5e3}
ROPES_DISAGREE = "rope_scaling and rope_parameters disagree; rope_scaling counts"


@pytest.mark.parametrize(
    ("options", "change", "note"),
    [
        (TIED, other_head, "(tie_word_embeddings), but in the files they differ: both count"),
        (TIED, same_head, None),
        (TIED, only_head, None),
        ({}, overlaid_head, "by its index, these tensors are not used:\n  lm_head.weight of model-0000"),
        ({}, beside_an_adapter, "not read, which its index does not name: adapter_model.safetensors"),
        ({}, whole_beside_an_index, "not read, which its index does not name: model.safetensors"),
        ({}, two_in_bin, None),
        (TIED, tied_in_bin, None),
        ({}, bin_beside, "not read, beside model.safetensors: pytorch_model.bin"),
        ({}, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": PLAIN}, ROPES_DISAGREE),
        ({}, {"rope_scaling": PLAIN, "rope_parameters": THETA}, ROPES_DISAGREE),
        (
            {},
            {"rope_theta": 3e3, "rope_parameters": THETA},
            "rope_theta is 3000.0, and 5000.0 in rope_parameters",
        ),
        ({}, {"dtype": "float16"}, "says 'float16', most tensors are float32, which counts"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_what_counts_is_what_transformers_takes_and_is_reported(
    options: dict[str, Any], change: Callable[[Path], None] | dict[str, Any], note: str | None, tmp_path: Path
) -> None:
    folder = write_huggingface(tmp_path / "hf", SMALL, **options)
    expected = huggingface_logits(folder, TOKENS) if change is whole_beside_an_index else None
    say(folder, **change) if isinstance(change, dict) else change(folder)
    (ours,) = document_logits(loaded_model(folder), [TOKENS])
    expected = (
        huggingface_logits(folder, TOKENS) if expected is None else expected
    )  # it would read the whole file alone
    assert difference(ours, expected) < 1e-5
    notes = read_weights([inspect(folder)]).notes
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


def test_a_head_of_its_own_stays_through_a_conversion_and_is_noted(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "hf", SMALL, **TIED)
    other_head(folder)
    made = convert(Request(folder, tmp_path / "made", "hf"))
    assert json.loads((tmp_path / "made" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "made" / "model.safetensors")[HEAD], tensors_of(folder)[HEAD])
    assert [note for note in made.notes if "they differ: both count" in note]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({HEAD: "../model.safetensors"}, "names '../model.safetensors', which is no file of its folder"),
        ({HEAD: "absent.safetensors"}, "names files that are missing: absent.safetensors"),
        ({HEAD: 3}, 'must hold {"weight_map": {TENSOR: FILE, ...}}'),
        ([], 'must hold {"weight_map": {TENSOR: FILE, ...}}'),
    ],
    ids=["outside", "absent", "no name", "no map"],
)
def test_an_index_of_other_files_is_refused(places: object, said: str, tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "hf", SMALL)
    say(folder, "model.safetensors.index.json", weight_map=places)
    with pytest.raises(UserError) as refused:
        inspect(folder)
    assert said in refused.value.message


def test_params_and_config_that_disagree_are_refused_and_layers_that_disagree_are_reported(tmp_path: Path) -> None:
    base = write_meta(tmp_path / "base", state(SMALL), config=SMALL)
    later = write_consolidated(tmp_path / "later", state(SMALL), config=replace(SMALL, rope_theta=5e5))
    (note,) = read_weights([inspect(base), inspect(later)]).notes
    assert note.startswith(f"rope_theta is 10000.0 in {base / 'params.json'}, and 500000.0 in {later / 'config.json'}")
    say(base, model_type="llama", dim=3)  # Hugging Face's, which may lie beside Meta's files
    assert read_config([inspect(base)])
    (base / "config.json").write_text('{"dim": 3}')
    with pytest.raises(UserError, match=r"params\.json and .*config\.json disagree: dim 64 and 3"):
        read_config([inspect(base)])


@pytest.mark.parametrize(
    ("size", "context"),
    [
        # LLaMA 1, LLaMA 2: https://github.com/meta-llama, params.json and model cards. Others: model/test_config.py.
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}, 2048),
        ({"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}, 4096),
        ({"dim": 8192, "n_layers": 80, "n_heads": 64, "norm_eps": 1e-5}, 2048),
        ({"dim": 64, "n_layers": 2, "n_heads": 4}, 2048),
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "max_seq_len": 512}, 512),
    ],
    ids=["1 7B", "2 13B", "1 65B", "unknown", "said"],
)
def test_a_known_size_knows_its_context(size: dict[str, Any], context: int) -> None:
    assert config_from_params(size).max_seq_len == context


def made_from_meta(tmp_path: Path, **options: Any) -> tuple[Converted, dict[str, Any]]:
    folder = write_meta(tmp_path / "meta", state(SMALL), config=SMALL)
    params = json.loads((folder / "params.json").read_text())
    del params["max_seq_len"]
    (folder / "params.json").write_text(json.dumps(params))
    made = convert(Request(folder, tmp_path / "made", "hf", **options))
    return made, json.loads((tmp_path / "made" / "config.json").read_text())


@pytest.mark.parametrize(("context", "written"), [(None, 2048), (777, 777)])
def test_a_context_that_is_not_said_is_reported_and_can_be_given(
    context: int | None, written: int, tmp_path: Path
) -> None:
    made, config = made_from_meta(tmp_path, context=context)
    assert config["max_position_embeddings"] == written
    assert bool([note for note in made.notes if "does not say its context: 2048" in note]) == (context is None)


def test_mixed_types_are_computed_in_that_of_most_values_and_what_is_rounded_is_named(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "hf", SMALL, dtype=torch.bfloat16)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(folder).items()}
    norm = tensors["model.norm.weight"].float()
    for wide, rounded in ((norm, ["norm.weight"]), (norm.half(), ["norm.weight"]), (norm.bfloat16(), [])):
        save(folder, tensors | {"model.norm.weight": wide})
        dtype, notes = main_dtype(read_weights([inspect(folder)]).tensors)
        assert dtype == torch.bfloat16
        assert len(notes) == len(rounded)
        assert all(name in note for note, name in zip(notes, rounded, strict=True))
    # Most of the values count, not those of the head.
    save(folder, {name: tensor.float() for name, tensor in tensors.items()} | {HEAD: tensors[HEAD]})
    assert main_dtype(read_weights([inspect(folder)]).tensors) == (torch.float32, [])
    convert(Request(folder, tmp_path / "made", "hf"))
    assert json.loads((tmp_path / "made" / "config.json").read_text())["torch_dtype"] == "float32"
    assert difference(huggingface_logits(tmp_path / "made", TOKENS), huggingface_logits(folder, TOKENS)) == 0


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.eye(64).to_sparse(), "norm.weight (sparse_coo, float32, cpu)"),
        (torch.empty(64, device="meta"), "norm.weight (strided, float32, meta)"),
    ],
    ids=["sparse", "meta"],
)
def test_tensors_without_numbers_to_read_are_refused(tensor: Tensor, said: str, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "base", state(SMALL), config=SMALL)
    torch.save(state(SMALL) | {"norm.weight": tensor}, folder / "consolidated.00.pth")
    with pytest.raises(UserError) as refused:
        read_weights([inspect(folder)])
    assert said in refused.value.message


@pytest.mark.parametrize("with_tensors", [False, True])
def test_a_checkpoint_sees_only_if_it_has_tensors_for_that(with_tensors: bool, tmp_path: Path) -> None:
    tuned = replace(SMALL, tuning=Adapter(0, 1, 4))
    tensors = state(tuned) | ({"visual_query": torch.zeros(4, 768)} if with_tensors else {})
    folder = write_consolidated(tmp_path / "text", {}, config=tuned)
    torch.save({"model": tensors}, folder / "consolidated.00-of-01.model.pth")
    say(folder, trainable_mode="mm_stage2")
    say(folder, "meta.json", llama_type="llama_adapter")
    config = read_config([inspect(folder)])
    assert config is not None
    assert (config.vision is not None) == with_tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model_type": "mixtral"},
            'model_type: "mixtral" (known are llama, mistral, qwen2, qwen3, smollm3, granite; nearest is mistral',
        ),
        ({"model_type": None}, "missing key 'model_type'"),
        ({"hidden_act": "gelu"}, 'hidden_act: "gelu" (only "silu")'),
        ({"attention_bias": True}, "attention_bias: true, mlp_bias: false (only both or none)"),
        ({"mlp_bias": True}, "mlp_bias: true"),
        ({"head_dim": 3}, "the head dimension (3) must be even"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs low_freq_factor and high_freq"),
        ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, 'rope_scaling: "longrope" (only default,'),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked"]}, "layer_types: chunked"),
        ({"model_type": "smollm3", "layer_types": ["sliding_attention"]}, "but use_sliding_window is not true"),
        ({"intermediate_size": None}, "missing key 'intermediate_size'"),
        ({"num_attention_heads": None}, "missing key 'num_attention_heads'"),
        ({"num_hidden_layers": "two"}, "n_layers: should be a valid integer"),
        ({"num_hidden_layers": 10**9}, "n_layers: should be less than or equal to 1024, not 1000000000"),
        ({"hidden_size": 10**39}, "dim: should be less than or equal to "),
        ({"vocab_size": 10**12}, "vocab_size: should be less than or equal to 16777216"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        (
            {"rope_theta": 1e300, "rope_parameters": None},
            "rope_theta: should be less than or equal to 1000000000000000",
        ),
        ({"intermediate_size": 10**12}, "the SwiGLU width must be a whole number from 1 to"),
        ({"hidden_size": "wide", "head_dim": 4}, "dim: should be a valid integer, not 'wide'"),
        ({"num_attention_heads": 0, "head_dim": 4}, "n_heads: should be greater than or equal to 1, not 0"),
        ({"rope_scaling": [1]}, "rope_scaling: [1] (a mapping is expected)"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor: should be a valid number, not '2'"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    values = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_size": 10, "intermediate_size": 64} | change))
    with pytest.raises(UserError) as refused:
        read_config([inspect(tmp_path)])
    assert said in refused.value.message
