import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_acc.core.data import files
from llama_acc.core.data.items import SingleTurn
from llama_acc.core.data.json_array import array_items
from llama_acc.core.data.rows import Row, stream_rows, stream_rows_from
from llama_acc.core.errors import UserError
from tests.core.data.reading import read_file

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
    "{}",
    '"\u2028"',
]


def rows_of(content: bytes, suffix: str) -> list[Row]:
    return list(stream_rows_from(io.BytesIO(content), "a", suffix))


def pieces(text: str, size: int) -> Iterator[str]:
    return (text[begin : begin + size] for begin in range(0, len(text), size))


# As `json.loads`, but for the NaN that pandas writes for an empty cell.
AS_READ = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name)).decode


def elements(text: str, size: int) -> list[Any]:
    return list(array_items(pieces(text, size), "a"))


@given(st.lists(JSON, max_size=4), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_an_array_in_pieces_is_the_array(values: list[Any], size: int, indent: int | None, ascii: bool) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii)
    assert repr(elements(text, size)) == repr(AS_READ(text))


@pytest.mark.parametrize("size", range(1, 20))
def test_a_value_may_be_cut_anywhere(size: int) -> None:
    text = "\n [" + " ,\n".join(CUTTABLE) + "]\r\n "
    assert repr(elements(text, size)) == repr(AS_READ(text))


