"""Rows and items of data files: every form, packed or not, whole or damaged, in constant memory."""

import csv
import gzip
import io
import json
import os
import re
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_acc.core.data import json_array, read
from llama_acc.core.data.items import Dialogue, SingleTurn
from llama_acc.core.data.json_array import array_items
from llama_acc.core.data.read import Row, stream_rows, stream_rows_from
from llama_acc.core.data.sources import data_files
from llama_acc.core.data.templates import Turn
from llama_acc.core.errors import UserError
from tests.core.data.datasets import write
from tests.core.data.reading import read_file, read_items

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
TALK = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
# Values that arrive in pieces: numbers and words that are numbers and words before they end, escapes, surrogates.
CUTTABLE = [
    "-Infinity",
    "1.5e+30",
    "-0",
    "12",
    "true",
    "NaN",
    '"\\ud83d\\ude00\\"\\\\"',
    '"\\ud83d"',
    "[ ]",
    '"\u2028"',
]
# As `json.loads`, but for the NaN that pandas writes for an empty cell.
AS_READ = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name)).decode


def rows_of(content: bytes, suffix: str) -> list[Row]:
    return list(stream_rows_from(io.BytesIO(content), "a", suffix))


def problems_of(path: Path, format: str = "auto") -> str:
    with pytest.raises(UserError) as caught:
        read_items(path, format)
    return str(caught.value)


def elements(text: str, size: int) -> list[Any]:
    return list(array_items((text[begin : begin + size] for begin in range(0, len(text), size)), "a"))


@given(st.lists(JSON, max_size=4), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_an_array_in_pieces_is_the_array(values: list[Any], size: int, indent: int | None, ascii: bool) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii)
    assert repr(elements(text, size)) == repr(AS_READ(text))
    cuttable = "\n [" + " ,\n".join(CUTTABLE) + "]\r\n "
    assert repr(elements(cuttable, size)) == repr(AS_READ(cuttable))


@given(st.text(st.sampled_from('[]{}",:\\u1e.-tn \n'), max_size=12), st.integers(1, 14))
@settings(max_examples=400, deadline=None)
def test_what_is_not_json_is_refused_where_json_refuses_it(inside: str, size: int) -> None:
    text = "[" + inside
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        with pytest.raises(UserError, match=f"line {error.lineno}, column {error.colno}"):
            elements(text, size)
    else:
        assert repr(elements(text, size)) == repr(AS_READ(text))


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".json", b'[{"a": 1}, {"a": 2}]'),
        (".json", b'\n{"a": 1}\n\n{"a": 2}'),
        (".jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\n'),
        (".jsonl", b'[\n{"a": 1},\n{"a": 2}\n]'),
    ],
)
def test_rows_of_json_packed_or_not_whatever_the_name_says(
    tmp_path: Path, suffix: str, content: bytes, packed: str
) -> None:
    for name in (f"A{suffix}{packed}".upper(), f"a{suffix}"):
        (tmp_path / name).write_bytes(PACKED[packed](content))
        assert [row.value for row in stream_rows(tmp_path / name)] == [{"a": 1}, {"a": 2}]


def test_zstandard_may_begin_with_a_skippable_frame() -> None:
    # RFC 8878, 3.1.2: magic number 0x184D2A50 to 5F, the size, that many bytes; pzstd begins a file so.
    for magic in (0x184D2A50, 0x184D2A5F):
        frame = magic.to_bytes(4, "little") + (4).to_bytes(4, "little") + b"size"
        content = frame + zstd.compress(b"[1,") + frame + zstd.compress(b"2]")
        assert [row.value for row in rows_of(content, ".json")] == [1, 2]


