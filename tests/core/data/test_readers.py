import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data.items import Dialogue, SingleTurn
from llama_acc.core.data.readers import data_files
from llama_acc.core.data.rows import stream_rows
from llama_acc.core.data.templates import Turn
from llama_acc.core.errors import UserError
from tests.core.data.reading import read_file, read_items

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
TALK = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def problems_of(path: Path, format: str = "auto") -> str:
    with pytest.raises(UserError) as caught:
        read_items(path, format)
    return str(caught.value)


def test_single_turn_items(tmp_path: Path) -> None:
    items = [GOOD, {"instruction": "Go.", "output": "", "id": 7}, {**GOOD, "input": None, "image": None}]
    assert read_items(write(tmp_path / "a.json", items)) == [
        SingleTurn("Add.", "1 2", "3"),
        SingleTurn("Go.", None, ""),
        SingleTurn("Add.", None, "3"),
    ]


def test_dialogues_keep_any_order_of_roles(tmp_path: Path) -> None:
    roles = ["gpt", "human", "user", "assistant", "Human"]
    turns = [{"from": role, "value": str(i), "extra": 1} for i, role in enumerate(roles)]
    path = write(tmp_path / "a.jsonl", json.dumps({"id": "x", "conversations": turns}) + "\n\n")
    ours = ["assistant", "human", "human", "assistant", "human"]
    assert read_items(path) == [Dialogue([Turn(role, str(i)) for i, role in enumerate(ours)])]


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(GOOD) + "\n" + json.dumps(GOOD))
    assert len(read_items(path)) == 2


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())
    assert len(read_items(path)) == 1


def test_json_lines_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({**GOOD, "output": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n")
    assert read_items(path)[0] == SingleTurn("Add.", "1 2", "a\u2028b\x85c")


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_csv_is_separated_by_tabs_commas_or_semicolons(tmp_path: Path, separator: str) -> None:
    rows = [["id", "instruction", "input", "output"], ["1", "Add.", "", '"two\nlines"'], [], ["2", "Go.", "x", '"a,b"']]
    path = write(tmp_path / "a.csv", "\n".join(separator.join(row) for row in rows) + "\n")
    assert read_items(path) == [SingleTurn("Add.", "", "two\nlines"), SingleTurn("Go.", "x", "a,b")]


def test_a_folder_stands_for_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.csv", "data.json", "README.md", "manifest.json", ".hidden.json"):
        write(tmp_path / name, "x")
    (tmp_path / "sub.json").mkdir()
    assert [file.name for file in data_files(tmp_path)] == ["a.json", "b.jsonl", "c.csv", "data.json"]
    globbed = [file.name for file in data_files(tmp_path / "*.json*")]
    assert globbed == ["a.json", "b.jsonl", "data.json", "manifest.json"]


def test_a_file_may_have_a_globs_characters_in_its_name(tmp_path: Path) -> None:
    assert data_files(write(tmp_path / "a[1].json", "x")) == [tmp_path / "a[1].json"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "", "is empty"),
        ("a.json", "[]", "holds no items"),
        ("a.jsonl", "\n \n", "is empty"),
        ("a.csv", "instruction\toutput\n", "holds no items"),
        ("a.json", '[{"a": 1},\n {"a": }]', "line 2, column 8"),
        ("a.json", '{"data": []}', "an object with the keys 'data'"),
        ("a.json", '"text"', "holds text"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", "[" + "9" * 5000 + "]", "not JSON"),
        ("a.jsonl", '{"a": 1}\n\n{"a"', "item 2 (line 3), column"),
        ("a.jsonl", "[\n{}\n]", "is .json"),
        ("a.txt", "x", ".txt is not a kind of data file"),
        ("a", "x", "no suffix is not a kind of data file"),
    ],
)
def test_files_that_hold_no_items(tmp_path: Path, name: str, content: str, words: str) -> None:
    message = problems_of(write(tmp_path / name, content))
    assert words in message
    assert str(tmp_path / name) in message


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (7, "item 2: should be an object, but is a number"),
        ({"instruction": "x"}, "item 2: no 'output' (its keys: 'instruction')"),
        ({"output": "x"}, "item 2: no 'instruction'"),
        ({**GOOD, "output": None}, "item 2: 'output' is null"),
        ({**GOOD, "output": ["x"]}, "item 2: 'output' should be text, but is a list"),
        ({**GOOD, "instruction": True}, "'instruction' should be text, but is true or false"),
        ({**GOOD, "input": 3}, "'input' should be text, but is a number"),
        ({**GOOD, "output": "ab\ud800"}, "'output' has a lone surrogate (U+D800) at character 3"),
        ({**GOOD, "image": {"path": "a.png"}}, "'image' should be a path or a list of paths, but holds an object"),
        (TALK, "a dialogue (it has 'conversations') among single-turn items"),
    ],
)
def test_wrong_single_turn_items(tmp_path: Path, item: Any, words: str) -> None:
    assert words in problems_of(write(tmp_path / "a.json", [GOOD, item, GOOD]))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"text": "x", "id": 1}, "item 2: no 'conversations' (its keys: 'text', 'id')"),
        ({"conversations": {}}, "should be a list of turns"),
        ({"conversations": None}, "'conversations' is null"),
        ({"conversations": ["x"]}, "turn 1: should be an object with 'from' and 'value', but is text"),
        ({"conversations": [{"value": "x"}]}, "turn 1: no 'from'"),
        ({"conversations": [{"from": "human"}]}, "turn 1: no 'value'"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, "turn 1: unknown role 'bard'"),
        ({"conversations": [{"from": "", "value": "x"}]}, "unknown role ''"),
        ({"conversations": [{"from": "human", "value": 1}]}, "'value' should be text, but is a number"),
        ({**TALK, "image": ["a.png", ""]}, "'image' should be a path or a list of paths, but holds text"),
    ],
)
def test_wrong_dialogues(tmp_path: Path, item: Any, words: str) -> None:
    assert words in problems_of(write(tmp_path / "a.json", [TALK, item]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("instuction\toutput\nx\ty\n", "line 1: no column 'instruction' ('instuction'?)"),
        ("instruction\toutput\toutput\nx\ty\tz\n", "column 'output' twice"),
        ("instruction\toutput\nx\ty\nx\n", "item 2 (line 3): 1 cell, but the header has 2"),
        ('instruction\toutput\n"x\ty\n', "not CSV"),
    ],
)
def test_wrong_csv(tmp_path: Path, content: str, words: str) -> None:
    assert words in problems_of(write(tmp_path / "a.csv", content))


