"""A SentencePiece model of any usual kind gives the same tokens as a tokenizer.json."""

import io
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llama_acc.core.sentencepiece_json import fast_tokenizer

TEXT = Path(__file__).read_text().splitlines()
TEXTS = [
    *TEXT,
    *(f"x{mark * count}y{mark * count}" for mark in " -=\t" for count in range(1, 40)),
    *("  two  spaces ", "", " ", "Ａ１ ﬁ é ①", "日本語", "▁▁ ▁", "nul\0"),
]
LLAMAS = {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False}
LLAMAS |= {"normalization_rule_name": "identity", "allow_whitespace_only_pieces": True}


@pytest.mark.parametrize(
    ("settings", "first_only"),
    [
        (LLAMAS, False),
        (LLAMAS, True),
        (LLAMAS | {"byte_fallback": False}, False),
        (LLAMAS | {"add_dummy_prefix": False}, False),
        (LLAMAS | {"user_defined_symbols": ["pars", "--"]}, False),
        ({"model_type": "bpe"}, False),
        (LLAMAS | {"model_type": "unigram"}, False),
        ({"model_type": "unigram"}, False),
    ],
)
def test_the_tokens_are_those_of_sentencepiece(settings: dict[str, Any], first_only: bool) -> None:
    model = io.BytesIO()
    usual = {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, "character_coverage": 0.98}
    SentencePieceTrainer.train(sentence_iterator=iter(TEXTS[:-4] * 2), model_writer=model, **(usual | settings))
    theirs = SentencePieceProcessor(model_proto=model.getvalue())
    ours = fast_tokenizer(model.getvalue(), Path("tokenizer.model"), first_only=first_only)
    # Of equal scores a Unigram model takes another way here.
    texts = TEXTS if settings["model_type"] == "bpe" else TEXT
    assert [ours.encode(text, add_special_tokens=False).ids for text in texts] == theirs.encode(texts)
    assert ours.decode(theirs.encode("the text")) == "the text"
