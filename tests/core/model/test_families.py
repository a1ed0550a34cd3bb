"""Today's relatives of LLaMA: the same numbers as transformers, whose own class made and saved each folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_acc.core.checkpoint.convert import Request, convert
from llama_acc.core.checkpoint.huggingface import huggingface_name, rotated_heads
from llama_acc.core.checkpoint.layout import inspect, read_config
from llama_acc.core.checkpoint.lazy import LazyTensor, reorder_heads
from llama_acc.core.checkpoint.load import fill, read_weights
from llama_acc.core.distributed.groups import init_distributed
from llama_acc.core.errors import UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.layers import Linear
from llama_acc.core.model.nf4 import dense
from llama_acc.core.model.transformer import Transformer, build_on_meta, initialize, quantize_on_meta
from llama_acc.core.model.tuning import METHODS
from tests.core.model.test_parity import TOLERANCE, random_documents, ways
from tests.core.ranks import run_ranks
from tests.core.tiny import CPU, cached_logits, difference, document_logits, loaded_model

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# What differs from a small LLaMA with grouped queries, by what it shows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama3.1": {"rope_theta": 500000.0, "rope_scaling": _LLAMA3},
    "llama3.2, tied": {"rope_scaling": {**_LLAMA3, "factor": 32.0}, "tie_word_embeddings": True},
    "llama, linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama, dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "llama, yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "head_dim": 64,
    },
    "llama, yarn in full": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "truncate": False,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        }
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
    "mistral, window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied, window from layer 1": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "num_attention_heads": 8,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3, tied, window on some": {
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
    },
    "smollm3": {"model_type": "smollm3", "rope_theta": 2000000.0},
    "smollm3, layers of its own, window": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1, 0],
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": 4,
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
        "logits_scaling": 2.0,
    },
}


def write_family(folder: Path, options: dict[str, Any], seed: int = 0) -> Any:
    """A random model of transformers with these settings, biases and norms included; saved to the folder."""
    import transformers

    settings = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **options,
    }
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


def config_of(folder: Path) -> ModelConfig:
    config = read_config([inspect(folder)])
    assert config is not None
    return config


def their_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens.unsqueeze(0)).logits[0]
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers_uncached_cached_and_in_a_stream(name: str, tmp_path: Path) -> None:
    theirs = write_family(tmp_path, FAMILIES[name])
    model = loaded_model(tmp_path)
    before, document, after = random_documents(model.config, [5, 70, 18], 0)  # over 4 times 16
    expected = their_logits(theirs, document)
    assert difference(document_logits(model, [document])[0], expected) < TOLERANCE
    assert difference(document_logits(model, [before, document, after])[1], expected) < TOLERANCE
    if name != "llama, dynamic":  # a longer text turns all of its positions by less
        for way, chunks in ways(len(document)).items():
            assert difference(cached_logits(model, document, chunks), expected) < TOLERANCE, way


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's model as transformers saves it."""
    root = tmp_path_factory.mktemp("families")
    made = {name: root / f"{place}" for place, name in enumerate(FAMILIES)}
    for name, folder in made.items():
        write_family(folder, FAMILIES[name])
    return made


