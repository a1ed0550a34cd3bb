"""GGUF, read back with llama.cpp's own package. tests/soak/test_llama_cpp.py has llama.cpp itself read it."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from llama_acc.core.checkpoint.convert import Converted, Request, convert
from llama_acc.core.data.templates import TEMPLATES
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.tuning import FULL, Tuning
from llama_acc.core.model.tuning.bias_norm import BiasNorm
from llama_acc.core.model.tuning.lora import LoRA, LoRABiasNorm
from tests.core.checkpoint.folders import GROUPED, state, write_huggingface, write_meta
from tests.core.checkpoint.test_tuned import write_tuned
from tests.core.model.test_families import FAMILIES, write_family
from tests.core.tokenizers import END, START, TOOL, byte_fallback, byte_level, chatml, llama3_style, token

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def converted(source: Path, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray], Converted]:
    """The values in the file, its tensors (dequantized), and what the conversion says."""
    made = convert(Request(source, folder, "gguf", **options))
    reader = gguf.GGUFReader(folder / f"model-{options.get('gguf_type', 'f16')}.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}, made


def expected_tensors(folder: Path, values: dict[str, Any]) -> dict[str, np.ndarray]:
    """A Hugging Face folder's, by llama.cpp's names, in the order of heads of its convert_hf_to_gguf.py."""
    architecture, found = values["general.architecture"], {}
    heads = {kind: values[f"{architecture}.attention.head_count{kind}"] for kind in ("", "_kv")}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        *_, layer, module = (
            ["", *module.removeprefix("model.layers.").split(".", 1)] if ".layers." in name else ["", module]
        )
        array = tensor.float().numpy()
        if architecture in ("llama", "smollm3") and module in ("self_attn.q_proj", "self_attn.k_proj"):
            count = heads["" if "q_proj" in module else "_kv"]
            array = (
                array.reshape(count, 2, len(array) // count // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            )
        found[f"blk.{layer}." * bool(layer) + f"{NAMES[module]}.{leaf}"] = array
    return found


FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3.1": ("llama", {"rope.freq_base": 500000.0}),
    "llama3.2, tied": ("llama", {"context_length": 64}),
    "llama, linear": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama, yarn": (
        "llama",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": 1.0,
            "attention.key_length": 64,
        },
    ),
    "llama, dynamic": ("llama", {"rope.scaling.type": None}),
    "mistral, window": ("llama", {"context_length": 7}),
    "qwen2": ("qwen2", {"attention.head_count_kv": 2, "feed_forward_length": 96}),
    "qwen3": ("qwen3", {"attention.key_length": 32, "rope.dimension_count": 32}),
    "smollm3": ("smollm3", {"block_count": 4, "vocab_size": 300}),
}


@pytest.mark.parametrize("family", FILES)
def test_shape_and_tensors_of_a_family(family: str, tokenizer_path: Path, tmp_path: Path) -> None:
    architecture, wanted = FILES[family]
    theirs = write_family(tmp_path / "hf", FAMILIES[family] | {"vocab_size": 300})
    shutil.copy(tokenizer_path, tmp_path / "hf")
    values, tensors, made = converted(tmp_path / "hf", tmp_path / "gguf", gguf_type="f32")
    assert values["general.architecture"] == architecture
    assert {key: values.get(f"{architecture}.{key}") for key in wanted} == wanted
    factors = tensors.pop("rope_freqs.weight", None)
    assert (factors is not None) == ("llama3" in family)
    if factors is not None:
        plain = 1.0 / values["llama.rope.freq_base"] ** (np.arange(0, 16, 2) / 16)
        assert plain / factors == pytest.approx(theirs.model.rotary_emb.inv_freq.numpy())
    expected = expected_tensors(tmp_path / "hf", values)
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(tensors[name], array), name
    assert [note.split(":")[0] for note in made.notes] == {
        "llama, dynamic": ["llama.cpp has no rotary scaling dynamic"],
        "mistral, window": ["llama.cpp has no sliding window here"],
    }.get(family, [])


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_types(kind: str, tokenizer_path: Path, tmp_path: Path) -> None:
    narrow = replace(GROUPED, vocab_size=300, multiple_of=36)  # w2's rows are of no whole blocks of 32
    tensors = state(narrow)
    shutil.copy(tokenizer_path, write_meta(tmp_path / "meta", tensors, 2, config=narrow))
    values, found, _ = converted(tmp_path / "meta", tmp_path / "gguf", gguf_type=kind)
    assert values["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[kind]
    for theirs, ours in (("attn_q", "attention.wq"), ("ffn_down", "feed_forward.w2"), ("attn_norm", "attention_norm")):
        name, tensor = f"blk.1.{theirs}.weight", tensors[f"layers.1.{ours}.weight"]
        expected = tensor.to({"f16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float16)).float().numpy()
        if theirs == "attn_norm":
            expected = tensor.numpy()
        elif kind == "q8_0" and theirs == "attn_q":
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            expected = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), q8_0), q8_0)
            assert np.abs(expected - tensor.numpy()).max() > 0
        assert np.array_equal(found[name], expected)


def test_a_sentencepiece_tokenizer_with_added_tokens(tokenizer_path: Path, tmp_path: Path) -> None:
    config = replace(GROUPED, vocab_size=304)
    source = write_meta(tmp_path / "meta", state(config), config=config)
    chatml(source, tokenizer_path, "added_tokens_decoder")
    (source / "template.json").write_text(TEMPLATES["chatml"].to_json())
    values, *_ = converted(source, tmp_path / "gguf")
    model = SentencePieceProcessor(model_file=str(tokenizer_path))
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in values.items() if ".ggml." in key}
    assert (ggml["model"], ggml["pre"]) == ("llama", "default")
    assert ggml["tokens"] == [*map(model.IdToPiece, range(300)), START, END, TOOL, "[PAD303]"]
    assert ggml["scores"][:300] == pytest.approx([model.GetScore(i) for i in range(300)])
    assert ggml["token_type"][:259] == [2, 3, 3] + [6] * 256
    assert set(ggml["token_type"][259:300]) == {1}
    assert ggml["token_type"][300:] == [3, 3, 4, 5]
    assert [ggml[f"{name}_token_id"] for name in ("bos", "eos")] == [1, 301]
    assert [ggml[name] for name in ("add_bos_token", "add_eos_token", "add_space_prefix")] == [True, False, True]
    convert(Request(source, tmp_path / "hf", "hf"))
    assert values["tokenizer.chat_template"] == (tmp_path / "hf" / "chat_template.jinja").read_text()
    modelfile = f'FROM ./model-f16.gguf\nPARAMETER stop "{END}"\n'
    assert (tmp_path / "gguf" / "Modelfile").read_text() == modelfile


def test_a_checkpoint_in_bf16_stays_so(tokenizer_path: Path, tmp_path: Path) -> None:
    config = ModelConfig(64, 1, 4, 2, 304, 16, max_seq_len=64)
    source = write_meta(tmp_path / "meta", state(config, dtype=torch.bfloat16), config=config)
    shutil.copy(tokenizer_path, source)
    convert(Request(source, tmp_path / "gguf", "gguf"))
    assert (tmp_path / "gguf" / "model-bf16.gguf").is_file()


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    write_huggingface(source, replace(GROUPED, vocab_size=352), eos_token_id=[328, 325])
    values = json.loads(llama3_style(source).read_text())
    (source / "chat_template.jinja").write_text("{{ bos_token }}{{ messages }}")
    (source / "template.json").write_text(TEMPLATES["dialogue"].to_json())
    found, *_ = converted(source, tmp_path / "gguf")
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in found.items() if ".ggml." in key}
    assert (ggml["model"], ggml["pre"]) == ("gpt2", "llama-bpe")
    assert ggml["merges"] == [" ".join(merge) for merge in values["model"]["merges"]]
    assert [ggml["tokens"].index(text) for text in values["model"]["vocab"]] == [*values["model"]["vocab"].values()]
    count = len(values["model"]["vocab"])
    assert ggml["token_type"] == [1] * count + [3] * 5 + [5] * (352 - count - 5)
    assert [ggml[f"{name}_token_id"] for name in ("bos", "eos", "eot")] == [count, count + 4, count + 1]
    assert "scores" not in ggml
    assert ggml["add_bos_token"] is False
    stops = (tmp_path / "gguf" / "Modelfile").read_text().split("PARAMETER stop ")[1:]
    assert stops == ['"<|eot_id|>"\n', '"<|end_of_text|>"\n', '"\n###"\n']


def test_scores_of_a_tokenizer_json_are_the_order_of_its_merges(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", state(GROUPED), config=GROUPED)
    byte_fallback(source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    values, *_ = converted(source, tmp_path / "gguf")
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    assert {token: score for token, score in zip(tokens, scores, strict=True) if score} == {"he": -1.0}
    assert tokens.index("▁a") < tokens.index("he")


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("tuning", [BiasNorm(), LoRA(4), LoRABiasNorm(4)], ids=lambda tuning: tuning.method)
def test_what_was_tuned_becomes_plain_weights(tuning: Tuning, kind: Any, tokenizer_path: Path, tmp_path: Path) -> None:
    source = write_tuned(tmp_path / "tuned", tuning, config=replace(GROUPED, vocab_size=300))
    shutil.copy(tokenizer_path, source)
    options: dict[str, Any] = {"merge": True} if isinstance(tuning, LoRA) else {}
    convert(Request(source, tmp_path / "hf", "hf", **options))
    values, tensors, made = converted(source, tmp_path / "gguf", gguf_type=kind, **options)
    expected = expected_tensors(tmp_path / "hf", values)
    assert tensors.keys() == expected.keys()
    assert ({"blk.0.attn_q.bias", "blk.1.ffn_down.bias"} <= tensors.keys()) == (tuning.merged() != FULL)
    tolerance = 0.0 if kind == "f32" else 0.02
    assert all(np.abs(tensors[name] - array).max() <= tolerance for name, array in expected.items())
    if made.merge_error is not None:
        assert made.merge_error.exact < 1e-6
        assert (made.merge_error.saved > 1e-4) == (kind == "q8_0")


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        ("llama, yarn in full", "rotary scaling yarn with a beta_fast, beta_slow or truncate of its own"),
        ("smollm3, layers of its own, window", "layers without rotation, other than every fourth"),
        ("qwen3", "rotary scaling llama3 in qwen3"),
        ("granite", "factors on embeddings, on what blocks add, on scores or on logits"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    family: str, problem: str, tokenizer_path: Path, tmp_path: Path
) -> None:
    scaling = FAMILIES["llama3.1"] if family == "qwen3" else {}
    write_family(tmp_path / "hf", {**FAMILIES[family], **scaling, "vocab_size": 300})
    shutil.copy(tokenizer_path, tmp_path / "hf")
    with pytest.raises(UserError, match=r"llama\.cpp cannot compute this model") as caught:
        convert(Request(tmp_path / "hf", tmp_path / "gguf", "gguf"))
    assert problem in caught.value.message
    assert not (tmp_path / "gguf").exists()


def test_what_is_asked_for_wrongly_leaves_nothing(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(GROUPED, vocab_size=352)
    source = write_meta(tmp_path / "meta", state(config), config=config)

    def refused(message: str, **options: Any) -> None:
        with pytest.raises((UserError, RunError), match=message):
            convert(Request(**{"source": source, "target": tmp_path / "made", "to": "gguf", **options}))
        assert [path.name for path in tmp_path.iterdir()] == ["meta"]

    refused("has no tokenizer that is read here")
    values = json.loads(byte_level(source).read_text())
    values["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(values))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": token(START), "eos_token": token(END)}))
    refused(r"llama\.cpp has no tokenizer like .*\(BPE; cut by Whitespace\)")
    llama3_style(source)
    refused("is to be a folder", target=tmp_path / "made.gguf")
    refused("--dtype does not go with --to gguf", dtype="fp16")
    refused("--gguf-type does not go with --to hf", to="hf", gguf_type="q8_0")
    tensors = state(config)
    tensors["output.weight"][3, 3] = 1e5
    torch.save(tensors, source / "consolidated.00.pth")
    refused(r"output\.weight has values above 65504, too large for fp16: choose bf16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("the package gguf, which writes GGUF, is not installed")
