from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_acc.core.data.checks import replies_of
from llama_acc.core.data.encode import Chunk, encode_chunk, stored_tokens, token_type
from llama_acc.core.data.items import Dialogue, Item, SingleTurn
from llama_acc.core.data.templates import Turn, get_template
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer
from tests.core.data.reading import read_items

TINY_VOCABULARY = 1000


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


def encode(items: Sequence[Item], template: str, tokenizer: Tokenizer, max_tokens: int = 4096) -> Chunk:
    return encode_chunk(list(enumerate(items)), get_template(template), tokenizer, max_tokens)


def document(encoded: Chunk, i: int = 0) -> tuple[list[int], list[int]]:
    """A document's tokens, and the indices of its labels."""
    tokens, labeled = stored_tokens(encoded.table[i], encoded.content, token_type(TINY_VOCABULARY))
    assert encoded.table["label_count"][i] == labeled.sum()
    return tokens.tolist(), np.flatnonzero(labeled).tolist()


def labeled_text(encoded: Chunk, tokenizer: Tokenizer, i: int = 0) -> str:
    tokens, labels = document(encoded, i)
    return "".join(tokenizer.piece(tokens[label]) for label in labels)


def talk(*texts: str) -> Dialogue:
    return Dialogue([Turn(("human", "assistant")[i % 2], text) for i, text in enumerate(texts)])


@pytest.mark.parametrize("template", ["alpaca", "none", "qg", "shortqa", "caption"])
@pytest.mark.parametrize("output", ["the answer", " the answer\n", "😀", ""])
def test_single_turn_labels_begin_behind_the_prompts_tokens(template: str, output: str, tokenizer: Tokenizer) -> None:
    prompt = get_template(template).single_turn_text("what is it?", "a town", "").text
    tokens, labels = document(encode([SingleTurn("what is it?", "a town", output)], template, tokenizer))
    assert tokens == tokenizer.encode(prompt + output, bos=True, eos=True)
    assert labels == list(range(len(tokenizer.encode(prompt, bos=True)), len(tokens)))


def test_an_empty_reply_trains_the_end(tokenizer: Tokenizer) -> None:
    tokens, labels = document(encode([SingleTurn("go", None, "")], "alpaca", tokenizer))
    assert [tokens[label] for label in labels] == [tokenizer.eos_id]
    encoded = encode([talk("hi", " ")], "dialogue", tokenizer)
    assert labeled_text(encoded, tokenizer).replace("▁", "") == "<0x0A>###"


def test_a_reply_that_echoes_the_human_turn_is_labeled_where_it_stands(tokenizer: Tokenizer) -> None:
    tokens, labels = document(encode([talk("the answer", "the answer")], "dialogue", tokenizer))
    reply = tokenizer.encode("the answer\n###")
    assert labels == list(range(len(tokens) - 1 - len(reply), len(tokens) - 1))
    assert [tokens[label] for label in labels] == reply


def test_a_dialogue_is_framed_and_its_eos_is_no_label(tokenizer: Tokenizer) -> None:
    text, *_ = get_template("dialogue").dialogue_text([Turn("human", "hi"), Turn("assistant", "a"), Turn("human", "b")])
    tokens, labels = document(encode([talk("hi", "a", "b")], "dialogue", tokenizer))
    assert tokens == tokenizer.encode(text, bos=True, eos=True)
    assert len(tokens) - 1 not in labels


@pytest.mark.parametrize("reply", ["😀", "a 👩‍👩‍👧 b", "日本", "▁ ▁", "é\nñ", "x"])
def test_what_is_labeled_is_what_the_model_is_to_write(reply: str, tokenizer: Tokenizer) -> None:
    """From where the prompt ends, to and with the end mark; whatever characters the reply has."""
    template = get_template("dialogue")
    tokens, labels = document(encode([talk("hi", reply)], "dialogue", tokenizer))
    prompt = template.prompt_ids(tokenizer, [Turn("human", "hi")])
    assert tokens[: len(prompt)] == prompt
    assert labels == list(range(len(prompt), len(tokens) - 1))


