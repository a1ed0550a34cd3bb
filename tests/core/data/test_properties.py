"""What holds for any data: any text, any order of roles, any JSON, any bytes; on both kinds of tokenizers."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llama_acc.core.data.check import FileReport
from llama_acc.core.data.checks import DatasetStats
from llama_acc.core.data.encode import documents
from llama_acc.core.data.findings import KINDS
from llama_acc.core.data.items import Dialogue, SingleTurn, item_of, stream_items
from llama_acc.core.data.templates import TEMPLATES, Turn, get_template
from llama_acc.core.errors import DataError, UserError
from llama_acc.core.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from tests.core.data.reading import read_file
from tests.core.tokenizers import byte_fallback, byte_level

# Every text but lone surrogates, which are a data error; more often than by chance, what is awkward for a tokenizer.
TEXT = st.one_of(
    st.text(max_size=20),
    st.text(" \n\t#:▁😀é日\u0301\u200d\u3000\0ab", max_size=12),
    st.sampled_from([" ", "\n###", "### Human:", "Assistant:", "👩‍👩‍👧", "ﬁ", "İ", "e\u0301", "\r\n", "\u2028", "▁▁"]),
)
ROLE = st.sampled_from(["human", "assistant"])
TURNS = st.lists(st.tuples(ROLE, TEXT), min_size=1, max_size=5)
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level", "byte_fallback"])
def tokenizer(
    request: pytest.FixtureRequest, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(tokenizer_path)
    make = byte_level if request.param == "byte_level" else byte_fallback
    return load_tokenizer(make(tmp_path_factory.mktemp(request.param)))


def plain(text: str) -> str:
    """A text as it comes back: U+2581 is SentencePiece's own mark for a space."""
    return text.replace("▁", " ")


def without_specials(text: str, tokenizer: Tokenizer) -> str:
    """A tokenizer.json reads BOS and EOS in a text as such, and they have no text."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        for special in (tokenizer.bos_id, tokenizer.eos_id):
            text = text.replace(tokenizer.piece(special), "")
    return text


def written(turns: list[tuple[str, str]], name: str) -> list[tuple[str, bool]]:
    """A dialogue as docs/data.md says it is written: texts, and whether they are the assistant's to write."""
    if name == "chatml":
        parts = []
        for role, text in turns:
            begin, reply = f"<|im_start|>{'user' if role == 'human' else role}\n", role == "assistant"
            parts += [(begin, False), (f"{text}<|im_end|>", reply), ("\n", False)]
        return parts
    parts = [(
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n###", False,
    )]  # fmt: skip
    cleaned = [(role, text.replace("<image>", "").strip()) for role, text in turns]
    told_apart, replied = any(role == "assistant" and "\n###" in text for role, text in cleaned), False
    for role, text in cleaned:
        parts += [(f" {role.capitalize()}:", told_apart and replied), (f" {text}\n###", role == "assistant")]
        replied = role == "assistant"
    return [*parts, ("", told_apart and replied)]


@SLOW
@given(turns=TURNS, name=st.sampled_from(["dialogue", "chatml"]))
def test_labels_cover_exactly_the_assistants_tokens(
    turns: list[tuple[str, str]], name: str, tokenizer: Tokenizer
) -> None:
    assume(not any("<|im_" in text for _, text in turns))  # hypothesis draws texts that stand in the code, too
    parts = written(turns, name)
    text = "".join(part for part, _ in parts)
    assistants = np.repeat([reply for _, reply in parts], [len(part) for part, _ in parts])
    [spans] = tokenizer.encode_batch_with_spans([text])
    [[(tokens, labelled, _)]] = documents([Dialogue([Turn(*turn) for turn in turns])], get_template(name), tokenizer)
    bos, eos = TEMPLATES[name].bos, TEMPLATES[name].eos
    assert tokens.tolist() == [tokenizer.bos_id] * bos + spans.ids + [tokenizer.eos_id] * eos
    expected = [bool(assistants[b:e].any()) for b, e in zip(spans.begins, spans.ends, strict=True)]
    assert labelled.tolist() == [False] * bos + expected + [parts[-1] == ("", True)] * eos
    # All that the assistant wrote is somewhere among the labelled tokens.
    covered = np.zeros(len(text), dtype=bool)
    for begin, end, is_label in zip(spans.begins, spans.ends, expected, strict=True):
        covered[begin:end] |= is_label
    assert covered[assistants].all()
    assert plain(tokenizer.decode(tokens)) == plain(without_specials(text, tokenizer))


