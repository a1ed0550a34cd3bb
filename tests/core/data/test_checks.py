from typing import Any

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_acc.core.data.checks import DatasetStats, check_item, duplicates, item_hash, language_of
from llama_acc.core.data.findings import KINDS
from llama_acc.core.data.items import Checked, Dialogue, Item, SingleTurn
from llama_acc.core.data.templates import Turn

QUESTION = "What is the capital of France, please?"
ENGLISH = "It is the largest city of the country, and the seat of the government."
GERMAN = "Natürlich ist das die Hauptstadt, denn dort sitzt auch die Regierung des Landes."


def talk(*turns: str) -> Dialogue:
    """Of "human: text" and "assistant: text"."""
    return Dialogue([Turn(*turn.split(": ", 1)) for turn in turns])


def kinds(item: Item) -> list[str]:
    return [finding.kind for finding in check_item(item, "item 1")]


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (SingleTurn(QUESTION, None, "Paris."), []),
        (SingleTurn(QUESTION, None, " \n"), ["empty_reply"]),
        (talk("human: a", "assistant: "), ["empty_reply"]),
        (SingleTurn("Hi!", None, "hi!"), ["echo"]),
        (SingleTurn("Hi!", None, "Hi! How are you?"), []),
        (SingleTurn(QUESTION, None, f"  {QUESTION.upper()}\n Paris."), ["echo"]),
        (SingleTurn("Say this again:", "the words", "Say this  again: the words"), ["echo"]),
        (SingleTurn("Correct this.", "It is right.", "It is right."), []),
        (SingleTurn("", None, "a caption"), []),
        (talk(f"human: {QUESTION}", f"assistant: {QUESTION} Paris.", "human: b", "assistant: c"), ["echo"]),
        (talk("human: a", "assistant: b", "assistant: c"), ["role_order"]),
        (talk("human: a", "human: b", "assistant: c"), ["role_order"]),
        (talk("assistant: a", "human: b"), ["role_order", "role_order"]),
        (SingleTurn("Menu", None, "cafÃ© au lait"), ["mojibake"]),
        (SingleTurn("»Über« heißt «à côté» ¿qué?", None, "»Über«, »Äpfel« und ›Öl‹, «été»"), []),
        (SingleTurn("»Über«", None, "»Über«\nund caf\u00c3\u00a9"), ["mojibake"]),
        (SingleTurn("Menu", "donâ€™t", "café — “naïve” 😀 日本"), ["mojibake"]),
        (SingleTurn("Menu", None, "caf\ufffd"), ["mojibake"]),
    ],
)
def test_what_is_found_in_an_item(item: Item, found: list[str]) -> None:
    assert kinds(item) == found
    assert not any(KINDS[kind].fatal for kind in found)


def test_a_finding_names_field_and_place() -> None:
    *_, first, second = check_item(talk("human: a", "assistant: ", "human: x" + "é" * 30 + " cafÃ©"), "item 3")
    assert str(first) == 'item 3, turn 2, value: an empty reply: ""'
    assert str(second).startswith("item 3, turn 3, value: UTF-8 read as another encoding, near character 35: ")
    assert second.value.endswith('cafÃ©"')


WORDS = st.sampled_from(
    ["»Über«", "«été»", "cafÃ©", "donâ€™t", "naïve", "Ð¿Ñ€", "100 %", "½ – ¾", "a", "\n", "Ä»", "😀", "¿", "°C"]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, max_size=6).map(" ".join))
def test_texts_are_called_wrongly_decoded_where_ftfy_would_change_them(text: str) -> None:
    changed = any(ftfy.fix_encoding(line) != line for line in text.split("\n"))
    assert ("mojibake" in kinds(SingleTurn("", None, text))) == changed


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        (GERMAN, "de"),
        ("あなたは私の人生の光です。いつもありがとうございます。", "ja"),
        ("“She said that the answer’s in the book,” and they left.", "en"),  # the look at common words
        ("De band The Beatles is in 1960 opgericht in Liverpool en was een van de bekendste groepen ter wereld.", "nl"),
        (
            "这句话的意思是“the cat and the dog”，在中文里很难直接翻译出来，因为中文没有冠词，也没有这样的连接方式。",
            "zh",
        ),
        ("Paris.", None),
        ("0.5 1.5 2.5 3.5 4.5 5.5 6.5 7.5 8.5 9.5 10.5 11.5 12.5 13.5", None),
    ],
)
def test_languages(text: str, language: str | None) -> None:
    assert language_of(text) == language


def stats_of(items: list[Any], most: int | None = 100, start: int = 1) -> DatasetStats:
    stats = DatasetStats(most)
    for number, item in enumerate(items, start):
        stats.add(Checked(f"item {number}", item, []))
    return stats


def english(count: int) -> list[Item]:
    return [SingleTurn(f"Question {i}", None, f"{i}: {ENGLISH}") for i in range(count)]


def test_items_in_another_language_than_the_rest_are_found_unless_there_is_no_rest() -> None:
    stats = stats_of([*english(9), SingleTurn("Frage", None, GERMAN)])
    assert (stats.language, stats.languages) == ("en", {"en": 9, "de": 1})
    [finding] = stats.all_findings().places["language"]
    assert str(finding).startswith("item 10, output: a reply in 'de', but the rest is in 'en': ")
    mixed = stats_of([*english(5), *(SingleTurn(str(i), None, GERMAN) for i in range(5))])
    assert mixed.language is None
    assert "language" not in mixed.all_findings().counts
    assert stats_of([*english(2), SingleTurn("x", None, GERMAN)]).language is None, "three items are not enough"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "A", "a ", "b", None]), max_size=12))
def test_duplicates_are_what_comparing_all_pairs_finds(texts: list[str | None]) -> None:
    stats = stats_of([None if text is None else SingleTurn("q", None, text) for text in texts])
    expected = [(i, texts.index(text)) for i, text in enumerate(texts) if text is not None and text in texts[:i]]
    assert duplicates(stats.hashes()) == expected
    found = [(place.where, place.message) for place in stats.all_findings().places.get("duplicate", [])]
    assert found == [(f"item {i + 1}", f"the same as item {first + 1}") for i, first in expected]


def test_roles_and_borders_of_texts_tell_items_apart() -> None:
    different: list[Item] = [
        talk("human: a", "assistant: b"), talk("assistant: a", "human: b"), talk("human: ab", "assistant: "),
        talk("human: a"), SingleTurn("a", None, "b"), SingleTurn("ab", None, ""), SingleTurn("a", "b", ""),
    ]  # fmt: skip
    assert len({item_hash(item) for item in different}) == len(different)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.sampled_from([*english(3), SingleTurn("q", None, GERMAN), SingleTurn("q", None, ""), None]), max_size=9
    ),
    st.integers(0, 9),
    st.sampled_from([1, 100]),
)
def test_the_statistics_of_the_parts_of_a_file_are_those_of_the_file(
    items: list[Item | None], cut: int, most: int
) -> None:
    whole, merged = stats_of(items, most), stats_of(items[:cut], most)
    merged.merge(stats_of(items[cut:], most, cut + 1))
    assert merged.all_findings() == whole.all_findings()
    assert (merged.rows, merged.items, merged.languages) == (whole.rows, whole.items, whole.languages)
