"""OpenAI's, WizardLM's, LIMA's and Alpaca's formats, columns of any name, and telling all of these apart."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data.convert.formats import FORMATS, recognise
from llama_acc.core.data.convert.run import Conversion, Request, write_items
from llama_acc.core.data.convert.writing import LINES, Items
from llama_acc.core.data.items import Dialogue, item_of, kind_of
from llama_acc.core.errors import DataError, UserError
from tests.core.data.convert.conversions import convert_file, convert_rows, talk, turns_of
from tests.core.data.reading import read_items

ONE = {"instruction": "a", "input": "", "output": "b"}
AB = [("human", "a"), ("gpt", "b")]


def messages(*turns: tuple[str, Any], **others: Any) -> dict[str, Any]:
    return {**others, "messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (messages(("user", "a"), ("assistant", "b")), AB),
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
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "calls of tools cannot be trained on ('tool_calls')",
        ),
        (messages(("user", "a"), ("assistant", "b"), tools=[{}]), "calls of tools cannot be trained on ('tools')"),
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
        convert_rows("auto", [{"x": "a", "y": "b"}], tmp_path)
    assert "--map instruction=COLUMN --map output=COLUMN" in str(caught.value.hint)
    with pytest.raises(UserError, match="its first ones are no objects"):
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


ONE_AB = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
KEPT = [
    # What a row changes in its item, in every format that has it: (format, row, what becomes of it).
    ("openai", messages(("system", "S"), ("developer", "T"), *[("user", "a"), ("assistant", "b")]), "S\n\nT"),
    ("openai", messages(("user", "a"), ("assistant", "b"), system="S"), "S"),
    ("sharegpt", talk(("system", "S"), *AB), "S"),
    ("sharegpt", talk(*AB, system="S", tools="[]"), "S"),
    ("lima", {"conversations": ["a", "b"], "system": "S"}, "S"),
    ("wizardlm", talk(*AB, system="S", idx=1), "S"),
    ("llava", talk(*AB, system="S", image="a.jpg"), "S"),
    ("alpaca", {**ONE, "system": "S"}, "S"),
    ("wizardlm", {**ONE, "system_prompt": "S"}, "S"),
    ("jsonl", {**ONE, "system": "S"}, "S"),
]


@pytest.mark.parametrize(("format", "row", "system"), KEPT)
def test_a_system_text_stays_one_in_every_format(tmp_path: Path, format: str, row: Any, system: str) -> None:
    [record] = convert_rows(format, [row], tmp_path)[0]
    assert record["system"] == system
    kind = kind_of(record) or ""
    item, found = item_of(record, kind)
    assert (found, item.system if item else None) == ([], system)
    pair = (
        [turn.text for turn in item.turns] if isinstance(item, Dialogue) else [record["instruction"], record["output"]]
    )
    assert pair == ["a", "b"]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("openai", {"messages": [{"role": r, "content": t} for r, t in (("user", "a"), ("assistant", "b")) * 2]}),
        ("sharegpt", talk(*AB, *AB)),
        ("wizardlm", talk(*AB, *AB)),
        ("lima", talk(*AB, *AB)),
        ("llava", talk(*AB, *AB)),
    ],
)
def test_a_reply_that_is_context_only_stays_so_in_every_format(tmp_path: Path, format: str, row: Any) -> None:
    turns = row.get("messages", row.get("conversations"))
    turns[1]["weight"], turns[3]["weight"] = 0, 1
    records, conversion = convert_rows(format, [row], tmp_path)
    if format == "llava":
        assert ([record["output"] for record in records], conversion.items) == (["b"], 1)
        records, conversion = convert_rows(format, [row], tmp_path, dialogues=True)
    item, _ = item_of(records[0], "dialogue")
    assert isinstance(item, Dialogue)
    assert [turn.trained for turn in item.turns] == [True, False, True, True]
    assert not conversion.unused
    turns[1]["weight"] = 0.5
    with pytest.raises(DataError, match=r"turn 2: 'weight' should be true or false, 1 or 0, but is 0\.5"):
        convert_rows(format, [row], tmp_path)


def test_replies_in_a_row_are_not_trained_in_part(tmp_path: Path) -> None:
    row = talk(*AB, ("gpt", "c"))
    row["conversations"][1]["train"] = False
    reason = "replies in a row, of which only some are to be trained on"
    assert convert_rows("sharegpt", [row], tmp_path)[1].skipped == {reason: 1}


def test_inputs_history_and_images_go_along(tmp_path: Path) -> None:
    dolly = {"instruction": "a", "context": "c", "response": "b", "category": "x"}
    squad = {"question": "a", "context": "c", "answer": "b", "id": 7}
    orca = {"id": "niv.1", "system_prompt": "S", "question": "a", "response": "b"}
    factory = {**ONE, "system": "", "history": [["x", "y"]], "images": ["a.jpg"]}
    for row, record, unused in [
        (dolly, {**ONE, "input": "c"}, {"category": 1}),
        (squad, {**ONE, "id": 7, "input": "c"}, {}),
        (orca, {**ONE, "id": "niv.1", "system": "S"}, {}),
        (factory, {**ONE, "history": [["x", "y"]], "images": ["a.jpg"]}, {}),
        ({"instruction": "a", "input": "c", "output": "b", "evolved": True}, {**ONE, "input": "c"}, {"evolved": 1}),
    ]:
        records, conversion = convert_rows("auto", [row], tmp_path)
        assert (records, conversion.unused) == ([record], unused)
    assert convert_rows("wizardlm", [{**ONE, "input": "c"}], tmp_path)[0] == [{**ONE, "input": "c"}]
    assert convert_rows("sharegpt", [talk(*AB, image="a.jpg", id=1)], tmp_path)[0] == [
        {"id": 1, "image": "a.jpg", **ONE_AB}
    ]
    pixels = talk(*AB, image={"bytes": "...", "path": None})
    assert convert_rows("sharegpt", [pixels], tmp_path)[1].skipped == {"has images that are not given by a path": 1}


def test_a_column_of_text_may_hold_its_turns_as_json(tmp_path: Path) -> None:
    for row, field in [
        (talk(*AB, id="x"), "conversations"),
        (messages(("user", "a"), ("assistant", "b")), "messages"),
        ({"conversations": ["a", "b"]}, "conversations"),
        ({**ONE, "history": [["x", "y"]]}, "history"),
    ]:
        as_text = {**row, field: json.dumps(row[field])}
        assert convert_rows("auto", [as_text], tmp_path)[0] == convert_rows("auto", [row], tmp_path)[0]
    with pytest.raises(DataError, match="'messages' should be a list, but is text"):
        convert_rows("openai", [{"messages": "[not JSON"}], tmp_path)


def test_keys_that_are_not_used_are_counted_with_those_of_turns(tmp_path: Path) -> None:
    rows = [talk(*AB, id=i, source="s", score=None) for i in range(3)]
    rows[0]["conversations"][1]["markdown"] = True
    skipped = talk(("human", "a"), other="x")
    _, conversion = convert_rows("sharegpt", [*rows, skipped], tmp_path)
    assert conversion.unused == {"source": 3, "conversations[].markdown": 1}
    mapping = {"instruction": "q", "output": "output"}
    assert convert_rows("jsonl", [{**ONE, "q": "x"}], tmp_path, mapping=mapping)[1].unused == {"instruction": 1}


def test_blank_rows_are_counted(tmp_path: Path) -> None:
    rows = [ONE, {"instruction": " ", "output": "", "id": 3}, {"instruction": None, "input": None, "output": None}]
    for format in ("alpaca", "jsonl", "wizardlm"):
        records, conversion = convert_rows(format, rows, tmp_path)
        assert (len(records), conversion.skipped) == (1, {"blank: no question and no answer": 2})


CHOSEN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "words", "becomes"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--map instruction=prompt --map output=chosen", ONE),
        (
            {**ONE, "output": "", "chosen": "b", "rejected": "c"},
            "--map instruction=instruction --map output=chosen",
            ONE,
        ),
        ({"prompt": "a", "chosen": CHOSEN, "rejected": CHOSEN}, "--map conversations=chosen", ONE_AB),
        ({"messages": CHOSEN, "chosen": CHOSEN, "rejected": CHOSEN}, "--map conversations=chosen", ONE_AB),
        ({"conversation_id": "x", "conversation": CHOSEN}, "--map conversations=conversation", ONE_AB),
        ({"text": "b", "url": "x"}, "--map output=text, for text without questions", {**ONE, "instruction": ""}),
        ({"body": "b", "n": 3}, "--map output=body, for text without questions", {**ONE, "instruction": ""}),
        ({"chosen": "Human: a", "rejected": "Human: b"}, None, None),
        ({**talk(("human", "a")), "chosen": AB[1], "rejected": AB[1]}, None, None),
        ({"completion": "b", "prompt": "a", "label": False}, None, None),
        ({**talk(*AB), "tools": "[{}]"}, None, None),
    ],
)
def test_what_is_no_known_format_is_told_a_mapping_that_works_or_none(
    tmp_path: Path, row: Any, words: str | None, becomes: Any
) -> None:
    with pytest.raises(UserError) as caught:
        write_items(conversion := Conversion(Request("auto", [written(tmp_path, row)])), Items(io.BytesIO(), LINES))
    assert not conversion.items
    if words is None:
        assert caught.value.hint is None
        assert "trained on" in caught.value.message
        return
    assert words in str(caught.value.hint)
    mapping = dict(word.split("=") for word in re.findall(r"--map ([^, ]+)", str(caught.value.hint)))
    assert convert_rows("jsonl", [row], tmp_path, mapping=mapping)[0] == [becomes]


def written(folder: Path, row: Any) -> Path:
    path = folder / "row.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    return path


def test_a_table_of_other_columns_is_told_a_mapping_that_works(tmp_path: Path) -> None:
    for columns, words in [
        ("question,answer", "--map instruction=question --map output=answer"),
        ("text", "--map output=text, for text without questions; train it with template: none"),
        ("prompt,chosen,rejected", "--map instruction=prompt --map output=chosen"),
    ]:
        table = tmp_path / "a.csv"
        table.write_text(f"{columns}\n{','.join('abc'[: columns.count(',') + 1])}\n", encoding="utf-8")
        with pytest.raises(DataError) as caught:
            read_items(table)
        assert words in str(caught.value.hint)
        mapping = dict(word.split("=") for word in re.findall(r"--map ([^, ]+)", words))
        [record] = convert_file("csv", table, mapping=mapping)[0]
        assert record["output"] == ("a" if columns == "text" else "b")
