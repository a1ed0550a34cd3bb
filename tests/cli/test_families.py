"""Today's families the whole way: a folder as they are published is tuned, talked to, merged and exported."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llama_acc.core.generate.chat import encode_question
from llama_acc.core.generate.engine import Engine
from llama_acc.core.generate.load import load_model
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.tokenizer import load_tokenizer
from tests.cli.commands import complete, invoke
from tests.core.model.test_families import FAMILIES, write_family
from tests.core.tokenizers import CORPUS, byte_fallback, cut_by_words
from tests.hub import Servers

QUESTION = "what is the answer to 10 + 32?"
GREEDY = Sampling(temperature=0, max_new_tokens=24)
_TURNS = (
    "{% for message in messages %}{{ HEAD }}"
    "{{ message.content + END }}{{ GAP }}{% endfor %}"
    "{% if add_generation_prompt %}{{ PROMPT }}{% endif %}"
)


def _template(head: str, end: str, gap: str, prompt: str, begin: str = "") -> str:
    words = {"HEAD": head, "END": end, "GAP": gap, "PROMPT": prompt}
    text = begin + _TURNS
    for name, value in words.items():
        text = text.replace(name, value)
    return text


CHATML = ("'<|im_start|>' + message.role + '\\n'", "'<|im_end|>'", "'\\n'", "'<|im_start|>assistant\\n'")
# As the one that LLaMA 3.2 is published with: the day in a system turn of its own; of its tools, whether there are any.
HEADERS = """\
{{- bos_token }}
{%- macro turn(role) %}{{ "<|start_header_id|>" ~ role ~ "<|end_header_id|>\\n\\n" }}{% endmacro %}
{%- set tools = tools if tools is defined else none %}
{%- if date_string is not defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- set system, rest = "", messages %}
{%- if messages[0]["role"] == "system" %}
    {%- set system, rest = messages[0]["content"] | trim, messages[1:] %}
{%- endif %}
{{- turn("system") }}
{%- if tools is not none %}{{ raise_exception("no tools here") }}{% endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " ~ date_string ~ "\\n\\n" ~ system ~ "<|eot_id|>" }}
{%- for message in rest %}
    {{- turn(message["role"]) ~ message["content"] | trim ~ "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ turn("assistant") }}{% endif %}
"""
INSTRUCT = (
    "'[INST] ' if message.role == 'user' else ''",
    "(eos_token if message.role == 'assistant' else '[/INST]')",
    "''",
    "''",
)


def _system(text: str) -> str:
    """What ChatML begins with where the messages have no system text."""
    return (
        "{% if messages and messages[0].role != 'system' %}"
        f"{{{{ '<|im_start|>system\\n{text}<|im_end|>\\n' }}}}{{% endif %}}"
    )


class Published(NamedTuple):
    """How a family's folder is published.

    Attributes:
        model: its settings, see `write_family`.
        special: its added tokens; none: SentencePiece's kind with byte pieces.
        settings: of tokenizer_config.json.
        template: the chat template.
        multiple: to which the vocabulary is padded, with rows without a token.
        digits: how many of them in a row make a piece.
        ends: tokens that generation_config.json says end an answer.
        seed: of weights whose answer is long enough to compare.
    """

    model: str
    special: Sequence[str]
    settings: dict[str, Any]
    template: str
    multiple: int = 1
    digits: int = 1
    ends: Sequence[str] = ()
    seed: int = 0


_OF_QWEN = {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>"}
_OF_QWEN |= {"pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
FOLDERS = {
    "llama3.2": Published(
        "llama3.2, tied",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        HEADERS,
        digits=3,
        ends=("<|end_of_text|>", "<|eot_id|>"),
        seed=1,
    ),
    "qwen2.5": Published(
        "qwen2",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"),
        _OF_QWEN,
        _template(*CHATML, begin=_system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")),
        multiple=64,
        ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen3": Published(
        "qwen3, tied, window on some",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        _OF_QWEN,
        _template(*CHATML),
        multiple=64,
        ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "mistral": Published(
        "mistral, window",
        (),
        {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        _template(*INSTRUCT, begin="{{ bos_token }}"),
        seed=1,
    ),
    "smollm2": Published(
        "llama3.2, tied",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"},
        _template(*CHATML, begin=_system("You are a helpful AI assistant named SmolLM, trained by Hugging Face")),
        ends=("<|im_end|>",),
    ),
    "smollm3": Published(
        "smollm3",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
        {"bos_token": None, "eos_token": "<|im_end|>"},
        _template(*CHATML),
        digits=3,
        ends=("<|im_end|>",),
    ),
}


def write_tokenizer_files(folder: Path, published: Published) -> int:
    """A small tokenizer.json of a family's kind with its settings and template. Returns the number of its tokens."""
    from tokenizers import AddedToken, Tokenizer, normalizers
    from tokenizers.processors import TemplateProcessing

    bos = published.settings["bos_token"]
    if published.special:
        fast = cut_by_words(published.special, published.digits, 300, CORPUS)
        fast.normalizer = normalizers.NFC()
    else:
        fast = Tokenizer.from_file(str(byte_fallback(folder)))
        special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
        fast.add_special_tokens([AddedToken(text, special=True) for text in special])
    if bos in ("<s>", "<|begin_of_text|>"):
        fast.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, fast.token_to_id(bos))]
        )
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": published.template} | published.settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = [fast.token_to_id(end) for end in published.ends or (published.settings["eos_token"],)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "do_sample": True}))
    return int(fast.get_vocab_size())


