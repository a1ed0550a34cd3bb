import json
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.errors import DataError
from tests.core.data.convert.conversions import convert_file, convert_rows


def reference(path: Path) -> list[dict[str, str]]:
    """What the reference says of a file, written from its description: the text before "Output:" holds the question,
    behind "Instruction:" and up to "###"; the answer is what follows, up to another "Output:"."""
    items = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        code = json.loads(line)["code"].replace("###Instruction.", "###Instruction:")
        end = code.find("Output:")
        if end < 0:
            continue
        begin = code.index("Instruction:") + len("Instruction:")
        question = code[begin:end]
        second = question.find("Instruction:")
        question = question if second < 0 else question[:second]
        marks = question.find("###")
        question = question if marks < 0 else question[:marks]
        answer = code[end + len("Output:") :]
        again = answer.find("Output:")
        items.append({"instruction": question, "input": "", "output": answer if again < 0 else answer[:again]})
    return items


@pytest.mark.parametrize(
    ("name", "rows", "items"),
    [("huggingface_eval.json", 911, 907), ("torchhub_eval.json", 186, 186), ("torchhub_train.json", 837, 0)],
)
def test_apibench_by_the_references_rule(shared: Path, name: str, rows: int, items: int) -> None:
    path = shared / "assets/gorilla" / name
    records, conversion = convert_file("gorilla", path)
    assert (conversion.rows, len(records)) == (rows, items)
    assert sum(conversion.skipped.values()) == rows - items
    assert records == reference(path)


def test_all_forms_takes_all_of_torchhubs_training_data(shared: Path) -> None:
    records, conversion = convert_file("gorilla", shared / "assets/gorilla/torchhub_train.json", all_forms=True)
    assert (len(records), conversion.skipped) == (837, {})
    for record in records:
        assert record["instruction"].strip() == record["instruction"] != ""
        assert "'Output'" not in record["output"]
        assert record["output"].lstrip()[0] in "{'"
    # As many braces are closed as were opened, but in rows that break off.
    assert sum(r["output"].count("{") != r["output"].count("}") for r in records) <= 20


@pytest.mark.parametrize(
    ("code", "instruction", "output"),
    [
        ("###Instruction: a\n###Output: b\n", " a\n", " b\n"),
        ("###Instruction. a###Output:b", " a", "b"),
        ("###Instruction: a\n###Input: x\n###Output: b Output: c", " a\n", " b "),
        ("Instruction:a Instruction:b Output:", "a ", ""),
    ],
)
def test_the_rule_keeps_white_space_and_ends_where_it_ends(
    tmp_path: Path, code: str, instruction: str, output: str
) -> None:
    records, _ = convert_rows("gorilla", [{"code": code}], tmp_path)
    assert records == [{"instruction": instruction, "input": "", "output": output}]


@pytest.mark.parametrize(
    ("code", "instruction", "output"),
    [
        ("{'Instruction': Find it., 'Output': {'a': 1}}", "Find it.", " {'a': 1}"),
        ('{"Instruction": "Find, it", "Output":{"a": {}}}', "Find, it", '{"a": {}}'),
        ("{'Instruction': 'x', 'Output': {'a': 'breaks o", "x", " {'a': 'breaks o"),
        ("{'Instruction': 'x',\n 'Output': 'y'}\n", "x", " 'y'"),
    ],
)
def test_the_other_form(tmp_path: Path, code: str, instruction: str, output: str) -> None:
    row = {"code": code}
    assert convert_rows("gorilla", [row], tmp_path)[0] == []
    records, _ = convert_rows("gorilla", [row], tmp_path, all_forms=True)
    assert records == [{"instruction": instruction, "input": "", "output": output}]


def test_rows_without_an_item_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [{"code": "###Instruction: a"}, {"code": "{'Instruction': a, 'Output': b}"}, {"code": "x"}]
    _, conversion = convert_rows("gorilla", rows, tmp_path)
    assert sorted(conversion.skipped.values()) == [1, 2]
    assert any("--all-forms" in reason for reason in conversion.skipped)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "item 1 (line 1): no 'code' (its keys: none)"),
        ({"code": None}, "'code' is null"),
        ({"code": 1}, "'code' should be text, but is a number"),
        ({"code": "Output: b"}, "no 'Instruction:' before 'Output:' in 'code'"),
        ([], "should be an object, but is a list"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, row: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        convert_rows("gorilla", [row], tmp_path)
    assert problem in caught.value.problems[0]