@pytest.mark.parametrize("name", ["dialogue", "chatml"])
def test_a_reply_that_is_context_only_is_seen_and_not_trained(name: str, tokenizer: Tokenizer) -> None:
    turns = [
        Turn("human", "hi"),
        Turn("assistant", "wrong", trained=False),
        Turn("human", "sure?"),
        Turn("assistant", "ok"),
    ]
    tokens, labels = document(encode([Dialogue(turns)], name, tokenizer))
    everything, both = document(encode([Dialogue([turn._replace(trained=True) for turn in turns])], name, tokenizer))
    assert tokens == everything
    assert set(labels) < set(both)
    assert "ok" in tokenizer.decode([tokens[label] for label in labels])
    assert "wrong" not in tokenizer.decode([tokens[label] for label in labels])


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("dialogue", "Be terse.\n\n### Human: go"),
        ("chatml", "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\ngo"),
        ("none", "Be terse.\n\ngo"),
    ],
)
def test_a_system_text_of_an_item_stands_where_the_format_has_one(name: str, begins: str, tokenizer: Tokenizer) -> None:
    items: list[Item] = [SingleTurn("go", None, "ok", system="Be terse.")]
    if name != "none":
        items.append(Dialogue([Turn("human", "go"), Turn("assistant", "ok")], system="Be terse."))
    for item in items:
        assert tokenizer.decode(document(encode([item], name, tokenizer))[0]).startswith(begins)


def test_chatml_has_no_bos_and_eos_and_trains_the_end_mark(tokenizer: Tokenizer) -> None:
    text, *_ = get_template("chatml").dialogue_text([Turn("human", "hi"), Turn("assistant", "the answer")])
    encoded = encode([talk("hi", "the answer")], "chatml", tokenizer)
    tokens, labels = document(encoded)
    assert tokens == tokenizer.encode(text)
    assert tokenizer.decode([tokens[label] for label in labels]) == "the answer<|im_end|>"


def test_single_turn_items_become_dialogues_of_one_exchange(tokenizer: Tokenizer) -> None:
    singles = encode([SingleTurn("go", " ", "ok"), SingleTurn("go", "there", "ok")], "chatml", tokenizer)
    dialogues = encode([talk("go", "ok"), talk("go\n\nthere", "ok")], "chatml", tokenizer)
    assert [document(singles, i) for i in (0, 1)] == [document(dialogues, i) for i in (0, 1)]


def test_inputs_that_a_template_does_not_show_are_counted(tokenizer: Tokenizer) -> None:
    items = [SingleTurn("go", context, "ok") for context in (None, " ", "there", "here")]
    unused = [encode(items, template, tokenizer).unused_inputs for template in ("alpaca", "chatml", "none")]
    assert unused == [0, 0, 2]


def test_what_is_too_long_is_cut_and_what_has_no_label_left_is_dropped(tokenizer: Tokenizer) -> None:
    short, long = SingleTurn("go", None, "ok"), SingleTurn("go", None, "ok " * 50)
    hopeless, silent = SingleTurn("go " * 80, None, "ok"), talk("hi")
    limit = len(tokenizer.encode("go" + "ok", bos=True, eos=True))
    encoded = encode([hopeless, short, hopeless, long], "none", tokenizer, limit)
    assert encoded.items == 4
    assert encoded.table["item"].tolist() == [1, 3]
    assert encoded.table["cut"].tolist() == [False, True]
    assert encoded.table["length"].tolist() == [limit, limit]
    assert document(encoded, 1)[0] == tokenizer.encode("go" + "ok " * 50, bos=True)[:limit]
    assert len(encode([silent], "dialogue", tokenizer).table) == 0


def test_the_first_token_is_never_a_target(tokenizer: Tokenizer) -> None:
    without_bos = get_template("caption").model_copy(update={"bos": False})
    encoded = encode_chunk([(0, SingleTurn("", None, "a town"))], without_bos, tokenizer, 100)
    assert document(encoded)[1] == list(range(1, encoded.table["length"][0]))