def write_folder(folder: Path, published: Published) -> None:
    folder.mkdir()
    rows = -(-write_tokenizer_files(folder, published) // published.multiple) * published.multiple
    generation = (folder / "generation_config.json").read_bytes()
    options = {**FAMILIES[published.model], "vocab_size": rows, "max_position_embeddings": 256}
    write_family(folder, {**options, "initializer_range": 0.3}, published.seed)
    (folder / "generation_config.json").write_bytes(generation)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] * (name in ("qwen3", "smollm2"))) for name in FOLDERS]
)
def test_a_published_folder_is_tuned_talked_to_and_answers_the_same_in_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, run, hf = tmp_path / "base", tmp_path / "run", tmp_path / "hf"
    write_folder(base, FOLDERS[name])
    turns = [("human", "what is the question?"), ("gpt", "10 + 32 é"), ("human", QUESTION), ("gpt", "a town")]
    item = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    (tmp_path / "data.jsonl").write_text((json.dumps(item) + "\n") * 6)
    done = complete(
        *("finetune", "--recipe", "quickstart", "--device", "cpu", "--pretrained", base, "--output", run),
        *("--data", tmp_path / "data.jsonl", "data.sources.0.template=auto", "data.sources.0.format=auto"),
        *("model.params=null", "model.tokenizer=null", "tuning.method=lora", "checkpoint.trainable_only=true"),
        *("train.max_steps=3", "train.warmup_epochs=0", "train.global_batch_size=2", "train.epochs=1"),
    )
    family = json.loads((base / "config.json").read_text())["model_type"]
    assert f"{family}, 4 layers, width 64" in done.stderr or family == "llama"
    assert re.search(rf"template +the chat template in {base}/tokenizer_config\.json\n", done.stderr)
    ends = FOLDERS[name].ends or (FOLDERS[name].settings["eos_token"],)
    (said,) = re.findall("answers end +at (.*)", done.stderr)
    assert set(said.split(", ")) >= {*ends, FOLDERS[name].settings["eos_token"]}
    checkpoints = ("--ckpt", base, "--ckpt", run)
    said = complete("chat", *checkpoints, "--prompt", QUESTION, "--temperature", 0, "--max-new-tokens", 24)
    complete("convert-checkpoint", run, hf, "--base", base, "--merge", "--to", "hf")

    loaded = load_model(str(base), str(run), device="cpu")
    prompt = encode_question(loaded, QUESTION)
    (ours,) = [r for r, _ in Engine(loaded).generate([prompt], Sampler(GREEDY)) if r.ended]
    assert len(set(ours.tokens)) > 3
    tokenizer, model = AutoTokenizer.from_pretrained(hf), AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert inputs["input_ids"][0].tolist() == list(prompt.tokens)
    asked = load_tokenizer(hf).decode(prompt.tokens)
    assert bool(re.search(r"Today Date: \d\d \w{3} 20\d\d", asked)) == (name == "llama3.2")
    theirs = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, len(prompt.tokens) :].tolist()
    ended = theirs[-1] in loaded.tokenizer.end_ids
    assert theirs[: len(theirs) - ended] == ours.tokens
    assert said.stdout.strip() == ours.text == load_tokenizer(hf).decode(ours.tokens).strip()
    text = "the answer is 1032, é 😀\n\n  what?"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == loaded.tokenizer.encode(text)


def test_an_entry_of_the_catalogue_without_files_is_the_whole_folder_and_answers_by_its_name(
    servers: Servers, llama_acc_home: Path, tmp_path: Path
) -> None:
    write_folder(tmp_path / "base", FOLDERS["smollm2"])
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    others = {"README.md": b"# SmolLM2", "onnx/model.onnx": b"graph", "pytorch_model.bin": b"the same once more"}
    servers.model("HuggingFaceTB/SmolLM2-135M-Instruct", {**files, **others})
    done = complete("download", "smollm2-135m-instruct")
    folder = llama_acc_home / "models" / "smollm2-135m-instruct"
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {*files, "README.md"}
    assert all((folder / name).read_bytes() == content for name, content in files.items())
    assert done.stdout == "llama-acc chat --ckpt smollm2-135m-instruct\n"
    words = ("--prompt", QUESTION, "--temperature", 0, "--max-new-tokens", 8)
    said, expected = (invoke("chat", "--ckpt", name, *words) for name in ("smollm2-135m-instruct", tmp_path / "base"))
    assert (said.exit_code, said.stdout) == (0, expected.stdout), said.stderr
    assert said.stdout.strip()
    assert invoke("download", "smollm2-135m-instruct").stderr.startswith("smollm2-135m-instruct was there already: ")