@given(st.text(st.sampled_from('[]{}",:\\u1e.-tn \n'), max_size=12), st.integers(1, 14))
@settings(max_examples=400, deadline=None)
def test_what_is_not_json_is_refused_where_json_refuses_it(inside: str, size: int) -> None:
    text = "[" + inside
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        with pytest.raises(UserError) as caught:
            elements(text, size)
        assert place in caught.value.message
    else:
        assert repr(elements(text, size)) == repr(AS_READ(text))


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".json", b'[{"a": 1}, {"a": 2}]'),
        (".json", b'\n{"a": 1}\n\n{"a": 2}'),
        (".jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\n'),
    ],
)
def test_rows_of_json(tmp_path: Path, suffix: str, content: bytes, packed: str) -> None:
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACKED[packed](content))
    assert [row.value for row in stream_rows(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("packed", PACKED)
def test_items_of_compressed_files(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"A.TSV{packed.upper()}"
    path.write_bytes(PACKED[packed](b'instruction\toutput\n"a,b"\tc\n'))
    assert read_file(path).items == [SingleTurn("a,b", None, "c")]


def test_compression_is_found_whatever_the_name_says() -> None:
    content = b'[{"a": 1}]'
    for pack in PACKED.values():
        packed = pack(content)
        assert rows_of(packed, ".json") == [Row("item 1", {"a": 1})]
        assert rows_of(packed + (pack(b" \n") if packed != content else b""), ".json") == [Row("item 1", {"a": 1})]


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


def test_of_another_encoding_it_is_told_how_to_leave_it() -> None:
    for content, known in (("a,b".encode("utf-16"), "UTF-16"), ("é,b".encode("latin-1"), "ENCODING")):
        with pytest.raises(UserError) as refused:
            rows_of(content, ".csv")
        assert refused.value.hint == f"make it UTF-8: iconv -f {known} -t UTF-8 < FILE > NEW"


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
    cells = rows_of(b'a,b\r\n"1\r\n2",3\r\n\r\n4\r\n', ".csv")
    assert cells == [
        Row("item 1 (line 2)", {"a": "1\r\n2", "b": "3"}),
        Row("item 2 (line 5)", ["4"], "1 cell, but the header has 2"),
    ]


def test_rows_before_what_cannot_be_read_arrive() -> None:
    rows = stream_rows_from(io.BytesIO(b"[1, 2,\n x]" + b" " * 100), "a", ".json")
    assert [next(rows).value, next(rows).value] == [1, 2]
    with pytest.raises(UserError, match="a is not JSON: line 2, column 2: Expecting value"):
        next(rows)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@given(cells=st.lists(st.text(st.sampled_from('ab",\u2028\x85\n\r '), max_size=4), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_csv_of_any_line_ends_in_any_pieces(end: str, cells: list[str]) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["x", "y"], *([cell, "1"] for cell in cells)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", 3)
        values = [row.value for row in rows_of(table.getvalue().encode(), ".csv")]
    assert values == [{"x": cell, "y": "1"} for cell in cells]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_text_is_decoded_across_blocks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", size)
    text = "\ufeff[\n" + json.dumps("aé€😀" * 5, ensure_ascii=False) + "]"
    assert rows_of(text.encode(), ".json") == [Row("item 1", "aé€😀" * 5)]
    with pytest.raises(UserError, match=r"a is not UTF-8: byte 8 \(line 2\)"):
        rows_of(b'\xef\xbb\xbf[\n"\xc3\xa9\xe9"]', ".json")
    with pytest.raises(UserError, match=r"a is not UTF-8: byte 2 \(line 1\)"):
        rows_of(b'["\xf0\x9f\x98', ".json")


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ".jsonl.zst", ".csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    row = {"instruction": "name it " * 20, "output": "a reply of some length, with \u20ac\n" * 30}
    text = row["output"].replace("\n", "\\n")
    one = f"{row['instruction']}\t{text}" if suffix == ".csv" else json.dumps(row)
    before, between, after = {
        ".json": ("[", ",\n", "]"),
        ".jsonl": ("", "\n", ""),
        ".csv": ("instruction\toutput\n", "\n", ""),
    }["." + suffix.split(".")[1]]
    count = 20_000_000 // len(one)
    pack = PACKED["." + suffix.split(".")[2] if suffix.count(".") > 1 else ""]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack((before + between.join([one] * count) + after).encode()))
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_rows(path)) == count
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 * 2**20, peak


def test_progress_is_told_in_bytes_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n" * 1000))
    told: list[int] = []
    assert len(list(stream_rows(path, progress=told.append))) == 1000
    assert told == sorted(told)
    assert told[-1] == path.stat().st_size


def test_an_item_too_long_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json_array", "rows"):
        monkeypatch.setattr(f"llama_acc.core.data.{name}.MAX_ITEM", 1 << 20)
    long = b'"' + b"a" * (5 << 20) + b'"'
    for content, suffix in ((b"[" + long + b"]", ".json"), (long, ".jsonl"), (long, ".csv")):
        with pytest.raises(UserError, match=r"longer than 1 Mi characters|field larger than field limit"):
            rows_of(content, suffix)


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
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(["x\ty", *lines]) + "\n", encoding="utf-8")
    assert [row.problem or list(row.value.values()) for row in stream_rows(path)] == expected


def test_a_cell_in_quotes_that_holds_tabs_and_line_ends_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('x\ty\na\tb\n"c\td\tg\ne"\tf\n', encoding="utf-8")
    assert [row.value["x"] for row in stream_rows(path)] == ["a", "c\td\tg\ne"]
    assert f"{path}: item 2 (line 3): a cell in quotes holds tabs and line ends" in caplog.text


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([r'"Quote \"this\", please.","\"this\""', "a,b"], [['Quote "this", please.', '"this"'], ["a", "b"]]),
        ([r'"of two', r'lines, \"b\"",c'], [['of two\nlines, "b"', "c"]]),
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


def test_zstandard_may_begin_with_a_skippable_frame() -> None:
    # RFC 8878, 3.1.2: magic number 0x184D2A50 to 5F, the size, that many bytes; pzstd begins a file so.
    for magic in (0x184D2A50, 0x184D2A5F):
        frame = magic.to_bytes(4, "little") + (4).to_bytes(4, "little") + b"size"
        content = frame + PACKED[".zst"](b"[1,") + frame + PACKED[".zst"](b"2]")
        assert [row.value for row in rows_of(content, ".json")] == [1, 2]
