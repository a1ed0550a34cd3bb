import copy
import json
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data.convert.rules import Options
from llama_acc.core.data.convert.run import Request, convert
from llama_acc.core.errors import DataError
from tests.core.data.convert.conversions import convert_file, convert_rows, talk, turns_of

ROW = talk(
    ("human", "What is\nit?\n<image>"), ("gpt", "A cat.\n\nBlack."), ("human", "Sure?"), ("gpt", "Yes."),
    id="7", image="a.jpg", extra=1,
)  # fmt: skip


def test_each_question_is_an_item_with_its_new_lines(tmp_path: Path) -> None:
    records, _ = convert_rows("llava", [ROW], tmp_path)
    assert records == [
        {"id": "7", "image": "a.jpg", "instruction": "What is\nit?", "input": "", "output": "A cat.\n\nBlack."},
        {"id": "7", "image": "a.jpg", "instruction": "Sure?", "input": "", "output": "Yes."},
    ]


def test_whole_dialogues(tmp_path: Path) -> None:
    (record,), _ = convert_rows("llava", [ROW], tmp_path, dialogues=True)
    assert turns_of(record) == [
        ("human", "What is\nit?"), ("gpt", "A cat.\n\nBlack."), ("human", "Sure?"), ("gpt", "Yes."),
    ]  # fmt: skip
    assert (record["id"], record["image"]) == ("7", "a.jpg")


def reference(items: list[dict[str, Any]]) -> str:
    """The reference's tool, from its description: a copy of the item for every two turns, without marks and lines."""
    made = []
    for item in items:
        turns = item["conversations"]
        while len(turns) >= 2:
            two, turns = turns[:2], turns[2:]
            one = copy.deepcopy(item)
            one.pop("conversations")
            flat = [{k: "".join(v.split("<image>")).replace("\n", "") for k, v in turn.items()} for turn in two]
            made.append({**one, "conversations": flat})
    return json.dumps(made)


def test_reference_is_the_references_file_to_the_byte(tmp_path: Path) -> None:
    odd = talk(("human", "é\U0001f600 <image>\n"), ("gpt", "b"), ("human", "left over"), id=1, image="b.jpg")
    rows = [ROW, odd, {"conversations": []}]
    (tmp_path / "in.json").write_text(json.dumps(rows), encoding="utf-8")
    output = tmp_path / "out.json"
    convert(Request("llava", [tmp_path / "in.json"], options=Options(reference=True)), output)
    assert output.read_text(encoding="ascii") == reference(rows)


def test_the_real_data_as_the_reference_has_it(shared: Path, tmp_path: Path) -> None:
    for name in ("llava_instruct_100.json", "caption_blip_2k.json"):
        path, output = shared / "assets/data" / name, tmp_path / name
        convert(Request("llava", [path], options=Options(reference=True)), output)
        assert output.read_text(encoding="ascii") == reference(json.loads(path.read_text(encoding="utf-8")))


def test_the_real_data_keeps_all_its_turns(shared: Path) -> None:
    path = shared / "assets/data/llava_instruct_100.json"
    turns = [turn for item in json.loads(path.read_text(encoding="utf-8")) for turn in item["conversations"]]
    records, conversion = convert_file("llava", path)
    assert len(records) * 2 == len(turns)
    assert (conversion.skipped, conversion.notes) == ({}, {})
    written = [text for record in records for text in (record["instruction"], record["output"])]
    assert written == [
        t["value"].replace("<image>", "").strip() if "<image>" in t["value"] else t["value"] for t in turns
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"image": "a"}, "no 'conversations'"),
        ({"conversations": {}}, "'conversations' should be a list, but is an object"),
        (talk(("human", "a"), ("alien", "b")), "turn 2: unknown role 'alien'"),
        ({"conversations": ["a"]}, "turn 1: should be an object, but is text"),
        ({"conversations": [{"from": "gpt"}]}, "turn 1: no 'value'"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, row: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        convert_rows("llava", [row], tmp_path)
    assert f"item 1 (line 1): {problem}" in caught.value.problems[0]


def test_the_reference_needs_text_in_every_field_of_a_turn(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "n": 1}]}
    with pytest.raises(DataError, match="turn 2: 'n' should be text, but is a number"):
        convert_rows("llava", [row], tmp_path, reference=True)
