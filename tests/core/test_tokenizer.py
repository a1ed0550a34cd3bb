from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerFast

from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
)
from tests.core.tokenizers import byte_fallback, byte_level

TEXTS = [
    "",
    " ",
    "hello",
    "  two  spaces ",
    "a\n\n\tb",
    "naïve café",
    "😀",
    "x😀y👩‍👩‍👧z",
    "▁ U+2581 ▁▁",
    "日本語",
    "nul \0 byte",
    "a\u2028b",
]


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level", "byte_fallback"])
def tokenizer(
    request: pytest.FixtureRequest, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(tokenizer_path)
    make = byte_level if request.param == "byte_level" else byte_fallback
    return load_tokenizer(make(tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize("text", TEXTS)
def test_decode_is_the_inverse_of_encode(tokenizer: Tokenizer, text: str) -> None:
    # U+2581 is SentencePiece's own mark for a space.
    expected = text if "▁" not in text or tokenizer.encode("▁") != tokenizer.encode(" ") else text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == expected


@settings(max_examples=300, deadline=None)
@given(st.text("ab e\n\u2581é😀#:", max_size=12), st.text("ab e\n\u2581é😀#:", max_size=12))
def test_the_length_of_a_prefix_is_told_as_by_encoding_it(tokenizer: Tokenizer, prefix: str, rest: str) -> None:
    text = prefix + rest
    length = tokenizer.prefix_length(tokenizer.encode(text), text, len(prefix))
    assert length in (None, len(tokenizer.encode(prefix)))
    if length is not None:
        assert tokenizer.encode(text)[:length] == tokenizer.encode(prefix)


def test_a_prefix_that_ends_with_a_token_is_not_encoded_again(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    text = "### Response:\nhello"
    assert tokenizer.prefix_length(tokenizer.encode(text), text, 14) == len(tokenizer.encode("### Response:\n"))


def test_batches_are_encoded_like_single_texts(tokenizer: Tokenizer) -> None:
    one_by_one = [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS) == one_by_one
    assert [spans.ids for spans in tokenizer.encode_batch_with_spans(TEXTS)] == one_by_one
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch_with_spans([]) == []


@pytest.mark.parametrize("text", TEXTS)
def test_spans_cover_every_character_in_order(tokenizer: Tokenizer, text: str) -> None:
    [spans] = tokenizer.encode_batch_with_spans([text])
    assert len(spans.ids) == len(spans.begins) == len(spans.ends)
    assert np.all(np.diff(spans.begins) >= 0)
    assert np.all(np.diff(spans.ends) >= 0)
    covered = {i for begin, end in zip(spans.begins, spans.ends, strict=True) for i in range(begin, end)}
    assert covered == set(range(len(text)))
    # Every piece of a multi-byte character spans it.
    for begin, end in zip(spans.begins, spans.ends, strict=True):
        assert end > begin or begin == 0


@settings(max_examples=200, deadline=None)
@given(st.text("ab e\n\t\u2581é日😀#:\0", max_size=16))
def test_spans_are_those_that_sentencepiece_says(tokenizer_path: Path, text: str) -> None:
    processor = SentencePieceProcessor(model_file=str(tokenizer_path))
    [spans] = load_tokenizer(tokenizer_path).encode_batch_with_spans([text])
    said = processor.encode(text, return_type="offset_mapping")
    assert spans.ids == said["ids"]
    stand = zip(spans.begins.tolist(), spans.ends.tolist(), strict=True)
    for token, span, (begin, end) in zip(spans.ids, stand, said["offsets"], strict=True):
        # It gives a character to the last of its byte pieces.
        assert span == (begin, end) or (processor.IsByte(token) and begin == end and span == (begin, begin + 1))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = st.integers(0, tokenizer.vocab_size + 2)
    some = st.sampled_from([tokenizer.bos_id, tokenizer.eos_id, *tokenizer.encode(" 😀 é\n")])
    ids = data.draw(st.lists(tokens | some, max_size=30))
    stream = StreamDecoder(tokenizer)
    assert "".join([stream.push(token) for token in ids]) + stream.flush() == tokenizer.decode(ids)


def test_a_stream_gives_characters_only_whole(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    given = [stream.push(token) for token in tokenizer.encode("a😀b")]
    assert "\ufffd" not in "".join(given)
    assert "".join(given) == "a😀b"


def test_tokens_outside_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size + 7, -1]) == "a"
    assert tokenizer.piece(tokenizer.vocab_size + 7) == f"<{tokenizer.vocab_size + 7}>"


def test_bos_and_eos_come_from_the_config(tmp_path: Path) -> None:
    config = {"bos_token": None, "eos_token": {"content": "<|eot_id|>"}}
    tokenizer = load_tokenizer(byte_level(tmp_path, config))
    assert tokenizer.piece(tokenizer.eos_id) == "<|eot_id|>"
    assert tokenizer.bos_id == tokenizer.eos_id


def test_special_tokens_in_a_text_are_read_and_shown_but_bos_and_eos_are_not(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path))
    ids = tokenizer.encode("<|im_start|>a<|eot_id|>b<|im_end|>")
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode(ids) == "a<|eot_id|>b"


def reference(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Encodes as text what is written like a special token: by SentencePiece itself, or by transformers."""
    if tokenizer.path.suffix == ".model":
        return SentencePieceProcessor(model_file=str(tokenizer.path)).encode
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path), bos_token=tokenizer.piece(tokenizer.bos_id))
    # What their own files ask for besides: to cut, to fill up.
    settings = {"add_special_tokens": False, "padding": False, "truncation": False, "split_special_tokens": True}
    return lambda text: fast(text, **settings)["input_ids"]


@pytest.mark.parametrize("words", ["the {0}answer{1}", "{1} {1}is", "e{0}😀", "a", " {0} "])
def test_special_tokens_are_read_outside_of_own_text_alone(tokenizer: Tokenizer, words: str) -> None:
    bos, eos = tokenizer.piece(tokenizer.bos_id), tokenizer.piece(tokenizer.eos_id)
    own, encode = words.format(bos, eos), reference(tokenizer)
    text = f"{bos}the {own} is{eos}a{own}"
    behind = text.rindex(eos + "a") + len(eos)
    spans = [(len(bos + "the "), len(bos + "the " + own)), (behind + 1, len(text))]
    expected = [tokenizer.bos_id, *encode(f"the {own} is"), tokenizer.eos_id, *encode(f"a{own}")]
    assert tokenizer.encode(text, own=spans) == expected
    assert tokenizer.encode_batch(["a", text], own=[[], spans]) == [encode("a"), expected]
    (found,) = tokenizer.encode_batch_with_spans([text], own=[spans])
    assert found.ids == expected
    assert (found.begins[0], found.ends[0], found.ends[-1]) == (0, len(bos), len(text))
    assert all(found.ends > found.begins)
    at = len(encode(f"the {own} is")) + 1
    assert (found.begins[at], found.ends[at]) == (behind - len(eos), behind)
    # Without own text all of them are read, a part of one is none, and all in one own text are text.
    assert tokenizer.encode(f"{bos}a{eos}", own=[(len(bos), len(bos) + 1)])[::2] == [tokenizer.bos_id, tokenizer.eos_id]
    assert tokenizer.encode(f"{bos}a{eos}")[::2] == [tokenizer.bos_id, tokenizer.eos_id]
    assert tokenizer.encode(text, own=[(0, len(text))]) == encode(text)
    assert tokenizer.encode(bos, own=[(1, 2)]) == encode(bos)


def test_files_are_what_a_checkpoint_needs(tmp_path: Path, tokenizer_path: Path) -> None:
    assert load_tokenizer(tokenizer_path).files() == {"tokenizer.model": tokenizer_path.read_bytes()}
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = load_tokenizer(byte_level(tmp_path, config, template=True))
    assert tokenizer.files().keys() == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_a_tokenizer_is_found_in_the_folder_or_one_above(tmp_path: Path, tokenizer_path: Path) -> None:
    model = tmp_path / "7B"
    model.mkdir()
    assert find_tokenizer(model) is None
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    assert find_tokenizer(model) == tmp_path / "tokenizer.model"
    byte_level(model)
    assert find_tokenizer(model) == model / "tokenizer.json"
    assert isinstance(load_tokenizer(model), HuggingFaceTokenizer)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
        ("tokenizer.model", b"version https://git-lfs", "not a SentencePiece model"),
        ("tokenizer.model", b"", "not a SentencePiece model"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff", "not a tokenizer.json"),
        (
            "tokenizer.json",
            b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
            "its vocabulary is empty",
        ),
    ],
)
def test_what_is_not_a_tokenizer_is_an_error(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path / name)


def test_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path)


def test_llamas_own_tokenizer(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "assets/tokenizer")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.fingerprint().startswith("9e556afd")
    assert tokenizer.encode("Hello world", bos=True) == [1, 15043, 3186]
