import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from llama_acc.core.data.checks import replies_of
from llama_acc.core.data.encode import Batch, Chunk, Encoding, encode_batch, encode_batches, stored_tokens
from llama_acc.core.data.items import Checked, Dialogue, Item, SingleTurn
from llama_acc.core.data.templates import Template, Turn, get_template
from llama_acc.core.errors import RunError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer
from tests.core.data.reading import read_items

TINY_VOCABULARY = 1000


def encode(items: Sequence[Item], template: str | Template, tokenizer: Tokenizer, max_tokens: int = 4096) -> Chunk:
    form = get_template(template) if isinstance(template, str) else template
    batch = [(i, Checked("item", item, [])) for i, item in enumerate(items)]
    return encode_batch(batch, Encoding(form, max_tokens), tokenizer)


def document(encoded: Chunk, i: int = 0) -> tuple[list[int], list[int]]:
    """A document's tokens, and the indices of its labels."""
    tokens, labeled = stored_tokens(encoded.table[i], encoded.content, TINY_VOCABULARY)
    assert encoded.table["label_count"][i] == labeled.sum()
    return tokens.tolist(), np.flatnonzero(labeled).tolist()


def labeled_text(encoded: Chunk, tokenizer: Tokenizer, i: int = 0) -> str:
    tokens, labels = document(encoded, i)
    return "".join(tokenizer.piece(tokens[label]) for label in labels)


def talk(*texts: str) -> Dialogue:
    return Dialogue([Turn(("human", "assistant")[i % 2], text) for i, text in enumerate(texts)])


def test_single_turn_items_become_dialogues_of_one_exchange(tokenizer: Tokenizer) -> None:
    singles = encode([SingleTurn("go", " ", "ok"), SingleTurn("go", "there", "ok")], "chatml", tokenizer)
    dialogues = encode([talk("go", "ok"), talk("go\n\nthere", "ok")], "chatml", tokenizer)
    assert [document(singles, i) for i in (0, 1)] == [document(dialogues, i) for i in (0, 1)]


def test_inputs_that_a_template_does_not_show_are_counted(tokenizer: Tokenizer) -> None:
    items = [SingleTurn("go", context, "ok") for context in (None, " ", "there", "here")]
    unused = [encode(items, template, tokenizer).unused_inputs for template in ("alpaca", "chatml", "none")]
    assert unused == [0, 0, 2]


def test_the_first_token_is_never_a_target(tokenizer: Tokenizer) -> None:
    without_bos = get_template("caption").model_copy(update={"bos": False})
    encoded = encode([SingleTurn("", None, "a town")], without_bos, tokenizer)
    assert document(encoded)[1] == list(range(1, encoded.table["length"][0]))


def test_documents_are_told_apart_by_tokens_and_labels(tokenizer: Tokenizer) -> None:
    items = [SingleTurn("go", None, "ok"), SingleTurn("go", None, "ok"), SingleTurn("g", None, "ook")]
    one, same, other_labels = encode(items, "none", tokenizer).table["digest"].tolist()
    assert one == same != other_labels
    assert encode(items[:1], "none", tokenizer).table["digest"].tolist() == [one]
    length = encode(items[:1], "none", tokenizer).table["length"][0]
    assert encode(items[:1], "none", tokenizer, max_tokens=length - 1).table["digest"][0] != one


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
    assert (encoded.stats.items, len(encoded.table), encoded.table["cut"].sum()) == (1029, 1029, 0)
    headings = [i for i, item in enumerate(items) if any("\n###" in text.strip() for _, text in replies_of(item))]
    assert len(headings) == 13
    assert int(encoded.table["label_count"].sum()) == 671_984 + 13
    for i, item in enumerate(items):
        end = [len(document(encoded, i)[0]) - 1] if i in headings else []
        assert [*(searched_labels(tokenizer, item) or []), *end] == document(encoded, i)[1]


def test_alpacas_labels_are_llama2_accessorys(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "assets/tokenizer")
    items = read_items(shared / "assets/data/alpaca_5000.json")[::50]
    encoded = encode(items, "alpaca", tokenizer)
    for i, item in enumerate(items):
        prompt = get_template("alpaca").single_turn_text(item.instruction, item.input, "").text
        tokens = tokenizer.encode(prompt + item.output, bos=True, eos=True)
        labels = list(range(len(tokenizer.encode(prompt, bos=True)), len(tokens)))
        assert document(encoded, i) == (tokens, labels)


ENCODING = Encoding(get_template("none"), 64)


def batches(count: int) -> list[Batch]:
    return [
        [(n * 3 + i, Checked("item", SingleTurn("go", None, f"answer {n} {i}"), [])) for i in range(3)]
        for n in range(count)
    ]


def facts(chunk: Chunk) -> tuple[object, ...]:
    return chunk.table.tolist(), chunk.content, chunk.stats.all_findings(), chunk.stats.rows, chunk.unused_inputs


def test_workers_give_what_one_process_gives_in_order_and_read_as_they_need(tokenizer: Tokenizer) -> None:
    alone = [facts(chunk) for chunk in encode_batches(batches(60), ENCODING, tokenizer, workers=1)]
    read = []

    def reading() -> Iterator[Batch]:
        for batch in batches(1000):
            read.append(batch)
            yield batch

    encoded = encode_batches(reading(), ENCODING, tokenizer, workers=2)
    assert [facts(chunk) for chunk in islice(encoded, 60)] == alone
    assert len(read) <= 60 + 2 * 2 + 1
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    with pytest.raises(RunError, match="a process that encodes data was killed"):
        list(encoded)
