"""Parquet files and zip archives are data files like any other: the form much of Hugging Face's data has."""

import json
import zipfile
from pathlib import Path

import pytest

from llama_acc.core.data.readers import data_files
from llama_acc.core.data.rows import stream_rows
from llama_acc.core.errors import UserError
from tests.core.data.reading import read_file

ITEMS = [{"instruction": f"name the town {i}", "input": "", "output": f"town {i}"} for i in range(2500)]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "train-00000-of-00001.parquet"
    write_table(pyarrow.Table.from_pylist(ITEMS), path, row_group_size=1000)
    return path


def test_a_parquet_file_gives_its_rows_in_order(parquet: Path) -> None:
    rows = list(stream_rows(parquet))
    assert [row.value for row in rows] == ITEMS
    assert [rows[0].where, rows[-1].where] == ["item 1", "item 2500"]
    assert data_files(parquet.parent) == [parquet]
    assert read_file(parquet).kind == "single_turn"


def test_a_value_is_what_it_would_be_in_a_json_file(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    nan = float("nan")
    texts, numbers, json_text = arrow.list_(arrow.string()), arrow.list_(arrow.float64()), arrow.json_()
    sequence = arrow.struct({"role": texts, "score": numbers})
    turns = [{"role": "user", "content": '["x", {"t": 1, "u": NaN}]'}, {"role": "assistant", "content": '"2"'}]
    stored = arrow.array([turns, []], arrow.list_(arrow.struct({"role": arrow.string(), "content": arrow.string()})))
    content = arrow.ExtensionArray.from_storage(json_text, stored.values.field("content"))
    in_structs = arrow.StructArray.from_arrays([stored.values.field("role"), content], names=["role", "content"])
    for column, expected in (
        (
            arrow.array(['{"a": [1.5, null, "\u00e9"]}', None, '"text"'], json_text),
            [{"a": [1.5, None, "\u00e9"]}, None, "text"],
        ),
        (
            arrow.ListArray.from_arrays(stored.offsets, in_structs),
            [[{"role": "user", "content": ["x", {"t": 1, "u": None}]}, {"role": "assistant", "content": "2"}], []],
        ),
        # datasets' Sequence of an object
        (
            arrow.array([{"role": ["a", "b"], "score": [0.5, nan]}, {"role": [], "score": []}, None], sequence),
            [[{"role": "a", "score": 0.5}, {"role": "b", "score": None}], [], None],
        ),
        (
            arrow.array([{"role": ["a"], "score": []}, {"role": None, "score": None}], sequence),
            [{"role": ["a"], "score": []}, {"role": None, "score": None}],
        ),
        (arrow.array([[("k", nan)], []], arrow.map_(arrow.string(), arrow.float64())), [{"k": None}, {}]),
        (arrow.array([0.5, nan, None]), [0.5, None, None]),
        (arrow.array(["a", "a"]).dictionary_encode(), ["a", "a"]),
    ):
        path = tmp_path / "a.parquet"
        write_table(arrow.table({"first": arrow.array(range(len(column))), "column": column}), path)
        assert [row.value["column"] for row in stream_rows(path)] == expected


def test_a_cell_that_is_not_the_json_it_should_be_is_one_rows_problem(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "a.parquet"
    write_table(arrow.table({"a": arrow.array(["1", "{", "[]"], arrow.json_())}), path)
    first, second, third = stream_rows(path)
    assert (first.value, third.value) == ({"a": 1}, {"a": []})
    assert "should hold JSON" in str(second.problem)


def test_a_damaged_parquet_file_is_told(parquet: Path) -> None:
    parquet.write_bytes(parquet.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged") as refused:
        list(stream_rows(parquet))
    assert "it may not have been copied or downloaded to its end" in (refused.value.hint or "")


def test_without_pyarrow_a_parquet_file_says_what_to_install(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="pyarrow, which reads them, is not installed") as refused:
        list(stream_rows(parquet))
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
    assert seen[-1] <= path.stat().st_size
    assert data_files(tmp_path) == [path]


def test_an_archive_of_several_files_is_for_the_user_to_unpack(tmp_path: Path) -> None:
    path = zipped(tmp_path / "items.json.zip", a_json="[]", b_json="[]")
    with pytest.raises(UserError, match="holds 2 files, and should hold one"):
        list(stream_rows(path))


def test_a_damaged_archive_is_told(tmp_path: Path) -> None:
    path = zipped(tmp_path / "items.json.zip", items_json=json.dumps(ITEMS))
    content = path.read_bytes()
    path.write_bytes(content[:200])
    with pytest.raises(UserError, match=r"items\.json\.zip cannot be unpacked"):
        list(stream_rows(path))
    path.write_bytes(content[:300] + b"????" + content[304:])
    with pytest.raises(UserError, match="is damaged"):
        list(stream_rows(path))


def test_what_fuzzing_found_in_damaged_archives_is_told(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    damaged = tmp_path / "bad.parquet"
    write_table(pyarrow.Table.from_pylist([{"instruction": "Add.", "output": "3"}]), damaged, compression="none")
    damaged.write_bytes(damaged.read_bytes().replace(b"Add.", b"A\x9fd."))
    with pytest.raises(UserError, match=r"bad\.parquet is damaged: "):
        read_file(damaged)
    archive = tmp_path / "bad.json.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.json", "[{}]")
    data = archive.read_bytes()
    # The archive's directory says to begin where the file does not reach: before its start.
    end = data.index(b"PK\x05\x06")
    archive.write_bytes(data[:end] + data[end : end + 16] + (10**6).to_bytes(4, "little") + data[end + 20 :])
    with pytest.raises(UserError, match=r"bad\.json\.zip cannot be unpacked: "):
        read_file(archive)