def test_a_streams_kind_is_found_from_its_first_character() -> None:
    expected = {" [1]": [1], '\n{"a": 1}\n{}': [{"a": 1}, {}], "a\tb\n1\t2": [{"a": "1", "b": "2"}]}
    for content, values in expected.items():
        assert [row.value for row in stream_rows_from(io.BytesIO(content.encode()), "a")] == values


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_damaged_file_is_named(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    whole = PACKED[packed](b"".join(b'{"number": %d}\n' % (i * i * 7919 % 100_003) for i in range(20_000)))
    for content in (whole[:-20], whole[: len(whole) // 2], whole + b"rubbish"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path} is damaged: "):
            list(stream_rows(path))


@pytest.mark.parametrize(
    ("content", "words", "known"),
    [
        ("a,b".encode("utf-16"), "byte 0 (line 1)", "UTF-16"),
        ("é,b".encode("latin-1"), "byte 0 (line 1)", "ENCODING"),
        (b'\xef\xbb\xbf[\n"\xc3\xa9\xe9"]', "byte 8 (line 2)", "ENCODING"),
        (b'["\xf0\x9f\x98', "byte 2 (line 1)", "ENCODING"),
    ],
)
def test_what_is_not_utf8_is_told_with_its_place(content: bytes, words: str, known: str) -> None:
    for pack in PACKED.values():
        with pytest.raises(UserError) as refused:
            rows_of(pack(content), ".csv")
        assert refused.value.message == f"a is not UTF-8: {words} cannot be decoded"
        assert refused.value.hint == f"make it UTF-8: iconv -f {known} -t UTF-8 < FILE > NEW"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_text_is_decoded_across_blocks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BLOCK", size)
    text = "\ufeff[\n" + json.dumps("aé€😀" * 5, ensure_ascii=False) + "]"
    assert rows_of(text.encode(), ".json") == [Row("item 1", "aé€😀" * 5)]


def test_each_place_is_named() -> None:
    assert [row.where for row in rows_of(b"[1,\n\n2]", ".json")] == ["item 1", "item 2"]
    lines = rows_of(b'\n{}\n\n{"a"\n[]\n' + b"9" * 5000, ".jsonl")
    assert [(row.where, row.problem) for row in lines] == [
        ("item 1 (line 2)", None),
        ("item 2 (line 4), column 5", "not JSON: Expecting ':' delimiter"),
        ("item 3 (line 5)", None),
        ("item 4 (line 6)", lines[3].problem),
    ]
    assert "not JSON that can be read" in str(lines[3].problem)
    assert rows_of(b'a,b\r\n"1\r\n2",3\r\n\r\n4\r\n', ".csv") == [
        Row("item 1 (line 2)", {"a": "1\r\n2", "b": "3"}),
        Row("item 2 (line 5)", ["4"], "1 cell, but the header has 2"),
    ]


@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.zst", ".csv"])
def test_memory_does_not_grow_with_the_file_and_progress_is_in_its_bytes(tmp_path: Path, suffix: str) -> None:
    row = {"instruction": "name it " * 20, "output": "a reply of some length, with \u20ac\n" * 30}
    one = f"{row['instruction']}\tx" * 2 if suffix == ".csv" else json.dumps(row)
    one = one.replace("x", "reply " * 150)
    form, packed = suffix.split(".")[1], "." + suffix.split(".")[2] if suffix.count(".") > 1 else ""
    begins = {"json": ("[", ",\n", "]"), "jsonl": ("", "\n", ""), "csv": ("a\tb\tc\n", "\n", "")}
    before, between, after = begins[form]
    count = 20_000_000 // len(one)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKED[packed]((before + between.join([one] * count) + after).encode()))
    seen: list[int] = []
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_rows(path, progress=seen.append)) == count
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 * 2**20, peak
    assert seen == sorted(seen)
    assert seen[-1] == path.stat().st_size


def test_an_item_too_long_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (read, json_array):
        monkeypatch.setattr(module, "MAX_ITEM", 1 << 20)
    long = b'"' + b"a" * (5 << 20) + b'"'
    for content, suffix in ((b"[" + long + b"]", ".json"), (long, ".jsonl"), (long, ".csv")):
        with pytest.raises(UserError, match=r"longer than 1 Mi characters|field larger than field limit"):
            rows_of(content, suffix)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@given(cells=st.lists(st.text(st.sampled_from('ab",\u2028\x85\n\r '), max_size=4), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_csv_of_any_line_ends_in_any_pieces(end: str, cells: list[str]) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["x", "y"], *([cell, "1"] for cell in cells)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "BLOCK", 3)
        values = [row.value for row in rows_of(table.getvalue().encode(), ".csv")]
    assert values == [{"x": cell, "y": "1"} for cell in cells]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # quotes around every cell that needs them, as pandas and Excel write them: marks
        (['"a ""b"""\tc', '"d\ne"\tf'], [['a "b"', "c"], ["d\ne", "f"]]),
        # a quote out of place anywhere: all are characters
        (['"27 or 24"\tx', '"55 inch\ty', 'z\t5" wide'], [['"27 or 24"', "x"], ['"55 inch', "y"], ["z", '5" wide']]),
        # quotes that would make one row of three that are rows by themselves
        (['a\t"I left,', "b\trained", 'c\thome."'], [["a", '"I left,'], ["b", "rained"], ["c", 'home."']]),
        (["a\tb", "c"], [["a", "b"], "1 cell, but the header has 2"]),
    ],
)
def test_a_quote_in_a_tsv_is_a_character_unless_all_of_it_is_quoted(
    tmp_path: Path, lines: list[str], expected: list[Any]
) -> None:
    path = write(tmp_path / "a.tsv", "\n".join(["x\ty", *lines]) + "\n")
    assert [row.problem or list(row.value.values()) for row in stream_rows(path)] == expected


def test_a_cell_in_quotes_that_holds_tabs_and_line_ends_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.tsv", 'x\ty\na\tb\n"c\td\tg\ne"\tf\n')
    assert [row.value["x"] for row in stream_rows(path)] == ["a", "c\td\tg\ne"]
    assert f"{path}: item 2 (line 3): a cell in quotes holds tabs and line ends" in caplog.text


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([r'"Quote \"this\", please.","\"this\""', "a,b"], [['Quote "this", please.', '"this"'], ["a", "b"]]),
        ([r'"of two', r'lines, \"b\"",c'], [['of two\nlines, "b"', "c"]]),
        ([r'"one \"of\"', r'two",c', "d,e"], [['one "of"\ntwo', "c"], ["d", "e"]]),
        ([r'"C:\new",b'], [[r"C:\new", "b"]]),
        (['a,"open', "c,d", "e,f"], [(2, "unexpected end of data"), ["c", "d"], ["e", "f"]]),
        (['"say "hi" to', 'me",b', "c,d"], [(2, "up to line 3 no line is a row"), ["c", "d"]]),
        (['"a" b,c', "d,e"], [(2, "',' expected after"), ["d", "e"]]),
    ],
)
def test_a_quote_out_of_place_in_a_csv_costs_its_own_row_only(lines: list[str], expected: list[Any]) -> None:
    rows = rows_of("\n".join(["x,y", *lines, ""]).encode(), ".csv")
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        if isinstance(wanted, list):
            assert list(row.value.values()) == wanted
        else:
            assert f"(line {wanted[0]})" in row.where
            assert wanted[1] in str(row.problem)


