"""OpenAI's, WizardLM's, LIMA's and Alpaca's formats, columns of any name, and telling all of these apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data.convert.formats import FORMATS, recognise
from llama_acc.core.data.convert.run import Conversion, Request
from llama_acc.core.errors import DataError, UserError
from tests.core.data.convert.conversions import convert_file, convert_rows, talk, turns_of

ONE = {"instruction": "a", "input": "", "output": "b"}
AB = [("human", "a"), ("gpt", "b")]


def messages(*turns: tuple[str, Any], **others: Any) -> dict[str, Any]:
    return {**others, "messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (messages(("user", "a"), ("assistant", "b")), AB),
        (messages(("system", "Be brief."), ("user", "a"), ("assistant", "b")), [("human", "Be brief.\n\na"), AB[1]]),
        (messages(("developer", "Be brief."), ("user", "a"), ("assistant", "b")), [("human", "Be brief.\n\na"), AB[1]]),
        (messages(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")), AB),
        ({"conversations": messages(("user", "a"), ("assistant", "b"))["messages"]}, AB),
    ],
)
def test_openais_messages(tmp_path: Path, row: Any, turns: Any) -> None:
    assert turns_of(convert_rows("openai", [row], tmp_path)[0][0]) == turns


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (messages(("user", "a"), ("tool", "b")), "has calls of tools"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "has calls of tools"),
        (messages(("user", [{"type": "image_url", "image_url": {}}])), "has images, sound or files"),
        (messages(("user", "a")), "no question with a reply"),
    ],
)
def test_messages_that_are_no_dialogue_are_counted(tmp_path: Path, row: Any, reason: str) -> None:
    assert convert_rows("openai", [row], tmp_path)[1].skipped == {reason: 1}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (messages(("user", None)), "turn 1: 'content' is null"),
        (messages(("user", [{"type": "dance"}])), "turn 1: unknown type of content 'dance'"),
        ({"messages": "a"}, "'messages' should be a list, but is text"),
        ({"messages": [{"content": "a"}]}, "turn 1: no 'role'"),
    ],
)
def test_wrong_messages_are_named(tmp_path: Path, row: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        convert_rows("openai", [row], tmp_path)
    assert problem in caught.value.message


def moss(*turns: tuple[str, str], commands: str = "None") -> dict[str, Any]:
    chat = {
        f"turn_{number}": {
            "Human": f"<|Human|>: {question}<eoh>\n",
            "Commands": f"<|Commands|>: {commands}<eoc>\n",
            "MOSS": f"<|MOSS|>: {reply}<eom>\n",
        }
        for number, (question, reply) in enumerate(turns, start=1)
    }
    return {"conversation_id": 7, "meta_instruction": "You are MOSS.", "chat": chat}


def test_moss_has_marks_around_its_texts(tmp_path: Path) -> None:
    rows = [moss(*[(f"a\n{i}", f" <eom> {i}") for i in range(11)]), moss(("a", "b"), commands='Search("a")')]
    (record,), conversion = convert_rows("moss", rows, tmp_path)
    assert turns_of(record) == [t for i in range(11) for t in (("human", f"a\n{i}"), ("gpt", f" <eom> {i}"))]
    assert record["id"] == 7
    assert conversion.skipped == {"has calls of tools": 1}
    assert conversion.notes == {"descriptions of MOSS were left out": 1}
    for chat, problem in (
        (None, "'chat' is null"),
        ([], "'chat' should be an object, but is a list"),
        ({"x": {}}, "turn_1, turn_2, ..., but has 'x'"),
        ({"turn_1": {"Human": "a"}}, "turn 1: no 'MOSS'"),
    ):
        with pytest.raises(DataError) as caught:
            convert_rows("moss", [{"chat": chat}], tmp_path)
        assert problem in caught.value.message


def test_wizardlm_has_two_versions_and_a_test_set(tmp_path: Path) -> None:
    assert turns_of(convert_rows("wizardlm", [talk(*AB, idx="x")], tmp_path)[0][0]) == AB
    assert convert_rows("wizardlm", [{"instruction": "a", "output": "b"}], tmp_path)[0] == [ONE]
    records, conversion = convert_rows("wizardlm", [{"idx": 1, "Skill": "Math", "Instruction": "a"}], tmp_path)
    assert (records, sum(conversion.skipped.values())) == ([], 1)


def test_lima_has_two_forms(tmp_path: Path) -> None:
    rows = [{"conversations": ["a", "b", "c", "d"], "source": "x"}, {"conversations": ["a"]}, talk(*AB, id="lima_0")]
    records, conversion = convert_rows("lima", rows, tmp_path)
    assert [turns_of(record) for record in records] == [[*AB, ("human", "c"), ("gpt", "d")], AB]
    assert sum(conversion.skipped.values()) == 1
    with pytest.raises(DataError, match="turn 2: should be text, but is a number"):
        convert_rows("lima", [{"conversations": ["a", 1]}], tmp_path)


def test_alpaca_loses_other_fields(tmp_path: Path) -> None:
    rows = [{**ONE, "text": "x"}, {"instruction": "a", "input": None, "output": "b"}]
    assert convert_rows("alpaca", rows, tmp_path)[0] == [ONE, ONE]


def test_columns_are_mapped(tmp_path: Path) -> None:
    row = {"q": "a", "ctx": "c", "a": "b", "input": "not this"}
    mapping = {"instruction": "q", "output": "a"}
    assert convert_rows("jsonl", [row], tmp_path, mapping={**mapping, "input": "ctx"})[0] == [{**ONE, "input": "c"}]
    assert convert_rows("jsonl", [{"q": "a", "a": "b"}], tmp_path, mapping=mapping)[0] == [ONE]
    nothing = {"q": "a", "ctx": None, "a": "b"}
    assert convert_rows("jsonl", [nothing], tmp_path, mapping={**mapping, "input": "ctx"})[0] == [ONE]
    table = tmp_path / "a.csv"
    table.write_text('q,a\na,b\n"a",b\n', encoding="utf-8")
    assert convert_file("csv", table, mapping=mapping)[0] == [ONE, ONE]


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("question\tanswer\na\tb\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no column 'Question' \('question'\?\)"):
        convert_file("csv", table, mapping={"instruction": "Question", "output": "answer"})
    with pytest.raises(DataError, match=r"no column 'instruction'") as caught:
        convert_file("csv", table)
    assert "question, answer" in str(caught.value.hint)
    mapping = {"instruction": "q", "input": "input", "output": "a"}
    with pytest.raises(DataError, match="no 'input' \\(its keys: 'q', 'a'\\)"):
        convert_rows("jsonl", [{"q": "a", "a": "b"}], tmp_path, mapping=mapping)


RECOGNISED = {
    "gorilla": [{"code": "###Instruction: a"}, {"code": "{'Instruction': a", "api_call": "x"}],
    "llava": [talk(*AB, image="a.jpg")],
    "sharegpt": [talk(*AB, id="x"), {"items": talk(*AB)["conversations"]}],
    "wizardlm": [talk(*AB, idx="x"), {"idx": 1, "Skill": "Math", "Instruction": "a"}],
    "lima": [{"conversations": ["a", "b"]}, talk(*AB, id="lima_7")],
    "alpaca": [ONE, {"instruction": "a", "output": "b"}],
    "openai": [messages(("user", "a"), ("assistant", "b")), {"conversations": messages(*AB)["messages"]}],
    "moss": [moss(("a", "b"))],
    "jsonl": [{"question": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}],
}


@pytest.mark.parametrize(("format", "row"), [(format, row) for format, rows in RECOGNISED.items() for row in rows])
def test_each_format_is_recognised_and_converts(tmp_path: Path, format: str, row: Any) -> None:
    recognised = recognise(row)
    assert recognised is not None
    assert recognised.format == format
    assert any(repr(key) in recognised.why for key in row), recognised.why
    named = convert_rows(format, [row], tmp_path, mapping=recognised.mapping, all_forms=True)[0]
    assert convert_rows("auto", [row], tmp_path, all_forms=True)[0] == named


def test_every_format_but_tables_is_recognised() -> None:
    """A table is known by its name, and its columns as JSON of any fields is."""
    assert set(RECOGNISED) == set(FORMATS) - {"csv"}


def test_auto_looks_at_each_file_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ONE]), encoding="utf-8")
    (tmp_path / "b.csv").write_text("question,answer\na,b\n", encoding="utf-8")
    told: list[str] = []
    paths = [tmp_path / "a.json", tmp_path / "b.csv"]
    conversion = Conversion(Request("auto", paths), on_found=lambda found: told.append(found.recognised.format))
    assert [converted.record for converted in conversion] == [ONE, ONE]
    assert told == ["alpaca", "csv"]


def test_what_is_not_recognised_is_told_with_its_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its first item has the keys 'x', 'y'") as caught:
        convert_rows("auto", [{"x": 1, "y": 2}], tmp_path)
    assert "--map" in str(caught.value.hint)
    with pytest.raises(UserError, match="hold no objects"):
        convert_rows("auto", [1, 2], tmp_path)


def test_items_of_one_file_are_of_one_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"item 2 \(line 2\): is a dialogue among single-turn items"):
        convert_rows("wizardlm", [{"instruction": "a", "output": "b"}, talk(*AB)], tmp_path)


@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("alpaca_5000.json", 5000),
        ("alpaca_data_cleaned_1000.json", 1000),
        ("caption_blip_2k.json", 2183),
        ("lima_vicuna_format.json", 1029),
        ("llava_instruct_100.json", 458),
        ("sharegpt_dummy500.json", 500),
        ("sharegpt_example.json", 3),
        ("sharegpt_maths1k.jsonl", 1000),
        ("WizardLM_testset.jsonl", 0),
    ],
)
def test_every_real_file_converts(shared: Path, name: str, items: int) -> None:
    records, conversion = convert_file("auto", shared / "assets/data" / name)
    assert len(records) == items
    assert conversion.rows == sum(conversion.skipped.values()) + (100 if "llava" in name else items)
