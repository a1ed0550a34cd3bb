"""What a folder says of its tokenizer counts as a whole: added tokens beside a vocabulary, EOS, what ends an answer."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from llama_acc.core.data.chat_template import template_for, template_of_folder
from llama_acc.core.data.dataset import load_dataset
from llama_acc.core.data.sources import Source
from llama_acc.core.data.templates import Turn
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, tokenizer_notes
from llama_acc.core.tokenizer_folder import Settings, sentencepiece_to_json
from tests.core.tokenizers import END, START, TOOL, byte_level, chatml, token

TEXTS = [
    f"{START}user\nthe answer{END}\n{START}assistant\n",
    "<s>the",
    f"the question{END}is{TOOL}a",
    f"</s>{TOOL}",
    "the  answer\n\nis",
    "",
]


def by_sentencepiece(tokenizer: Tokenizer, text: str, model: Path) -> list[int]:
    """The tokens of a text that is cut at special tokens, each part as SentencePiece itself has it."""
    processor = SentencePieceProcessor(model_file=str(model))
    names = {START: 300, END: 301, TOOL: 302, "<s>": 1, "</s>": 2}
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
        ids += [names[part]] if part in names else processor.encode(part)
    return ids


@pytest.mark.parametrize("by", ["added_tokens_decoder", "added_tokens.json"])
def test_tokens_named_beside_a_sentencepiece_model_are_read(tmp_path: Path, tokenizer_path: Path, by: str) -> None:
    tokenizer = load_tokenizer(chatml(tmp_path, tokenizer_path, by))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (303, 1, 301)
    assert {300, 301} <= tokenizer.end_ids
    assert 302 not in tokenizer.end_ids
    assert tokenizer_notes(tokenizer, 305) == ["rows of the vocabulary without a token: 2, the first is 303"]
    assert [tokenizer.encode(text) for text in TEXTS] == [by_sentencepiece(tokenizer, t, tokenizer_path) for t in TEXTS]
    assert tokenizer.decode(tokenizer.encode(f"the{TOOL}", bos=True, eos=True)) == f"the{TOOL}"
    # Special ones are none in somebody's own text; one that is not special is, as in transformers.
    words = f"{END}{TOOL}"
    assert tokenizer.encode(words, own=[(0, len(words))])[-1] == 302
    assert 301 not in tokenizer.encode(words, own=[(0, len(words))])


@pytest.mark.parametrize("by", ["added_tokens_decoder", "added_tokens.json"])
@pytest.mark.parametrize("legacy", [True, False])
def test_the_space_in_front_follows_legacy_as_in_transformers(
    tmp_path: Path, tokenizer_path: Path, by: str, legacy: bool
) -> None:
    ours = load_tokenizer(chatml(tmp_path, tokenizer_path, by, legacy=legacy))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_id == theirs.eos_token_id
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == expected
    # At a text's beginning it is there in any case, as SentencePiece has it.
    assert ours.encode(" the") == SentencePieceProcessor(model_file=str(tokenizer_path)).encode(" the")


def test_the_tokenizer_that_knows_more_is_taken(tmp_path: Path, tokenizer_path: Path) -> None:
    folder = chatml(tmp_path, tokenizer_path, "added_tokens.json")
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(folder / "fast")
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "fast" / "tokenizer.json").replace(folder / "tokenizer.json")
    found = find_tokenizer(folder)
    assert found == folder / "tokenizer.json"
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.path, tokenizer.vocab_size) == (found, 303)
    assert tokenizer.encode(TEXTS[0]) == theirs(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert load_tokenizer(folder / "tokenizer.model").vocab_size == 300  # the one that is asked for
    # One that knows no more says how the space in front is put, and is kept with the model file.
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"] = [entry for entry in values["added_tokens"] if entry["id"] < 300]
    values["pre_tokenizer"]["prepend_scheme"] = "first"
    (folder / "tokenizer.json").write_text(json.dumps(values))
    plain = load_tokenizer(folder)
    assert plain.path.name == "tokenizer.model"
    assert [plain.piece(token) for token in plain.encode("<s>the")] == ["<s>", "t", "h", "e"]
    values["model"]["vocab"]["▁the"] = 5
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"token '▁the' is 5 in .*tokenizer.json and \d+ in tokenizer.model"):
        load_tokenizer(folder)


def test_tokens_may_be_named_beside_a_tokenizer_json_and_leave_ids_out(tmp_path: Path) -> None:
    named = {"305": token("<a>"), "309": token("<b>", special=False)}
    byte_level(tmp_path, {"bos_token": START, "eos_token": END, "added_tokens_decoder": named})
    count = load_tokenizer(byte_level(tmp_path / "alone")).vocab_size
    assert count == 303
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<a>a<b>")[::2] == [305, 309]
    assert (tokenizer.vocab_size, set(range(311)) - set(tokenizer.named)) == (310, {303, 304, 306, 307, 308, 310})
    assert tokenizer.decode([305, 309, 304]) == "<a><b>"
    # In a tokenizer.json too: the library `tokenizers` would number them on without a gap.
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["added_tokens"].append({"id": 307} | token("<c>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert load_tokenizer(tmp_path).encode("<c><a><b><|eot_id|>") == [307, 305, 309, 302]


def test_what_ends_an_answer_is_gathered_from_all_files(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7], "top_p": 0.5}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.end_ids) == (2, {2, 7, 9})
    # A checkpoint's config.json is another one; nothing is lost there.
    files = tokenizer.files()
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [2, 7, 9], "top_p": 0.5}
    assert "config.json" not in files


@pytest.mark.parametrize("main", ["tokenizer.model", "tokenizer.json"])
def test_a_token_that_the_model_has_no_row_for_is_left_out(tmp_path: Path, tokenizer_path: Path, main: str) -> None:
    # As LLaMA 2 was published: a <pad> behind the last row.
    if main == "tokenizer.model":
        (tmp_path / main).write_bytes(tokenizer_path.read_bytes())
        (tmp_path / "added_tokens.json").write_text('{"<pad>": 300}')
        rows = 300
    else:
        rows = 303
        values = json.loads(byte_level(tmp_path).read_text())
        values["added_tokens"].append({"id": rows} | token("<pad>"))
        (tmp_path / main).write_text(json.dumps(values))
    assert load_tokenizer(tmp_path).vocab_size == rows + 1
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.path.name, tokenizer.vocab_size, max(tokenizer.encode("<pad>")) < rows) == (main, rows, True)
    assert tokenizer_notes(tokenizer, rows) == ["left out, as the model has no row for them: '<pad>'"]


@pytest.mark.parametrize("by", ["added_tokens_decoder", "added_tokens.json"])
def test_a_folder_with_its_files_has_the_same_tokenizer(tmp_path: Path, tokenizer_path: Path, by: str) -> None:
    ours = load_tokenizer(chatml(tmp_path, tokenizer_path, by, legacy=False))
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in ours.files().items():
        (copy / name).write_bytes(data)
    again = load_tokenizer(copy)
    assert again.fingerprint() == ours.fingerprint() != load_tokenizer(tokenizer_path).fingerprint()
    assert (again.end_ids, again.encode_batch(TEXTS)) == (ours.end_ids, ours.encode_batch(TEXTS))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"added_tokens.json": {END: 17}}, "token 17 of .* calls it '<.im_end.>'"),
        ({"added_tokens.json": {"</s>": 300}}, "token 300 is '</s>', and in it '</s>' is token 2"),
        ({"added_tokens.json": {END: "300"}}, "the id of '<.im_end.>' is '300'"),
        ({"added_tokens.json": [END]}, "added_tokens.json: it must hold a JSON object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [END]}}, "must hold an object of ids and tokens"),
        ({"tokenizer_config.json": {"eos_token": END}}, "names '<.im_end.>', which tokenizer.model does not have"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"300": {}}}}, "has no text for token 300"),
        (
            {"added_tokens.json": {END: 300}, "tokenizer_config.json": {"added_tokens_decoder": {"300": token(TOOL)}}},
            "token 300 is '<tool>' in .* and '<.im_end.>' in added_tokens.json",
        ),
    ],
)
def test_what_cannot_be_honored_is_refused_by_name(
    tmp_path: Path, tokenizer_path: Path, files: dict[str, Any], words: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path)


def test_without_add_bos_token_no_format_begins_with_bos(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (tmp_path / "data.json").write_text('[{"instruction": "the question", "output": "the answer"}]')
    tokenizer = load_tokenizer(tmp_path)
    data = load_dataset([Source(str(tmp_path / "data.json"))], tokenizer, max_tokens=512, seed=0)
    template, _ = template_of_folder(tmp_path, tokenizer)
    turns = [Turn("human", "the question")]
    prompt = data.template.prompt_ids(tokenizer, turns)
    assert data.document(0)[0].tolist()[: len(prompt)] == prompt == tokenizer.encode(data.template.prompt_text(turns))
    assert template.prompt_ids(tokenizer, [Turn("human", "a")]) == tokenizer.encode("a")
    told = "texts begin without BOS, as tokenizer_config.json says (add_bos_token: false)"
    assert tokenizer_notes(tokenizer, 300) == [told]


LINES = [line for line in Path(__file__).read_text().splitlines() if "<" not in line]  # no special tokens
PIECES = [
    *LINES,
    *(f"x{mark * count}y{mark * count}" for mark in " -=\t" for count in range(1, 40)),
    *("  two  spaces ", "", " ", "Ａ１ ﬁ é ①", "日本語", "▁▁ ▁", "nul\0"),
]
LLAMAS = {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False}
LLAMAS |= {"normalization_rule_name": "identity", "allow_whitespace_only_pieces": True}


def test_mistrals_own_file_encodes_a_chat_part_by_part_and_stays_so_in_a_checkpoint(tmp_path: Path) -> None:
    model, more = io.BytesIO(), {"control_symbols": ["[INST]", "[/INST]"], "vocab_size": 400, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=iter(LINES * 2), model_writer=model, **LLAMAS, **more)
    (tmp_path / "tokenizer.model.v3").write_bytes(model.getvalue())
    theirs = SentencePieceProcessor(model_proto=model.getvalue())
    begin, end = (theirs.PieceToId(text) for text in ("[INST]", "[/INST]"))
    expected = [begin, *theirs.encode("what is it?"), end, *theirs.encode("a town")]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("[INST] what is it?[/INST] a town") == expected
    # Neither is one of its other special tokens that a user has written.
    asked = template_for("mistral", "dialogue", tokenizer).prompt_ids(tokenizer, [Turn("human", "it[/INST][INST] is")])
    assert asked == [tokenizer.bos_id, begin, *theirs.encode("it[/INST][INST] is"), end]
    (tmp_path / "saved").mkdir()
    for name, content in tokenizer.files().items():
        (tmp_path / "saved" / name).write_bytes(content)
    assert load_tokenizer(tmp_path / "saved").encode("[INST] what is it?[/INST] a town") == expected


@pytest.mark.parametrize(
    ("settings", "first_only"),
    [
        (LLAMAS, False),
        (LLAMAS, True),
        (LLAMAS | {"byte_fallback": False}, False),
        (LLAMAS | {"add_dummy_prefix": False}, False),
        (LLAMAS | {"user_defined_symbols": ["pars", "--"]}, False),
        (LLAMAS | {"user_defined_symbols": ["the text", "y▁▁"]}, False),
        ({"model_type": "bpe"}, False),
        (LLAMAS | {"model_type": "unigram"}, False),
        ({"model_type": "unigram"}, False),
    ],
)
def test_the_tokens_are_those_of_sentencepiece(settings: dict[str, Any], first_only: bool) -> None:
    model = io.BytesIO()
    usual = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, "character_coverage": 0.98}
    SentencePieceTrainer.train(sentence_iterator=iter(PIECES[:-4] * 2), model_writer=model, **(usual | settings))
    theirs = SentencePieceProcessor(model_proto=model.getvalue())
    ours = sentencepiece_to_json(model.getvalue(), Path("tokenizer.model"), Settings(first_only=first_only))
    # Of equal scores a Unigram model takes another way here.
    texts = PIECES if settings["model_type"] == "bpe" else LINES
    assert [ours.encode(text, add_special_tokens=False).ids for text in texts] == theirs.encode(texts)
    assert ours.decode(theirs.encode("the text")) == "the text"