def their_model(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def by_their_names(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or their gradients, as Hugging Face's models have them."""
    found = {}
    for name, tensor in tensors.items():
        heads = rotated_heads(name, config)
        lazy = LazyTensor.of(tensor)
        found[huggingface_name(name)] = (lazy if heads is None else reorder_heads(lazy, heads, to_meta=False)).to(
            tensor.dtype
        )
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_steps_are_those_of_transformers(name: str, folders: dict[str, Path]) -> None:
    """Twenty steps of one of each kind; runs of several families: tests/core/train/test_families_runs.py."""
    theirs, ours = their_model(folders[name]), loaded_model(folders[name])
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1) for model in (theirs, ours)]
    for step in range(20 if name in ("llama3.1", "qwen3, tied, window on some", "granite") else 3):
        documents = random_documents(ours.config, [40, 11], step)
        expected = torch.stack(
            [F.cross_entropy(theirs(d.unsqueeze(0)).logits[0, :-1], d[1:], reduction="sum") for d in documents]
        ).sum()
        targets = torch.cat([F.pad(document[1:], (0, 1), value=-100) for document in documents])
        positions = torch.cat([torch.arange(len(document)) for document in documents])
        loss = ours(torch.cat(documents), positions, [40, 11], targets)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5 if step == 0 else 1e-4)
        for optimizer, value in zip(optimizers, (expected, loss), strict=True):
            optimizer.zero_grad()
            value.backward()
        if step == 0:
            gradients = {key: value.grad for key, value in ours.named_parameters() if value.grad is not None}
            found = by_their_names(ours.config, gradients)
            known = dict(theirs.named_parameters())
            assert found.keys() == known.keys()
            for key, gradient in found.items():
                assert difference(gradient, known[key].grad) < 1e-4, key
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_converted_there_and_back_has_the_same_bits_and_settings(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    convert(Request(folders[name], tmp_path / "ours", "consolidated"))
    assert config_of(tmp_path / "ours") == config_of(folders[name])
    convert(Request(tmp_path / "ours", tmp_path / "back", "hf"))
    before, after = (load_file(folder / "model.safetensors") for folder in (folders[name], tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    (tokens,) = random_documents(config_of(folders[name]), [70], 1)
    there, back = their_model(folders[name]), their_model(tmp_path / "back")
    assert type(back) is type(there)
    assert torch.equal(their_logits(back, tokens), their_logits(there, tokens))


def test_metas_layout_has_both_matrices_of_a_tied_model(folders: dict[str, Path], tmp_path: Path) -> None:
    convert(Request(folders["llama3.2, tied"], tmp_path / "meta", "meta"))
    tensors = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"])
    assert not config_of(tmp_path / "meta").tie_word_embeddings


@pytest.mark.parametrize("name", ["mistral", "mistral, window"])
def test_a_release_of_mistral_is_read_and_exported_as_its_folder_for_transformers(
    name: str, folders: dict[str, Path], tokenizer_path: Path, tmp_path: Path
) -> None:
    convert(Request(folders[name], tmp_path / "meta", "meta"))
    release = tmp_path / "release"
    release.mkdir()
    save_file(torch.load(tmp_path / "meta" / "consolidated.00.pth"), release / "consolidated.safetensors")
    (release / "tokenizer.model.v3").write_bytes(tokenizer_path.read_bytes())
    params = {"dim": 64, "n_layers": 4, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2}
    if name == "mistral":
        params["head_dim"] = 8
    else:
        params["sliding_window"] = 7
    (release / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-5, "vocab_size": 128}))
    assert config_of(release).max_seq_len == 32768
    convert(Request(release, tmp_path / "hf", "hf"))
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    (tokens,) = random_documents(config_of(release), [40], 1)
    there, back = their_model(folders[name]), their_model(tmp_path / "hf")
    assert type(back) is type(there)
    assert torch.equal(their_logits(back, tokens), their_logits(there, tokens))


def split_logits(names: list[str], folders: list[str]) -> dict[str, Any]:
    """Of a rank of two: the logits of a document, and the gradients of what it has whole."""
    with init_distributed(CPU, 2) as parallel:
        found = {}
        for name, folder in zip(names, map(Path, folders), strict=True):
            config = config_of(folder)
            model = build_on_meta(config, torch.float32, parallel)
            fill(model, read_weights([inspect(folder)], parallel.model_rank, 2), CPU, torch.float32, copy=True)
            (tokens,) = random_documents(config, [33], 0)
            logits = document_logits(model, [tokens])[0]
            model(tokens, torch.arange(33), [33], tokens.roll(-1)).backward()
            gradients = {key: value.grad.tolist() for key, value in model.named_parameters() if value.grad is not None}
            found[name] = {
                "logits": logits.tolist(),
                "norms": {key: gradient for key, gradient in gradients.items() if "_norm" in key},
                "embedding": gradients["tok_embeddings.weight"],
            }
    return found


def test_two_model_parallel_ranks_compute_what_one_does(folders: dict[str, Path]) -> None:
    ranks = run_ranks(
        2, f"{__name__}:split_logits", names=list(folders), folders=[str(folder) for folder in folders.values()]
    )
    for name, folder in folders.items():
        model = loaded_model(folder)
        (tokens,) = random_documents(model.config, [33], 0)
        expected = document_logits(model, [tokens])[0]
        model(tokens, torch.arange(33), [33], tokens.roll(-1)).backward()
        parameters = dict(model.named_parameters())
        halves = torch.cat([torch.tensor(rank[name]["embedding"]) for rank in ranks], 1)
        gradient = parameters["tok_embeddings.weight"].grad
        assert gradient is not None
        assert difference(halves, gradient) < 1e-4, name
        for rank in ranks:
            assert difference(torch.tensor(rank[name]["logits"]), expected) < TOLERANCE, name
            for key, value in rank[name]["norms"].items():
                norm = parameters[key].grad
                assert norm is not None
                assert difference(torch.tensor(value), norm) < 1e-4, (name, key)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_nf4_it_computes_what_transformers_does_with_the_same_rounded_matrices(
    name: str, folders: dict[str, Path]
) -> None:
    config, theirs = config_of(folders[name]), their_model(folders[name])
    model = build_on_meta(config, torch.float32).requires_grad_(False)
    quantize_on_meta(model)
    fill(model, read_weights([inspect(folders[name])]), CPU, torch.float32, copy=True)
    rounded = {
        f"{key}.weight": dense(module.weight, module.scales, torch.float32)
        for key, module in model.named_modules()
        if isinstance(module, Linear)
    }
    theirs.load_state_dict(by_their_names(config, rounded), strict=False)
    (tokens,) = random_documents(config, [33], 0)
    expected = their_logits(theirs, tokens)
    assert difference(document_logits(model, [tokens])[0], expected) < TOLERANCE
    assert difference(document_logits(loaded_model(folders[name]), [tokens])[0], expected) > 0.01, "it is rounded"


def tuned_model(folder: Path, method: str) -> Transformer:
    config = config_of(folder)
    tuning = METHODS[method]().with_num_layers(config.n_layers)
    model = build_on_meta(replace(config, tuning=tuning), torch.float32)
    model.to_empty(device="cpu")
    initialize(model, 0)
    weights = {key: tensor.to(torch.float32) for key, tensor in read_weights([inspect(folder)]).tensors.items()}
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("method", ["bias_norm", "lora", "lora_bias_norm", "adapter"])
@pytest.mark.parametrize("name", ["llama3.2, tied", "mistral, window", "qwen2", "qwen3", "smollm3", "granite"])
def test_every_method_starts_from_it_and_learns(name: str, method: str, folders: dict[str, Path]) -> None:
    model = tuned_model(folders[name], method)
    (tokens,) = random_documents(model.config, [40], 0)
    expected = document_logits(loaded_model(folders[name]), [tokens])[0]
    assert difference(document_logits(model, [tokens])[0], expected) < TOLERANCE
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) > 0
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(tokens, torch.arange(40), [40], tokens.roll(-1), 1 / 40)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    generated = document_logits(model, [tokens])[0]
    assert difference(cached_logits(model, tokens, [20, *[1] * 20]), generated) < TOLERANCE


@pytest.mark.parametrize(("name", "family"), [("qwen2", "llama"), ("smollm3", "smollm3"), ("qwen3", None)])
def test_biases_go_where_hugging_face_has_a_place_for_them(
    name: str, family: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = tuned_model(folders[name], "bias_norm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    (tokens,) = random_documents(model.config, [40], 0)
    expected = document_logits(model, [tokens])[0]
    folder = tmp_path / "tuned"
    folder.mkdir()
    named = {f"llma.{key}": parameter.detach() for key, parameter in model.named_parameters()}
    torch.save({"model": named}, folder / "consolidated.00-of-01.model.pth")
    (folder / "config.json").write_text(json.dumps(model.config.to_params()))
    (folder / "meta.json").write_text(json.dumps({"llama_type": model.config.llama_type}))
    request = Request(folder, tmp_path / "hf", "hf")
    if family is None:
        with pytest.raises(UserError, match="Hugging Face's qwen3 has no place for the biases of bias_norm"):
            convert(request)
        return
    convert(request)
    theirs = their_model(tmp_path / "hf")
    assert theirs.config.model_type == family
    assert difference(their_logits(theirs, tokens), expected) < TOLERANCE
