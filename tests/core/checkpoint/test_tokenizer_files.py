"""The tokenizer and chat template of a folder made for transformers are those of the training."""

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from llama_acc.core.checkpoint.tokenizer_files import write_tokenizer
from llama_acc.core.data.encode import documents
from llama_acc.core.data.items import Dialogue, SingleTurn
from llama_acc.core.data.templates import TEMPLATES, Template, Turn
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer
from tests.core.tokenizers import END, START, byte_fallback, byte_level, chatml

CODE = "def f(x):\n    if x:\n        return '\\t'  # é 😀\n\n\n\treturn  {   }\n"
TEXTS = ["the answer", " the", "", CODE, *(f"a{' ' * n}b{' ' * n}" for n in range(1, 20))]


@pytest.fixture(params=["sentencepiece", "added", "added, not legacy", "byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_path: Path, tmp_path: Path) -> Tokenizer:
    source = tmp_path / "source"
    source.mkdir()
    if request.param == "byte_level":
        config = {"bos_token": START, "eos_token": END, "chat_template": "the base's"}
        return load_tokenizer(byte_level(source, config, template=True))
    if request.param == "byte_fallback":
        byte_fallback(source)
        (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    elif request.param == "sentencepiece":
        (source / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    else:
        chatml(source, tokenizer_path, "added_tokens.json", **{"legacy": False} if "not" in request.param else {})
    return load_tokenizer(source)


def exported(tokenizer: Tokenizer, folder: Path, template: Template | None = None) -> tuple[Any, list[str]]:
    """What transformers makes of the folder, and the notes."""
    folder.mkdir()
    for name, data in tokenizer.files().items():
        (folder / name).write_bytes(data)
    if template is not None:
        (folder / "template.json").write_text(template.to_json())
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    notes = write_tokenizer(tokenizer, folder, ids)
    return AutoTokenizer.from_pretrained(folder), notes


def test_transformers_gives_the_ids_of_the_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs, notes = exported(tokenizer, tmp_path / "hf")
    bos = [] if tokenizer.path.name == "tokenizer.json" and tokenizer.vocab_size > 290 else [tokenizer.bos_id]
    assert [theirs(text)["input_ids"] for text in TEXTS] == [bos + tokenizer.encode(text) for text in TEXTS]
    if tokenizer.path.suffix == ".model":
        processor = SentencePieceProcessor(model_file=str(tokenizer.path))
        assert [theirs(text)["input_ids"] for text in TEXTS] == [[1, *processor.encode(text)] for text in TEXTS]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert theirs("a").keys() == {"input_ids", "attention_mask"}
    assert theirs.decode(tokenizer.encode(CODE)) == tokenizer.decode(tokenizer.encode(CODE))
    assert notes == []
    whole, short = tokenizer.to_json(), tokenizer.to_json(merges=False)
    assert whole | {"model": 0} == short | {"model": 0}
    assert whole["model"] == short["model"] | {"merges": whole["model"]["merges"]}
    # The same tokenizer is found there by llama-acc.
    assert load_tokenizer(tmp_path / "hf").encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


HISTORY = [Turn("human", "what is\n  the answer? "), Turn("assistant", ' it is "10" {{ x }} '), Turn("human", "why")]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "caption"])
def test_the_chat_template_renders_the_format_of_the_training(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    template = TEMPLATES[name]
    theirs, notes = exported(tokenizer, tmp_path / "hf", template)
    assert notes == []
    roles = {"human": "user", "assistant": "assistant"}

    def ids(turns: list[Turn], system: str | None, prompt: bool) -> list[int]:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": roles[turn.role], "content": turn.text} for turn in turns]
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)
        return list(rendered["input_ids"])

    for system in (None, "be 'brief'\n"):
        for turns in (HISTORY, HISTORY[:1]):
            assert ids(turns, system, True) == template.prompt_ids(tokenizer, turns, system)
        item: Any = Dialogue(HISTORY[:2], system=system)
        if template.kind == "single_turn":
            item = SingleTurn(HISTORY[0].text, None, HISTORY[1].text, system=system)
        ((document,),) = documents([item], template, tokenizer)
        assert ids(HISTORY[:2], system, False) == document[0].tolist()


def test_the_bases_own_chat_template_goes_only_with_a_model_trained_on_it(tmp_path: Path) -> None:
    config = {"bos_token": START, "eos_token": END, "chat_template": "the base's"}
    tokenizer = load_tokenizer(byte_level(tmp_path / "source", config, template=True))
    theirs, notes = exported(tokenizer, tmp_path / "base")
    assert (theirs.get_chat_template(), notes) == ("{{ messages[0].content }}", [])
    theirs, notes = exported(tokenizer, tmp_path / "trained", TEMPLATES["caption"])
    assert theirs.chat_template is None
    assert notes == ["no chat template is written: transformers cannot write the format 'caption' as it was trained"]


def test_what_ends_an_answer_ends_it_in_transformers(tmp_path: Path, tokenizer_path: Path) -> None:
    chatml(tmp_path, tokenizer_path, "added_tokens.json")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": [START, END]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 2
    exported(tokenizer, tmp_path / "hf", TEMPLATES["chatml"])
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 301]}
