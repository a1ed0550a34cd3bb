"""GGUF, what llama.cpp and Ollama read: one file with the shape, the tokenizer, the chat template and the weights.

The package `gguf`, llama.cpp's own, writes all that stands before the weights; these follow, each at a multiple of 32
bytes. Norms and biases are float32. Matrices are f32, f16, bf16, or q8_0: for each 32 values of a row a scale in
float16, their largest magnitude over 127, and 32 whole numbers (ggml-quants.c, `quantize_row_q8_0_ref`).
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from llama_acc.core.checkpoint.huggingface import huggingface_name, rotated_heads
from llama_acc.core.checkpoint.lazy import LazyTensor, reorder_heads, rounded
from llama_acc.core.checkpoint.save import Specs, stored_sizes, tensor_offsets
from llama_acc.core.data.chat_template import ChatTemplate, own_template
from llama_acc.core.errors import UserError, listed
from llama_acc.core.input_files import read_object, read_text
from llama_acc.core.model.config import ModelConfig, RopeScaling
from llama_acc.core.model.rotary import frequencies
from llama_acc.core.model.tuning import FULL
from llama_acc.core.tokenizer import Tokenizer
from llama_acc.core.tokenizer_folder import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    HUGGING_FACE_FILE,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter

GGUFType = Literal["f16", "bf16", "q8_0", "f32"]
_Q8_0 = torch.uint8  # as what q8_0 is handled: its bytes
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8_0": _Q8_0}
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.h, `llama_ftype`
_BLOCK, _BLOCK_BYTES = 32, 34
_METAS_ORDER = ("llama", "smollm3")  # of the rows of wq and wk; other architectures have Hugging Face's
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # llama.h, `llama_token_type`
_GPT2, _DIGITS = "GPT-2's pattern", "single digits"
_WORDS, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|", r"]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n" + _REST
_QWEN2 = _WORDS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + r"+|[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*|"
_TEKKEN = _CASED + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/" + _REST
# llama.cpp has a name for how a byte-level tokenizer cuts a text and whether a piece that is a token needs no merges.
_PRE_TOKENIZERS = {
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_GPT2,), False): "gpt-2",
}


# The shape


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture that computes the same; a UserError with every reason if it has none."""
    scaling, has_new_biases = config.rope_scaling, config.tuning != FULL
    yarn = scaling if isinstance(scaling, RopeScaling) and scaling.rope_type == "yarn" else None
    name, factors = "qwen3" if config.qk_norm else "smollm3" if config.nope_layers else "llama", _rope_factors(config)
    if name == "llama" and config.qkv_bias and not has_new_biases and factors is None:
        name = "qwen2" if config.head_size * config.n_heads == config.dim else "llama"
    without_rotation = tuple(range(3, config.n_layers, 4)) if name == "smollm3" else ()
    factors_of_granite = (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling)
    problems = {
        f"biases of method {config.tuning.method} in {name}": has_new_biases and name != "llama",
        f"rotary scaling llama3 in {name}": factors is not None and name != "llama",
        "factors on embeddings, on what blocks add, on scores or on logits": config.attention_multiplier is not None
        or factors_of_granite != (1.0, 1.0, 1.0),
        "layers without rotation, other than every fourth": config.nope_layers != without_rotation,
        "rotary scaling yarn with a beta_fast, beta_slow or truncate of its own": yarn is not None
        and (yarn.beta_fast or 32.0, yarn.beta_slow or 1.0, yarn.truncate) != (32.0, 1.0, True),
    }
    if found := [problem for problem, is_so in problems.items() if is_so]:
        raise UserError(f"llama.cpp cannot compute this model:\n{listed(found)}", "use --to hf")
    return name


def _rope_factors(config: ModelConfig) -> LazyTensor | None:
    """What llama3's scaling divides the frequencies by, [D / 2]; None: the model has another scaling, or none."""
    scaling = config.rope_scaling
    if not isinstance(scaling, RopeScaling) or scaling.rope_type != "llama3":
        return None
    powers = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    return LazyTensor.of(1.0 / config.rope_theta**powers / frequencies(config, 1, torch.device("cpu"))[0])


def _add_shape(writer: "GGUFWriter", config: ModelConfig) -> list[str]:
    """The keys that llama-model.cpp reads; returns what the user should know."""
    from gguf import RopeScalingType

    scaling, notes = config.rope_scaling, []
    context = min(config.max_seq_len, config.sliding_window or config.max_seq_len)
    if context < config.max_seq_len:
        notes.append(f"llama.cpp has no sliding window here: the file says a context of {context}, that window")
    if isinstance(scaling, RopeScaling) and scaling.rope_type == "dynamic":
        notes.append(f"llama.cpp has no rotary scaling dynamic: it computes the same up to the context of {context}")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size)
    if scaling is not None and not isinstance(scaling, RopeScaling):
        scaling = RopeScaling("linear", 1.0 / scaling)
    if scaling is not None and scaling.rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(scaling.rope_type))
        writer.add_rope_scaling_factor(scaling.factor)
    if scaling is not None and scaling.rope_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings or config.max_seq_len)
        # What it is multiplied by besides. (The key yarn_attn_factor is read for other architectures only.)
        usual = 1.0 + 0.1 * math.log(max(scaling.factor, 1.0))
        writer.add_rope_scaling_attn_factors(frequencies(config, 1, torch.device("cpu"))[1] / usual)
    return notes


