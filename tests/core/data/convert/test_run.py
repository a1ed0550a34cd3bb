"""Files in, one file out: whole or not at all, in memory for one item, and each row that is wrong by its place."""

import gzip
import json
import os
import resource
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_acc.core.data import read
from llama_acc.core.data.convert import run
from llama_acc.core.data.convert.formats import FORMATS, Options
from llama_acc.core.data.convert.run import Conversion, convert
from llama_acc.core.data.findings import MOST_PROBLEMS
from llama_acc.core.data.items import SingleTurn
from llama_acc.core.errors import DataError, RunError, UserError
from llama_acc.core.tokenizer import Tokenizer
from tests.core.data.convert.conversions import talk
from tests.core.data.reading import read_file

ITEM = {"instruction": 'a\u2028é\U0001f600"\\\n', "input": "", "output": "b"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(text: str) -> list[Any]:
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz", ".jsonl.zst", ".json.zst"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_output_is_what_its_name_says_and_finetune_reads_it(tmp_path: Path, suffix: str, count: int) -> None:
    source = write(tmp_path / "in.jsonl", [ITEM] * count or [{"code": "print()"}])
    contents = []
    for name in ("a", "b"):
        output = tmp_path / name / f"out{suffix}"
        conversion = Conversion("alpaca" if count else "gorilla", [source])
        convert(conversion, output)
        assert (conversion.items, os.listdir(output.parent)) == (count, [output.name])
        contents.append(output.read_bytes())
    assert contents[0] == contents[1], "the same input gives the same bytes"
    unpack = {".gz": gzip.decompress, ".zst": zstd.decompress}.get(output.suffix, bytes)
    text = unpack(contents[0]).decode("utf-8")
    assert (lines(text) if "jsonl" in suffix else json.loads(text)) == [ITEM] * count
    if count:
        assert read_file(output).items == [SingleTurn(**ITEM)] * count


@pytest.mark.parametrize(
    ("format", "rows", "said"),
    [
        ("wizardlm", [{"idx": 1, "Instruction": "a"}] * 2, "2: an instruction without an output, to test with"),
        ("alpaca", [{"text": "a"}, ITEM["output"]], "2: wrong; the first is"),
        ("alpaca", [], "in.jsonl is empty"),
    ],
)
def test_where_no_row_gives_an_item_nothing_is_written_and_the_reasons_are_told(
    tmp_path: Path, format: str, rows: list[Any], said: str
) -> None:
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    output.write_text("old", encoding="utf-8")
    with pytest.raises(UserError, match=said):
        convert(Conversion(format, [source], skip_problems=True), output)
    assert output.read_text(encoding="utf-8") == "old"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_a_symbolic_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    source, link = write(tmp_path / "in.jsonl", [ITEM]), tmp_path / "out.jsonl"
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to("elsewhere/items.jsonl")
    for _ in range(2):  # not there yet, and there
        convert(Conversion("alpaca", [source]), link)
        assert link.is_symlink()
        assert lines((tmp_path / "elsewhere/items.jsonl").read_text(encoding="utf-8")) == [ITEM]
        assert os.listdir(tmp_path / "elsewhere") == ["items.jsonl"]


def test_wrong_rows_come_together_and_nothing_is_written_or_they_are_left_out(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", [ITEM, {"instruction": "a"}, ITEM, 7]), tmp_path / "out.jsonl"
    with pytest.raises(DataError) as caught:
        convert(Conversion("alpaca", [source]), output)
    assert caught.value.problems == [
        f"{source}: item 2 (line 2): no 'output' (its keys: 'instruction')",
        f"{source}: item 4 (line 4): should be an object, but is a number",
    ]
    assert "--on-error skip" in str(caught.value.hint)
    assert os.listdir(tmp_path) == ["in.jsonl"]
    conversion = Conversion("alpaca", [source], skip_problems=True)
    convert(conversion, output)
    assert (conversion.rows, conversion.items, conversion.wrong) == (4, 2, 2)
    write(source, [{}] * (MOST_PROBLEMS + 5))
    with pytest.raises(DataError) as caught:
        convert(Conversion("alpaca", [source]), output)
    assert len(caught.value.problems) == MOST_PROBLEMS
    assert "reading ended after 1,000 problems" in str(caught.value.hint)
    write(source, [{"messages": [{"role": "user", "content": "a"}]}] * 3)
    with pytest.raises(DataError) as caught:
        convert(Conversion("alpaca", [source]), output)
    assert "this looks like openai, as its 'messages' have 'role'" in str(caught.value.hint)


def test_a_file_that_breaks_off_is_an_error_even_if_rows_may_be_left_out(tmp_path: Path) -> None:
    source = tmp_path / "in.json"
    source.write_text("[7, " + json.dumps(ITEM) + ", {", encoding="utf-8")
    for skip, problems in ((False, 2), (True, 1)):
        with pytest.raises(UserError) as caught:
            convert(Conversion("alpaca", [source], skip_problems=skip), tmp_path / "out.json")
        assert "is not JSON" in caught.value.message
        assert len(getattr(caught.value, "problems", [""])) == problems
    assert not (tmp_path / "out.json").exists()
    table = tmp_path / "a.csv"
    table.write_text('instruction,output\n1,2\n3\n4,"open\n5,6\n', encoding="utf-8")
    with pytest.raises(DataError) as told:
        list(Conversion("auto", [table]))
    assert [problem.removeprefix(f"{table}: ") for problem in told.value.problems] == [
        "item 2 (line 3): 1 cell, but the header has 2",
        "item 3 (line 4): not CSV: unexpected end of data",
    ]


@pytest.mark.parametrize(
    ("format", "row", "place"),
    [
        ("alpaca", {**ITEM, "output": "x\ud800"}, "'output' has a lone surrogate (U+D800)"),
        ("lima", {"conversations": ["a", "\udfff"]}, "turn 2 has a lone surrogate (U+DFFF)"),
        ("llava", {"\ud800": 1, "conversations": [{"from": "a"}] * 2}, "a field's name has a lone surrogate"),
    ],
)
def test_a_lone_surrogate_is_a_problem_of_its_field(tmp_path: Path, format: str, row: Any, place: str) -> None:
    source = write(tmp_path / "in.jsonl", [row])
    with pytest.raises(DataError) as caught:
        list(Conversion(format, [source], Options(reference=format == "llava")))
    assert place in caught.value.message


@pytest.mark.parametrize("name", ["out.txt", "out", "out.csv", "out.json.bz2", "out.json.zip", "out.txt.gz"])
def test_other_kinds_of_output_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="not a kind of file that is written"):
        convert(Conversion("alpaca", [write(tmp_path / "in.jsonl", [ITEM])]), tmp_path / name)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [ITEM] * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*out\.jsonl: File too large"):
            convert(Conversion("alpaca", [source]), tmp_path / "out.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_progress_is_in_the_bytes_of_each_file(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, [ITEM] * 10) for name in ("a.jsonl", "b.jsonl")]
    told: list[tuple[str, int, int]] = []
    convert(Conversion("alpaca", paths, progress=lambda *progress: told.append(progress)), tmp_path / "out.jsonl")
    size = paths[0].stat().st_size
    assert [(name, total) for name, _, total in told] == [(str(path), size) for path in paths]
    assert told[-1][1] == size


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    turns = [{"from": role, "value": "some words of a turn\n" * 40} for role in ("human", "gpt")]
    line = json.dumps({"conversations": turns}).encode()
    count = 20_000_000 // len(line)
    path = tmp_path / "in.json"
    path.write_bytes(b"[" + b",".join([line] * count) + b"]")
    conversion = Conversion("sharegpt", [path])
    tracemalloc.start()
    try:
        convert(conversion, tmp_path / "out.jsonl")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert conversion.items == count
    assert peak < 12 * 2**20, peak


WORDS = st.sampled_from(
    ["conversations", "items", "messages", "from", "value", "role", "content", "human", "gpt", "system", "user", "code",
     "instruction", "input", "output", "image", "id", "type", "text", "<p>a</p>", "Instruction:", "Output:", "<image>",
     "chat", "turn_1", "Human", "MOSS", "Commands"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS | st.text(st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=10,
)
TURN = st.fixed_dictionaries({}, optional={"from": WORDS, "value": VALUES, "role": WORDS, "content": VALUES})
ROWS = st.dictionaries(WORDS, VALUES | st.lists(TURN, max_size=4), max_size=5) | VALUES


@given(format=st.sampled_from(sorted(FORMATS)), rows=st.lists(ROWS, min_size=1, max_size=4), flag=st.booleans())
@settings(max_examples=100, deadline=None)
def test_whatever_a_row_is_it_gives_items_or_is_named(
    tmp_path_factory: pytest.TempPathFactory, format: str, rows: list[Any], flag: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    source, output = folder / "in.json", folder / "out.jsonl"
    source.write_text(json.dumps(rows))
    options = Options(all_forms=flag, dialogues=flag, reference=flag, keep_html=flag)
    conversion = Conversion(format, [source], options, skip_problems=True)
    count = len(list(conversion))
    assert conversion.rows == len(rows)
    assert all(problem.startswith(f"{source}: item ") for problem in conversion.problems)
    assert conversion.wrong + sum(conversion.skipped.values()) <= len(rows)
    if not count and format != "gorilla":
        with pytest.raises(UserError, match="nothing to train on"):
            convert(Conversion(format, [source], options, skip_problems=True), output)
        return
    convert(Conversion(format, [source], options, skip_problems=True), output)
    items = lines(output.read_text(encoding="utf-8"))
    assert len(items) == count
    if items and not (format == "llava" and flag):
        assert len(read_file(output).items) == len(items)


@given(content=st.binary(max_size=40), packed=st.sampled_from([b"", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"]))
@settings(max_examples=100, deadline=None)
def test_whatever_a_file_is_it_is_told_or_converted(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, packed: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "in"
    path.write_bytes(packed + content)
    with pytest.raises(UserError) as caught:
        list(Conversion("auto", [path]))
    assert str(path) in caught.value.message


def talks(count: int, **others: Any) -> list[dict[str, Any]]:
    """Rows in ShareGPT's format, each of which counts as HTML and has a key that is not used."""
    return [
        {
            "id": f"{number}",
            "extra": 1,
            **talk(("human", f"é{number}"), ("gpt", "<p>a</p>" * (number % 9 + 1))),
            **others,
        }
        for number in range(count)
    ]


def outcome(paths: list[Path], output: Path, skip: bool = False, **options: Any) -> Any:
    """The bytes that are written, or the error; and what is counted."""
    conversion = Conversion("sharegpt", paths, Options(**options), skip_problems=skip)
    try:
        convert(conversion, output)
        result: Any = output.read_bytes()
    except UserError as error:
        result = (error.message, error.hint)
    kinds = (conversion.skipped, conversion.notes, conversion.unused, conversion.problems)
    return result, conversion.rows, conversion.items, conversion.wrong, *kinds


def test_worker_processes_write_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    rows = talks(100)
    rows[40] = {"score": float("nan"), **rows[40]}  # which the fast reader refuses, and a first key of its own
    rows[50]["conversations"] = []
    as_lines = "".join(json.dumps(row) + "\n\n" for row in rows)
    contents = {
        "a.json": json.dumps(rows).encode(),
        "b.json": b"\xef\xbb\xbf" + json.dumps(rows, indent=2, ensure_ascii=False).encode() + b"\n",
        "c.jsonl": as_lines.encode(),
        "d.json": as_lines.removesuffix("\n\n").encode(),
        "e.json.gz": gzip.compress(json.dumps(rows).encode()),
    }
    paths = [tmp_path / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    by_rows = [item.line for item in Conversion("sharegpt", paths)]
    monkeypatch.setattr(read, "_BLOCK_OF_ROWS", 1000)
    asked = {"tokenizer": tokenizer, "max_tokens": 100}
    alone = outcome(paths, tmp_path / "alone.json")
    split = outcome(paths[:1], tmp_path / "split.json", **asked)
    assert alone[:4] == (b"[\n" + b",\n".join(by_rows) + b"\n]\n", 500, 495, 0)
    assert split[5]["single exchanges have more than 100 tokens, and would be cut"] == 99
    monkeypatch.setattr(run, "_LARGE", 1)
    monkeypatch.setattr(run, "cores", lambda: 2)
    monkeypatch.setattr(Conversion, "_of_rows", None)  # of this process
    assert outcome(paths, tmp_path / "together.json") == alone
    assert outcome(paths[:1], tmp_path / "together.json", **asked) == split


@pytest.mark.parametrize("skip", [False, True])
def test_worker_processes_leave_what_is_wrong_to_one_that_knows_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool
) -> None:
    nested, wrong, broken, deep = talks(100), talks(100), talks(100), talks(100)
    nested[50]["more"] = [7, {"id": 1}]  # which looks as a row's beginning
    wrong[60]["conversations"] = 7
    deep[30]["more"] = "\ud800"
    paths = [tmp_path / f"{number}.json" for number in range(4)]
    for path, rows in zip(paths, (nested, wrong, deep, broken), strict=True):
        path.write_text(json.dumps(rows), encoding="utf-8")
    paths[3].write_text(json.dumps(broken)[:-100], encoding="utf-8")
    monkeypatch.setattr(read, "_BLOCK_OF_ROWS", 1000)
    alone = [outcome(some, tmp_path / "alone.jsonl", skip) for some in (paths, paths[:3])]
    monkeypatch.setattr(run, "_LARGE", 1)
    monkeypatch.setattr(run, "cores", lambda: 2)
    assert [outcome(some, tmp_path / "together.jsonl", skip) for some in (paths, paths[:3])] == alone
    assert "1.json: item 61: 'conversations' should be a list" in alone[1][-1][0]