def test_the_nan_of_an_empty_cell_is_null() -> None:
    for suffix, content in ((".json", b'[{"a": NaN, "b": [NaN, 1]}]'), (".jsonl", b'{"a": NaN, "b": [NaN, 1]}\n')):
        assert rows_of(content, suffix)[0].value == {"a": None, "b": [None, 1]}


def test_items_of_each_kind(tmp_path: Path) -> None:
    rows = [GOOD, {"instruction": "Go.", "output": "", "id": 7}, {**GOOD, "input": None, "image": None}]
    singles = [SingleTurn("Add.", "1 2", "3"), SingleTurn("Go.", None, ""), SingleTurn("Add.", None, "3")]
    assert read_items(write(tmp_path / "a.json", rows)) == singles
    roles = ["gpt", "human", "user", "assistant", "Human"]
    turns = [{"from": role, "value": str(i), "extra": 1} for i, role in enumerate(roles)]
    dialogue = json.dumps({"id": "x", "conversations": turns})
    ours = ["assistant", "human", "human", "assistant", "human"]
    expected = Dialogue([Turn(role, str(i)) for i, role in enumerate(ours)])
    assert read_items(write(tmp_path / "a.jsonl", f"{dialogue}\n\n")) == [expected]
    text = json.dumps({**GOOD, "output": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n"
    assert read_items(write(tmp_path / "b.jsonl", text))[0] == SingleTurn("Add.", "1 2", "a\u2028b\x85c")


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_csv_is_separated_by_tabs_commas_or_semicolons(tmp_path: Path, separator: str) -> None:
    rows = [["id", "instruction", "input", "output"], ["1", "Add.", "", '"two\nlines"'], [], ["2", "Go.", "x", '"a,b"']]
    path = write(tmp_path / "a.csv", "\n".join(separator.join(row) for row in rows) + "\n")
    assert read_items(path) == [SingleTurn("Add.", "", "two\nlines"), SingleTurn("Go.", "x", "a,b")]


def test_a_table_holds_dialogues_where_its_rows_have_a_history(tmp_path: Path) -> None:
    now = [Turn("human", "x"), Turn("assistant", "y")]
    path = write(tmp_path / "a.tsv", 'instruction\toutput\thistory\nx\ty\t[["a", "b"]]\nx\ty\t\n')
    assert read_items(path) == [Dialogue([Turn("human", "a"), Turn("assistant", "b"), *now]), Dialogue(now)]
    assert read_items(write(tmp_path / "b.csv", "instruction\toutput\nx\ty\n"), "dialogue") == [Dialogue(now)]


def test_a_folder_or_a_glob_stands_for_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.csv", "data.json", "README.md", "manifest.json", ".hidden.json", "a[1].json"):
        write(tmp_path / name, "x")
    (tmp_path / "sub.json").mkdir()
    assert [file.name for file in data_files(tmp_path)] == ["a.json", "a[1].json", "b.jsonl", "c.csv", "data.json"]
    globbed = [file.name for file in data_files(tmp_path / "*.jsonl")]
    assert globbed == ["b.jsonl"]
    assert data_files(tmp_path / "a[1].json") == [tmp_path / "a[1].json"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["README.md", "dataset_infos.json", "data/train-0.parquet", "x/y"], r"give \S*/hub/data$"),
        (["dataset_info.json", "state.json", "data-00000-of-00001.arrow"], r'load\("\S*/hub"\)\.to_parquet\('),
        (["dataset_dict.json", "train/state.json", "train/data-0.arrow"], r'load\("\S*/hub/train"\)'),
        (["x"], "it should hold .json"),
    ],
)
def test_a_folder_of_another_form_is_told_what_to_give(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        write(tmp_path / "hub" / name, "x")
    with pytest.raises(UserError) as caught:
        data_files(tmp_path / "hub")
    assert re.search(words, caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "", "is empty"),
        ("a.json", "[]", "holds no items"),
        ("a.jsonl", "\n \n", "is empty"),
        ("a.csv", "instruction\toutput\n", "holds no items"),
        ("a.json", '[{"a": 1},\n {"a": }]', "line 2, column 8"),
        ("a.json", '{"data": []}', "item 1 (line 1): no 'instruction' (its keys: 'data')"),
        ("a.json", '\n{"data":\n[]}', "an array of items, or an object in each line, but line 2 is not a whole value"),
        ("a.json", '"text"', "but line 1 is text"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", "[" + "9" * 5000 + "]", "not JSON"),
        ("a.jsonl", '{"a": 1}\n\n{"a"', "item 2 (line 3), column"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        ("a.csv", "\n<!DOCTYPE html>\n<html></html>", "is a web page"),
        ("a.docx", "x", ".docx is not a kind of data file"),
        ("a.zip", "x", "no suffix before .zip is not a kind of data file"),
        ("a", "x", "no suffix is not a kind of data file"),
        ("a.csv", "instuction\toutput\nx\ty\n", "line 1: no column 'instruction' ('instuction'?)"),
        ("a.csv", "instruction\toutput\toutput\nx\ty\tz\n", "column 'output' twice"),
        ("a.csv", 'instruction\toutput\n"x\ty\n', "not CSV"),
    ],
)
def test_files_that_hold_no_items(tmp_path: Path, name: str, content: str, words: str) -> None:
    message = problems_of(write(tmp_path / name, content))
    assert words in message
    assert str(tmp_path / name) in message


@pytest.mark.parametrize(
    ("first", "item", "words"),
    [
        (GOOD, 7, "item 2: should be an object, but is a number"),
        (GOOD, {"instruction": "x"}, "item 2: no 'output' (its keys: 'instruction')"),
        (GOOD, {**GOOD, "output": None}, "item 2: 'output' is null"),
        (GOOD, {**GOOD, "output": ["x"]}, "item 2: 'output' should be text, but is a list"),
        (GOOD, {**GOOD, "output": "ab\ud800"}, "'output' has a lone surrogate (U+D800) at character 3"),
        (GOOD, TALK, "a dialogue (it has 'conversations') among single-turn items"),
        (TALK, {"text": "x", "id": 1}, "item 2: no 'conversations' (its keys: 'text', 'id')"),
        (TALK, {"conversations": {}}, "should be a list of turns"),
        (TALK, {"conversations": ["x"]}, "turn 1: should be an object with 'from' and 'value', but is text"),
        (TALK, {"conversations": [{"value": "x"}]}, "turn 1: no 'from'"),
        (TALK, {"conversations": [{"from": "bard", "value": "x"}]}, "turn 1: unknown role 'bard'"),
    ],
)
def test_wrong_items_are_told_with_their_place(tmp_path: Path, first: Any, item: Any, words: str) -> None:
    assert words in problems_of(write(tmp_path / "a.json", [first, item]))


def test_all_that_is_wrong_with_a_file_comes_together(tmp_path: Path) -> None:
    message = problems_of(write(tmp_path / "a.json", [{}] * 100))
    assert "200 problems" in message
    assert "and 180 more" in message
    told = problems_of(write(tmp_path / "a.csv", 'instruction,output\n1\n2,3,4\n5,"open\n6,7\n'))
    for words in (
        "item 1 (line 2): 1 cell, but the header has 2",
        "item 2 (line 3): 3 cells",
        "item 3 (line 4): not CSV",
    ):
        assert words in told


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "alpaca_data.json", [GOOD])
    assert "did you mean 'alpaca_data.json'?" in problems_of(tmp_path / "alpaca_dta.json")
    assert "did you mean 'alpaca_data.json'?" in problems_of(tmp_path / "alpaca_data.csv")
    assert "there is no folder" in problems_of(tmp_path / "nowhere" / "a.json")
    assert "no file matches" in problems_of(tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    assert "no data files in" in problems_of(tmp_path / "empty")


def test_data_that_is_read_more_than_once_may_be_no_pipe(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.tar", "a.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="it is a pipe, and has to be a file: save what comes out of it first"):
            read_file(tmp_path / name)


def test_a_pipe_is_converted_as_it_comes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    writer = threading.Thread(target=(tmp_path / "a.csv").write_text, args=["x,y\n1,2\n"])
    writer.start()
    assert [row.value for row in stream_rows(tmp_path / "a.csv", progress=lambda read: None)] == [{"x": "1", "y": "2"}]
    writer.join()


ITEMS = [{"instruction": f"name the town {i}", "input": "", "output": f"town {i}"} for i in range(2500)]


def parquet(path: Path, table: Any, **options: Any) -> Path:
    pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(table, path, **options)
    return path


@pytest.fixture
def towns(tmp_path: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    return parquet(tmp_path / "train-00000-of-00001.parquet", arrow.Table.from_pylist(ITEMS), row_group_size=1000)


def test_a_parquet_file_gives_its_rows_in_order(towns: Path) -> None:
    rows = list(stream_rows(towns))
    assert [row.value for row in rows] == ITEMS
    assert [rows[0].where, rows[-1].where] == ["item 1", "item 2500"]
    assert data_files(towns.parent) == [towns]
    assert read_file(towns).kind == "single_turn"


def test_a_value_of_parquet_is_what_it_would_be_in_a_json_file(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    nan = float("nan")
    texts, numbers, json_text = arrow.list_(arrow.string()), arrow.list_(arrow.float64()), arrow.json_()
    sequence = arrow.struct({"role": texts, "score": numbers})  # datasets' Sequence of an object
    turns = [{"role": "user", "content": '["x", {"t": 1, "u": NaN}]'}, {"role": "assistant", "content": '"2"'}]
    stored = arrow.array([turns, []], arrow.list_(arrow.struct({"role": arrow.string(), "content": arrow.string()})))
    content = arrow.ExtensionArray.from_storage(json_text, stored.values.field("content"))
    in_structs = arrow.StructArray.from_arrays([stored.values.field("role"), content], names=["role", "content"])
    decoded = [{"role": "user", "content": ["x", {"t": 1, "u": None}]}, {"role": "assistant", "content": "2"}]
    scores = [{"role": "a", "score": 0.5}, {"role": "b", "score": None}]
    for column, expected in (
        (arrow.array(['{"a": [1.5, null]}', None, '"text"'], json_text), [{"a": [1.5, None]}, None, "text"]),
        (arrow.ListArray.from_arrays(stored.offsets, in_structs), [decoded, []]),
        (
            arrow.array([{"role": ["a", "b"], "score": [0.5, nan]}, {"role": [], "score": []}, None], sequence),
            [scores, [], None],
        ),
        (
            arrow.array([{"role": ["a"], "score": []}, {"role": None, "score": None}], sequence),
            [{"role": ["a"], "score": []}, {"role": None, "score": None}],
        ),
        (arrow.array([[("k", nan)], []], arrow.map_(arrow.string(), arrow.float64())), [{"k": None}, {}]),
        (arrow.array([0.5, nan, None]), [0.5, None, None]),
        (arrow.array(["a", "a"]).dictionary_encode(), ["a", "a"]),
    ):
        table = arrow.table({"first": arrow.array(range(len(column))), "column": column})
        assert [row.value["column"] for row in stream_rows(parquet(tmp_path / "a.parquet", table))] == expected
    broken = arrow.table({"a": arrow.array(["1", "{", "[]"], json_text)})
    first, second, third = stream_rows(parquet(tmp_path / "a.parquet", broken))
    assert (first.value, third.value) == ({"a": 1}, {"a": []})
    assert "should hold JSON" in str(second.problem)


def test_a_parquet_file_that_cannot_be_read_is_told(
    towns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrow = pytest.importorskip("pyarrow")
    no_text = parquet(tmp_path / "b.parquet", arrow.Table.from_pylist([{"a": "Add."}]), compression="none")
    no_text.write_bytes(no_text.read_bytes().replace(b"Add.", b"A\x9fd."))
    towns.write_bytes(towns.read_bytes()[:-100])
    for path in (towns, no_text):
        with pytest.raises(UserError, match=rf"{path} is damaged: ") as refused:
            list(stream_rows(path))
        assert "it may not have been copied or downloaded to its end" in (refused.value.hint or "")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="pyarrow, which reads them, is not installed") as refused:
        list(stream_rows(towns))
    assert refused.value.hint == "type: pip install pyarrow"


def zipped(path: Path, **members: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name.replace("__", "/").replace("_json", ".json"), text)
    return path


def test_a_zip_archive_of_one_file_is_read_as_that_file(tmp_path: Path) -> None:
    path = zipped(tmp_path / "items.json.zip", deep__items_json=json.dumps(ITEMS))
    seen: list[int] = []
    assert [row.value for row in stream_rows(path, progress=seen.append)] == ITEMS
    assert seen == sorted(seen)
    assert data_files(tmp_path) == [path]


def test_a_zip_archive_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = zipped(tmp_path / "items.json.zip", a_json="[]", b_json="[]")
    with pytest.raises(UserError, match="holds 2 files, and should hold one"):
        list(stream_rows(path))
    content = zipped(path, items_json=json.dumps(ITEMS)).read_bytes()
    # The archive's directory says to begin where the file does not reach: before its start.
    end = content.index(b"PK\x05\x06")
    far = content[: end + 16] + (10**6).to_bytes(4, "little") + content[end + 20 :]
    for damaged, words in (
        (content[:200], r"items\.json\.zip cannot be unpacked"),
        (far, r"items\.json\.zip cannot be unpacked"),
        (content[:300] + b"????" + content[304:], "is damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            list(stream_rows(path))