# The tensors


def gguf_tensors(
    config: ModelConfig, parameters: Mapping[str, LazyTensor], kind: GGUFType
) -> tuple[dict[str, LazyTensor], dict[str, torch.dtype]]:
    """The tensors of a file and the types they are rounded to (uint8: bytes of q8_0), of parameters by Meta's names.

    Raises:
        UserError: llama.cpp cannot compute such a model.
    """
    import gguf

    architecture = _architecture(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.n_layers)  # which has all that a family here has
    tensors, dtypes = {}, {}
    for parameter, tensor in parameters.items():
        name = str(names.get_name(huggingface_name(parameter), (".weight", ".bias")))
        heads = None if architecture in _METAS_ORDER else rotated_heads(parameter, config)
        tensors[name] = tensor if heads is None else reorder_heads(tensor, heads, to_meta=False)
        dtypes[name] = _dtype_of(tensor, kind)
        if dtypes[name] == _Q8_0:
            tensors[name] = _in_q8_0(tensors[name])
    if (factors := _rope_factors(config)) is not None:
        tensors["rope_freqs.weight"], dtypes["rope_freqs.weight"] = factors, torch.float32
    return tensors, dtypes


def gguf_values(tensor: LazyTensor, kind: GGUFType) -> LazyTensor:
    """The values that a parameter has in a file."""
    from gguf import GGMLQuantizationType, quants

    if (dtype := _dtype_of(tensor, kind)) != _Q8_0:
        return rounded(tensor, dtype)
    stored = _in_q8_0(tensor)

    def read(rows: slice, columns: slice) -> Tensor:
        values = quants.dequantize(stored.block(rows).numpy(), GGMLQuantizationType.Q8_0)
        return torch.from_numpy(values)[:, columns]

    return LazyTensor.computed((tensor,), read, tensor.shape)


def _dtype_of(tensor: LazyTensor, kind: GGUFType) -> torch.dtype:
    """A parameter's type in a file. Rows that are not of whole blocks of q8_0 are float16."""
    if len(tensor.shape) < 2:
        return torch.float32
    return torch.float16 if kind == "q8_0" and tensor.shape[1] % _BLOCK else _DTYPES[kind]


def _in_q8_0(tensor: LazyTensor) -> LazyTensor:
    """The bytes of a matrix in q8_0."""
    from gguf import GGMLQuantizationType, quants

    def read(rows: slice, columns: slice) -> Tensor:
        values = tensor.block(rows).to(torch.float32).numpy()
        return torch.from_numpy(quants.quantize(values, GGMLQuantizationType.Q8_0))[:, columns]

    shape = (tensor.shape[0], tensor.shape[1] // _BLOCK * _BLOCK_BYTES)
    return LazyTensor.computed((tensor,), read, shape, _Q8_0)


# The tokenizer


def _add_tokenizer(writer: "GGUFWriter", rows: int, tokenizer: Tokenizer, exported: Path) -> list[str]:
    """The keys that llama-vocab.cpp reads; returns what the user should know. A UserError if there is no such kind."""
    values = msgspec.json.decode((exported / HUGGING_FACE_FILE).read_bytes())
    config = read_object(exported / CONFIG_FILE)
    kind, pre = _kind_of(values, tokenizer.path)
    model, (normalizer, cuts) = values["model"], (json.dumps(values[key]) for key in ("normalizer", "pre_tokenizer"))
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    texts, kinds = _tokens(values, rows)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    notes = []
    if kind == "llama":
        writer.add_token_scores(_scores(model, rows, exported / tokenizer.path.name))
        # Behind special tokens, too, or nowhere.
        puts_space = '"Prepend"' in normalizer or '"prepend_scheme": "always"' in cuts
        writer.add_add_space_prefix(puts_space)
        if not puts_space and '"prepend_scheme": "first"' in cuts:
            notes.append(
                "llama.cpp will not put the usual space in front of a text without special tokens (chat has them)"
            )
    else:
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    bos, ends = tokenizer.piece(tokenizer.bos_id), _ends(tokenizer, exported)
    writer.add_add_bos_token(config.get("add_bos_token", json.dumps(bos) in json.dumps(values["post_processor"])))
    writer.add_add_eos_token(config.get("add_eos_token", False))
    writer.add_bos_token_id(tokenizer.bos_id)
    for add, end in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False
    ):
        add(end)
    if more := [tokenizer.piece(end) for end in ends[3:]]:
        notes.append(
            f"llama.cpp has no place for more than three tokens that end an answer: {', '.join(more)} will not"
        )
    if left_out := sorted({*re.findall(r'"type": "(\w+)"', normalizer)} - {"Sequence", "Prepend", "Replace"}):
        notes.append(
            f"llama.cpp leaves out the tokenizer's {', '.join(left_out)}: a text that it changes gets other tokens"
        )
    return notes