@SLOW
@given(
    instruction=TEXT,
    context=st.none() | TEXT,
    output=TEXT,
    name=st.sampled_from(["alpaca", "shortqa", "qg", "caption", "none"]),
)
def test_single_turn_labels_begin_behind_the_prompts_tokens_and_the_text_comes_back(
    instruction: str, context: str | None, output: str, name: str, tokenizer: Tokenizer
) -> None:
    prompt = get_template(name).single_turn_text(instruction, context, "").text
    [[(tokens, labelled, _)]] = documents([SingleTurn(instruction, context, output)], get_template(name), tokenizer)
    assert tokens.tolist() == tokenizer.encode(prompt + output, bos=True, eos=True)
    first = len(tokenizer.encode(prompt, bos=True))
    if name == "none":
        [spans] = tokenizer.encode_batch_with_spans([prompt + output])
        begin = len(prompt.rstrip(" "))
        first = 1 + (int((spans.ends <= begin).sum()) if begin else 0)
    assert labelled.tolist()[first:] == [True] * (len(tokens) - first)
    assert not any(labelled.tolist()[:first])
    assert plain(tokenizer.decode(tokens)) == plain(prompt + output)


@SLOW
@given(turns=TURNS, most=st.integers(2, 80))
def test_truncation_loses_what_it_says(turns: list[tuple[str, str]], most: int, tokenizer: Tokenizer) -> None:
    template = get_template("dialogue")
    dialogue = Dialogue([Turn(*turn) for turn in turns])
    [encoded] = documents([dialogue], template, tokenizer)
    [(tokens, labelled, _)] = encoded
    report = FileReport(Path("a"), DatasetStats(), tokenizer, most)
    report.count_tokens(dialogue, "item 1", encoded, template)
    left, counts = int(labelled[:most].sum()), report.counts
    assert counts["dropped"] == (not left)
    assert counts["dropped_without_reply"] == (not labelled.any())
    assert counts["label_tokens"] == left
    assert counts["tokens"] == (len(tokens[:most]) if left else 0)
    assert counts["truncated_label_tokens"] == (int(labelled[most:].sum()) if left else 0)


SURROGATE = st.text(st.characters(categories=["Cs", "L"]), max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | SURROGATE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | SURROGATE, inner, max_size=3),
    max_leaves=6,
)
KEY = st.sampled_from(["instruction", "input", "output", "conversations", "from", "value", "image", "Output"])
TURN = st.fixed_dictionaries(
    {}, optional={"from": st.sampled_from(["human", "GPT", "user", "bard"]) | JSON, "value": JSON}
)
ROW = st.one_of(
    JSON,
    st.dictionaries(KEY, JSON, max_size=4),
    st.fixed_dictionaries({"instruction": JSON, "output": JSON}, optional={"input": JSON}),
    st.fixed_dictionaries({"conversations": st.lists(TURN | JSON, max_size=3)}),
)


@settings(max_examples=300, deadline=None)
@given(value=ROW, kind=st.sampled_from(["single_turn", "dialogue"]))
def test_a_row_is_an_item_or_it_is_said_why_not(value: Any, kind: str) -> None:
    item, findings = item_of(value, kind, "item 7")
    assert (item is None) == bool(findings)
    for finding in findings:
        assert KINDS[finding.kind].fatal or (finding.kind == "blank" and len(findings) == 1)
        said = str(finding)
        assert said.startswith("item 7: ")
        said.encode("utf-8")
        assert "\n" not in said
    if item is None:
        return
    texts = (
        [turn[1] for turn in item.turns] if isinstance(item, Dialogue) else [item.instruction, item.input, item.output]
    )
    for text in (*texts, *item.images):
        assert text is None or text.encode("utf-8") is not None


@SLOW
@given(rows=st.lists(ROW, min_size=1, max_size=5), lines=st.booleans(), ascii=st.booleans(), packed=st.booleans())
def test_a_file_of_any_rows_gives_items_or_names_each_one_that_is_none(
    rows: list[Any], lines: bool, ascii: bool, packed: bool, tmp_path: Path
) -> None:
    lines = lines and not isinstance(rows[0], list)  # that would be an array
    text = (
        "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows)
        if lines
        else json.dumps(rows, ensure_ascii=ascii)
    )
    data = text.encode("utf-8", "surrogatepass")
    path = tmp_path / ("a.jsonl" if lines else "a.json")
    path.write_bytes(gzip.compress(data) if packed else data)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        with pytest.raises(UserError, match="is not UTF-8"):
            read_file(path)
        return
    stream = stream_items(path)
    items = [item_of(row, stream.kind) for row in rows]
    expected = [item for item, _ in items]
    found = list(stream)
    assert [checked.item for checked in found] == expected
    for number, checked in enumerate(found, start=1):
        assert checked.where == (f"item {number} (line {number})" if lines else f"item {number}")
        assert all(finding.where == checked.where for finding in checked.problems)
    wrong = {number for number, (_, findings) in enumerate(items, start=1) if any(f.fatal for f in findings)}
    if wrong:
        with pytest.raises(DataError) as caught:
            read_file(path)
        places = {problem.removeprefix(f"{path}: item ").split(" ")[0].rstrip(":") for problem in caught.value.problems}
        assert places == set(map(str, wrong))
    else:
        assert read_file(path).items == [item for item in expected if item is not None]
