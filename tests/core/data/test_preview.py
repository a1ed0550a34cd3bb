import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_acc.core.data.items import Dialogue, SingleTurn
from llama_acc.core.data.preview import Piece, pieces, shown_document, shown_items
from llama_acc.core.data.templates import Turn, get_template
from llama_acc.core.tokenizer import Tokenizer

CHAT = Dialogue(
    [Turn("human", "hi"), Turn("assistant", "the answer"), Turn("human", "and?"), Turn("assistant", "a town")]
)


def marked(shown: list[Piece]) -> str:
    return "".join(f"[{p.text}]" if p.trained else p.text for p in shown)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_item_is_shown_as_the_model_sees_it(with_tokenizer: bool, tokenizer: Tokenizer) -> None:
    items = [("first", SingleTurn("name it", None, "a town"))]
    [single] = shown_items(items, get_template("none"), tokenizer if with_tokenizer else None, None)
    assert single.pieces == [
        Piece("<s>", False, True), Piece("name it", False), Piece("a town", True), Piece("</s>", True, True)
    ]  # fmt: skip
    assert single.origin == "first"
    [chat] = shown_items([("c", CHAT)], get_template("dialogue"), tokenizer if with_tokenizer else None, None)
    assert "### Human: hi\n### Assistant:[ the answer\n###] Human: and?\n### Assistant:[ a town\n###]</s>" in marked(
        chat.pieces
    )


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(st.sampled_from(["human", "assistant"]), st.text()), min_size=1, max_size=4),
    name=st.sampled_from(["dialogue", "chatml"]),
)
def test_the_text_of_the_pieces_is_the_text_of_the_item(
    turns: list[tuple[str, str]], name: str, tokenizer: Tokenizer
) -> None:
    for loaded in (tokenizer, None):
        [shown] = shown_items([("", Dialogue([Turn(*turn) for turn in turns]))], get_template(name), loaded, None)
        text = "".join(piece.text for piece in shown.pieces if not piece.special)
        expected, *_ = get_template(name).dialogue_text([Turn(*turn) for turn in turns])
        assert text.replace("▁", " ") == expected.replace("▁", " ")


def test_images_stand_behind_bos(tokenizer: Tokenizer) -> None:
    item = SingleTurn("", None, "a town", ("a.png", "b.png"))
    names = [Piece("<image a.png>", False, True), Piece("<image b.png>", False, True)]
    for loaded in (tokenizer, None):
        [shown] = shown_items([("", item)], get_template("caption"), loaded, None, 34)
        assert shown.pieces[:3] == [Piece("<s>", False, True), *names]
        [chat] = shown_items(
            [("", Dialogue([Turn("human", "hi")], ("a.png", "b.png")))], get_template("chatml"), loaded, 100
        )
        assert chat.pieces[:2] == names
    [cut] = shown_items([("", item)], get_template("caption"), tokenizer, 70, 34)
    [whole] = shown_items([("", item)], get_template("caption"), tokenizer, None, 34)
    assert whole.tokens is not None
    assert whole.label_tokens is not None
    assert (cut.tokens, cut.cut) == (70, whole.tokens - 70)
    assert cut.label_tokens == whole.label_tokens - cut.cut
    assert not any(piece.text == "</s>" for piece in cut.pieces)
    tokens = np.array(tokenizer.encode("a town", bos=True))
    placed, labeled = np.insert(tokens, 1, [tokens[-1]] * 4), np.zeros(len(tokens) + 4, bool)
    shown = shown_document("", placed, labeled, tokenizer, ["a.png", "b.png"], 1, 2)
    assert shown.pieces == [Piece("<s>", False, True), *names, Piece("a town", False)]


def test_a_character_of_several_tokens_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b")
    shown = pieces(ids, [False] * len(ids), tokenizer)
    assert shown == [Piece("a😀b", False)]
    assert json.dumps(shown)