def _kind_of(values: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """llama.cpp's names of a tokenizer.json's kind and of how it cuts a text; a UserError if it would not cut so."""
    model, outer, cuts = values.get("model", {}), values.get("pre_tokenizer") or {}, list[str]()
    steps = outer.get("pretokenizers", [outer] if outer else [])
    for step in steps:
        pattern, way = step.get("pattern", {}).get("Regex"), (step.get("behavior"), step.get("invert"))
        if step["type"] == "Split" and pattern and way in (("Isolated", False), ("Removed", True)):
            cuts.append(pattern)
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            cuts += [_GPT2] * step["use_regex"]
        else:
            cuts.append(_DIGITS if step.get("individual_digits") else step["type"])
    if model.get("type") == "BPE" and model.get("byte_fallback") and {*cuts} <= {"Metaspace"}:
        return "llama", "default"
    pre = _PRE_TOKENIZERS.get((tuple(cuts), bool(model.get("ignore_merges"))))
    if model.get("type") != "BPE" or pre is None:
        message = f"llama.cpp has no tokenizer like {path} ({model.get('type')}; cut by {', '.join(cuts) or 'nothing'})"
        raise UserError(message, "use --to hf")
    return "gpt2", pre


def _tokens(values: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The text and the kind of each row, also of those without a token."""
    model = values["model"]
    texts, kinds = [f"[PAD{row}]" for row in range(rows)], [_UNUSED] * rows
    for text, token in model["vocab"].items():
        is_byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text)
        texts[token], kinds[token] = text, _BYTE if is_byte else _NORMAL
    for entry in values["added_tokens"]:
        is_unknown, kind = entry["content"] == model.get("unk_token"), _CONTROL if entry["special"] else _USER_DEFINED
        texts[entry["id"]], kinds[entry["id"]] = entry["content"], _UNKNOWN if is_unknown else kind
    return texts, kinds


def _scores(model: Mapping[str, Any], rows: int, path: Path) -> list[float]:
    """SentencePiece's; of a tokenizer.json, by the first merge that makes a piece: llama.cpp merges by these."""
    scores = [0.0] * rows
    if path.suffix == ".json":
        for number, (left, right) in reversed(list(enumerate(model["merges"]))):
            scores[model["vocab"][left + right]] = float(-number)
    else:
        pieces = SentencePieceProcessor(model_file=str(path))
        scores[: len(pieces)] = map(pieces.GetScore, range(len(pieces)))
    return scores


def _ends(tokenizer: Tokenizer, exported: Path) -> list[int]:
    """The tokens that end an answer, EOS first."""
    ends = read_object(exported / GENERATION_FILE)["eos_token_id"]
    return list(dict.fromkeys([tokenizer.eos_id, *(ends if isinstance(ends, list) else [ends])]))


# The file


def lay_out_gguf(
    path: Path, specs: Specs, config: ModelConfig, kind: GGUFType, name: str, tokenizer: Tokenizer, exported: Path
) -> list[str]:
    """Writes a file with holes in the place of its tensors, and Ollama's Modelfile; returns what the user should know.

    `kind` is the type of the matrices, `name` that of the model, and `exported` a folder that `write_tokenizer` made.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, _architecture(config))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(2)
    notes = _add_shape(writer, config) + _add_tokenizer(writer, config.vocab_size, tokenizer, exported)
    template, jinja = own_template(exported, tokenizer), exported / CHAT_TEMPLATE_FILE
    if jinja.is_file() or isinstance(template, ChatTemplate):
        writer.add_chat_template(template.source if isinstance(template, ChatTemplate) else read_text(jinja))
    kinds = {dtype: GGMLQuantizationType[kind.upper()] for kind, dtype in _DTYPES.items()}
    for tensor, spec in specs.items():
        stored = np.dtype(np.uint8 if spec.dtype == _Q8_0 else np.float16)
        writer.add_tensor_info(tensor, spec.shape, stored, spec.nbytes, kinds[spec.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = GGUFWriter.ggml_pad(path.stat().st_size, GGUF_DEFAULT_ALIGNMENT)
    os.truncate(path, size + sum(stored_sizes(path, specs)))
    stops = [tokenizer.piece(end) for end in _ends(tokenizer, exported)]
    stops += template.text_stops(tokenizer) if template else []
    modelfile = [f"FROM ./{path.name}", *(f'PARAMETER stop "{stop}"' for stop in stops), ""]
    (path.parent / "Modelfile").write_text("\n".join(modelfile), encoding="utf-8")
    return notes


def open_gguf(path: Path, specs: Specs) -> dict[str, LazyTensor]:
    """The tensors of a file of `lay_out_gguf`, memory-mapped."""
    data, offsets = torch.from_numpy(np.memmap(path, np.uint8, mode="c")), tensor_offsets(path, specs)
    return {
        name: LazyTensor.of(data[offsets[name] : offsets[name] + spec.nbytes].view(spec.dtype).view(spec.shape), True)
        for name, spec in specs.items()
    }