def test_a_table_holds_dialogues_where_its_rows_have_a_history(tmp_path: Path) -> None:
    now = [Turn("human", "x"), Turn("assistant", "y")]
    path = write(tmp_path / "a.tsv", 'instruction\toutput\thistory\nx\ty\t[["a", "b"]]\nx\ty\t\n')
    assert read_items(path) == [Dialogue([Turn("human", "a"), Turn("assistant", "b"), *now]), Dialogue(now)]
    assert read_items(write(tmp_path / "b.csv", "instruction\toutput\nx\ty\n"), "dialogue") == [Dialogue(now)]


def test_the_format_can_be_required(tmp_path: Path) -> None:
    question = f"{GOOD['instruction']}\n\n{GOOD['input']}"
    one_exchange = Dialogue([Turn("human", question), Turn("assistant", GOOD["output"])])
    assert read_items(write(tmp_path / "a.json", [GOOD]), "dialogue") == [one_exchange]
    assert "no 'conversations'" in problems_of(write(tmp_path / "a.json", [{"text": "x"}]), "dialogue")
    assert "did you mean 'dialogue'" in problems_of(tmp_path / "a.json", "dialog")


def test_many_problems_are_counted(tmp_path: Path) -> None:
    message = problems_of(write(tmp_path / "a.json", [{}] * 100))
    assert "200 problems" in message
    assert "and 180 more" in message


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "alpaca_data.json", [GOOD])
    assert "did you mean 'alpaca_data.json'?" in problems_of(tmp_path / "alpaca_dta.json")
    assert "did you mean 'alpaca_data.json'?" in problems_of(tmp_path / "alpaca_data.csv")
    assert "there is no folder" in problems_of(tmp_path / "nowhere" / "a.json")
    assert "no file matches" in problems_of(tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    assert "no data files in" in problems_of(tmp_path / "empty")


def test_what_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('[\n"é"]'.encode("latin-1"))
    assert "not UTF-8: byte 3 (line 2)" in problems_of(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [GOOD]).chmod(0)
    assert "Permission denied" in problems_of(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("alpaca_5000.json", "single_turn", 5000),
        ("alpaca_data_cleaned_1000.json", "single_turn", 1000),
        ("lima_vicuna_format.json", "dialogue", 1029),
        ("sharegpt_example.json", "dialogue", 3),
        ("sharegpt_maths1k.jsonl", "dialogue", 1000),
    ],
)
def test_real_files(shared: Path, name: str, kind: str, count: int) -> None:
    file = read_file(shared / "assets/data" / name)
    assert (file.kind, len(file.items)) == (kind, count)


@pytest.mark.parametrize(("name", "count"), [("caption_blip_2k.json", 2183), ("llava_instruct_100.json", 100)])
def test_real_image_data_is_read_with_its_images(shared: Path, name: str, count: int) -> None:
    items = read_items(shared / "assets/data" / name)
    assert len(items) == count
    assert all(len(item.images) == 1 and item.images[0].endswith(".jpg") for item in items)


def test_where_a_table_breaks_off_what_is_wrong_before_is_told_too(tmp_path: Path) -> None:
    told = problems_of(write(tmp_path / "a.csv", 'instruction,output\n1\n2,3,4\n5,"open\n6,7\n'))
    assert "item 1 (line 2): 1 cell, but the header has 2" in told
    assert "item 2 (line 3): 3 cells, but the header has 2" in told
    assert "item 3 (line 4): not CSV" in told


def test_data_that_is_read_more_than_once_may_be_no_pipe(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.tar", "a.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="it is a pipe, and has to be a file: save what comes out of it first"):
            read_file(tmp_path / name)


def test_a_pipe_is_converted_as_it_comes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    writer = threading.Thread(target=(tmp_path / "a.csv").write_text, args=["x,y\n1,2\n"])
    writer.start()
    assert [row.value for row in stream_rows(tmp_path / "a.csv")] == [{"x": "1", "y": "2"}]
    writer.join()
