"""Data that cannot be trained on is refused before the first step, every place of it named."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.commands import DRY, QUICKSTART, TINY, invoke, refused, run


def test_missing_data_is_named_with_the_nearest_file_and_how_to_give_it(
    tmp_path: Path, single_turn: Path, tokenizer_path: Path
) -> None:
    shutil.copy(single_turn, tmp_path / "towns.json")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("hello")
    for data, *said in (
        (tmp_path / "town.json", f"there is no data '{tmp_path / 'town.json'}'", "did you mean 'towns.json'?"),
        (tmp_path / "none", f"no data files in {tmp_path / 'none'}", ".json, .jsonl, .csv"),
    ):
        refused(invoke(*QUICKSTART, "--data", data, "--output", tmp_path / "run"), *said, output=tmp_path / "run")
    lima = ("finetune", "--recipe", "lima", TINY, "--tokenizer", tokenizer_path, "model.max_seq_len=4096", "--dry-run")
    refused(invoke(*lima), "there is no data 'lima'; looked for:", "--data FILE")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.json", b"", "empty.json is empty"),
        ("blank.jsonl", b"\n \n", "blank.jsonl is empty"),
        ("none.json", b"[]", "none.json holds no items"),
        ("one.json", b'{"instruction": "a",\n"output": "b"}', "but line 1 is not a whole value"),
        ("broken.json", b'[{"instruction": "a", }]', "broken.json is not JSON: line 1, column 2"),
        (
            "lines.jsonl",
            b'{"instruction": "a", "output": "b"}\nx\n',
            "lines.jsonl: item 2 (line 2), column 1: not JSON",
        ),
        ("nul.json", b'[{"instruction": "a\x00b", "output": "c"}]', "nul.json is not JSON: line 1, column 20"),
        ("latin.json", b'[{"instruction": "Gr\xf6\xdfe", "output": "c"}]', "latin.json is not UTF-8: byte 20 (line 1)"),
        ("utf16.json", "[]".encode("utf-16"), "utf16.json is not UTF-8"),
        ("deep.json", b"[" * 100_000, "deep.json is not JSON that can be read"),
        ("column.csv", b"instruction,answer\na,b\n", "line 1: no column 'output'"),
        ("cells.csv", b"instruction,output\na,b,c\n", "item 1 (line 2): 3 cells, but the header has 2"),
        ("paper.pdf", b"%PDF-1.4 \xe2\xe3\xcf\xd3", ".pdf is not a kind of data file"),
        ("notes", b"hello", "no suffix is not a kind of data file"),
        ("other.yaml", b"a: 1\n", "it should have one key, META"),
        ("meta.yaml", b"META: [{pth: a, type: text}]", "META entry 1: unknown key 'pth'"),
        (
            "image.json",
            b'[{"image": "a.png", "instruction": "a", "output": "b"}]',
            "the items have images, and this model has no vision encoder",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_its_place(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(invoke(*QUICKSTART, "--data", path, "--output", tmp_path / "run"), str(path), said, output=tmp_path / "run")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file that nobody can read")
def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "locked.json"
    path.symlink_to("/proc/self/mem")
    refused(invoke(*DRY, "--data", path), f"cannot read {path}: Input/output error")


def test_every_wrong_item_of_every_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "a"}, {"instruction": 3, "output": None}, "x"])
    )
    (tmp_path / "b.jsonl").write_text('{"instruction": "a", "output": "\\ud800"}\n')
    refused(
        invoke(*QUICKSTART, "--data", tmp_path, "--output", tmp_path / "run"),
        "5 problems in the data:",
        "a.json: item 2: no 'output' (its keys: 'instruction')",
        "a.json: item 3: 'instruction' should be text, but is a number",
        "a.json: item 3: 'output' is null",
        "a.json: item 4: should be an object, but is text",
        "b.jsonl: item 1 (line 1): 'output' has a lone surrogate (U+D800) at character 1",
        output=tmp_path / "run",
    )


def test_every_wrong_turn_of_a_dialogue_is_named(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "robot", "value": "b"}, {"from": "gpt"}, 3]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"conversations": turns}]))
    refused(
        invoke(*DRY, "data.sources.0.format=dialogue", "data.sources.0.template=dialogue", "--data", path),
        "item 1: turn 2: unknown role 'robot' in 'from': it is one of human,",
        "item 1: turn 3: no 'value' (its keys: 'from')",
        "item 1: turn 4: should be an object with 'from' and 'value', but is a number",
    )


def test_lengths_that_leave_nothing_or_do_not_fit_are_refused(single_turn: Path) -> None:
    cut = invoke(*DRY, "--data", single_turn, "data.max_tokens=3")
    refused(cut, "nothing to train on: of 10 items", "raise data.max_")
    refused(invoke(*DRY, "data.max_tokens=1000"), "data.max_tokens (1000) is more than the model's max_seq_len (256)")


def test_no_name_and_no_text_of_a_file_acts_on_the_terminal(tmp_path: Path) -> None:
    acts = "\x1b[31m\x9b5n\u202e"
    rows = [
        {"instruction": acts, "output": acts, acts: 1},
        {"instruction": "a", "output": ""},
        {"conversations": [{"from": acts, "value": acts}]},
        {"instruction": 1, "output": acts},
    ]
    table = f'instruction\toutput\n"{acts}\t{acts}\tc\nd"\tf\n'
    for name, content in (
        ("a.json", json.dumps(rows)),
        ("b.json", json.dumps(rows[:2])),
        ("c.json", "{"),
        ("d.tsv", table),
    ):
        path = tmp_path / f"{acts}{name}"
        path.write_text(content)
        for words in (
            ["convert-data", "check", path, "--preview", "1", "--all"],
            ["convert-data", "auto", path, "--preview", "2"],
            ["convert-data", "auto", path, "--output", tmp_path / f"{acts}{name}l"],
            *([[*DRY, "--data", path, "--output", tmp_path / acts], [*DRY, f"data.{acts}=1"]] if "b." in name else []),
        ):
            told = invoke(*words).output
            assert told
            assert not set(told) & set("\x1b\x9b\u202e"), (words, told)
    warned = run("convert-data", "check", path).stderr
    assert "holds tabs and line ends" in warned
    assert not set(warned) & set("\x1b\x9b\u202e")