def test_documents_are_told_apart_by_tokens_and_labels(tokenizer: Tokenizer) -> None:
    items = [SingleTurn("go", None, "ok"), SingleTurn("go", None, "ok"), SingleTurn("g", None, "ook")]
    one, same, other_labels = encode(items, "none", tokenizer).table["digest"].tolist()
    assert one == same != other_labels
    assert encode(items[:1], "none", tokenizer).table["digest"].tolist() == [one]
    length = encode(items[:1], "none", tokenizer).table["length"][0]
    assert encode(items[:1], "none", tokenizer, max_tokens=length - 1).table["digest"][0] != one


@settings(max_examples=50, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["human", "assistant"]), st.text("ab \n#:😀é▁", max_size=8)), min_size=1, max_size=5
    ),
    name=st.sampled_from(["dialogue", "chatml"]),
)
def test_a_token_is_labeled_if_and_only_if_it_overlaps_a_trained_span(
    turns: list[tuple[str, str]], name: str, tokenizer: Tokenizer
) -> None:
    template = get_template(name)
    encoded = encode([Dialogue([Turn(*turn) for turn in turns])], name, tokenizer)
    text, _, trained, *_ = template.dialogue_text([Turn(*turn) for turn in turns])
    [spans] = tokenizer.encode_batch_with_spans([text])
    wanted = {i for begin, end in trained for i in range(begin, end)}
    expected = [
        i + template.bos
        for i, (begin, end) in enumerate(zip(spans.begins, spans.ends, strict=True))
        if wanted & set(range(begin, end)) and i + template.bos > 0
    ]
    assert (document(encoded)[1] if len(encoded.table) else []) == expected


def searched_labels(tokenizer: Tokenizer, dialogue: Dialogue) -> list[int] | None:
    """LLaMA2-Accessory's rule: search for each reply's own tokens, on from the last one found."""
    text, _, trained, *_ = get_template("dialogue").dialogue_text(dialogue.turns)
    tokens, labels, position = tokenizer.encode(text, bos=True, eos=True), [], 0
    for begin, end in trained:
        reply = tokenizer.encode(text[begin:end].lstrip(" "))
        last = len(tokens) - len(reply) + 1
        found = next((i for i in range(position, last) if tokens[i : i + len(reply)] == reply), None)
        if found is None:
            return None
        position = found + len(reply)
        labels += range(found, position)
    return labels


def test_limas_labels_are_llama2_accessorys_and_eos_where_a_reply_looks_like_its_end(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "assets/tokenizer")
    items = read_items(shared / "assets/data/lima_vicuna_format.json")
    encoded = encode(items, "dialogue", tokenizer, 10**6)
    assert (encoded.items, len(encoded.table), encoded.table["cut"].sum()) == (1029, 1029, 0)
    headings = [i for i, item in enumerate(items) if any("\n###" in text.strip() for _, text in replies_of(item))]
    assert len(headings) == 13
    assert int(encoded.table["label_count"].sum()) == 671_984 + 13
    searched = [searched_labels(tokenizer, item) or [] for item in items]
    for i in headings:
        searched[i].append(len(document(encoded, i)[0]) - 1)
    assert [i for i, labels in enumerate(searched) if labels != document(encoded, i)[1]] == []


def test_alpacas_labels_are_llama2_accessorys(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "assets/tokenizer")
    items = read_items(shared / "assets/data/alpaca_5000.json")
    encoded = encode(items, "alpaca", tokenizer)
    for i in range(0, 5000, 50):
        prompt = get_template("alpaca").single_turn_text(items[i].instruction, items[i].input, "").text
        tokens = tokenizer.encode(prompt + items[i].output, bos=True, eos=True)
        labels = list(range(len(tokenizer.encode(prompt, bos=True)), len(tokens)))
        assert document(encoded, i) == (tokens, labels)
