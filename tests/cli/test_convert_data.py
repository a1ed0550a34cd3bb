"""`llama-acc convert-data FORMAT` as users type it."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llama_acc.cli.convert_data import SUBCOMMANDS
from tests.cli.commands import QUICKSTART, complete, invoke, start, wait_until, words
from tests.cli.terminal import Terminal

ROW = {"instruction": "name a town", "output": "a town", "extra": 1}
ITEM = {"instruction": "name a town", "input": "", "output": "a town"}
TALK = {
    "conversations": [{"from": "user", "value": "name a town"}, {"from": "chatgpt", "value": "<p>a <b>town</b></p>"}]
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_a_file_is_converted_and_counted_and_finetune_takes_it(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", ROW, ROW, ROW), tmp_path / "out.jsonl"
    result = invoke("convert-data", "alpaca", source, "--output", output)
    assert (result.exit_code, result.stderr) == (0, "not used: extra (3 items)\n")
    assert result.stdout == f"{output}: 3 items of 3 rows, {len(json.dumps(ITEM)) * 3 - 12} bytes\n"
    assert read(output) == [ITEM] * 3
    complete(*QUICKSTART, "--data", output, "--output", tmp_path / "run", "--dry-run", "--no-timing")
    assert json.loads((tmp_path / "run/data.json").read_text(encoding="utf-8"))["items"] == 3


def test_what_became_of_rows_is_reported(tmp_path: Path) -> None:
    odd = {"conversations": [{"from": "gpt", "value": "a"}]}
    source = write(tmp_path / "in.jsonl", TALK, odd, {"conversations": 1})
    result = complete("convert-data", "sharegpt", source, "--output", tmp_path / "o.jsonl", "--on-error", "skip")
    said = words(result.stderr)
    assert "skipped 1 row: no question with a reply" in said
    assert "turns had HTML or marks of the web page, which were cleaned: 1" in said
    assert "left out 1 row, as wrong:" in said
    assert "item 3 (line 3): 'conversations' should be a list, but is a number" in said
    assert "1 item of 3 rows" in result.stdout


def test_apibench_of_which_the_rule_knows_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.json", *[{"code": "{'Instruction': a, 'Output': b}"}] * 2)
    result = complete("convert-data", "gorilla", source, "--output", tmp_path / "out.json")
    for said in ("skipped 2 rows", "--all-forms", "there are no items"):
        assert said in result.stderr
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == []


def test_auto_says_how_it_knew_on_standard_error(tmp_path: Path) -> None:
    result = invoke("convert-data", "auto", write(tmp_path / "in.jsonl", TALK))
    assert [json.loads(line)["conversations"][1]["value"] for line in result.stdout.splitlines()] == ["a **town**"]
    assert f"{tmp_path / 'in.jsonl'}: sharegpt, as its 'conversations' have 'from' and 'value'" in words(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "rows", "code"), [(("-",), [ROW] * 2, 0), (("-", "--output", "-"), [ROW, {}, ROW], 2)]
)
def test_a_pipe_has_whole_lines_however_it_ends(arguments: tuple[str, ...], rows: list[Any], code: int) -> None:
    finished = invoke("convert-data", "alpaca", *arguments, input=json.dumps(rows))
    assert finished.exit_code == code
    assert [json.loads(line) for line in finished.stdout.removesuffix("\n").split("\n")] == [ITEM, ITEM]
    assert ("2 items of 2 rows" in finished.stderr) == (code == 0)


def test_columns_of_other_names_are_mapped_in_all_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("word,sense\na,b\n", encoding="utf-8")
    result = invoke("convert-data", "csv", tmp_path, "--map", "instruction=word", "--map", "output=sense")
    assert json.loads(result.stdout.splitlines()[0]) == {"instruction": "a", "input": "", "output": "b"}


def test_standard_output_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full, start("convert-data", "alpaca", "-", stdout=full) as process:
        _, said = process.communicate(json.dumps([ROW]), timeout=60)
    assert process.returncode == 1
    assert "cannot write to standard output: No space left on device" in said


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *[ROW] * 50_000)
    process = start("convert-data", "alpaca", source)
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline()) == ITEM
    process.stdout.close()
    assert process.wait(60) in (0, 1)
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


def test_stopped_it_leaves_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "in.jsonl"
    os.mkfifo(pipe)
    output = tmp_path / "out.jsonl"
    output.write_text("old", encoding="utf-8")
    process = start("convert-data", "alpaca", pipe, "--output", output)
    with pipe.open("w", encoding="utf-8") as file:
        file.write((json.dumps(ROW) + "\n") * 20_000)
        file.flush()
        wait_until(lambda: any(tmp_path.glob(".writing-*")), process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    assert output.read_text(encoding="utf-8") == "old"


def test_a_terminal_gets_a_bar_of_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *[ROW] * 40_000)
    with Terminal("convert-data", "alpaca", source, "--output", tmp_path / "out.jsonl", term="xterm") as terminal:
        terminal.expect("in.jsonl")
        terminal.expect("MiB")
        assert terminal.end() == 0
    assert "40,000 items of 40,000 rows" in terminal.seen
    with Terminal("convert-data", "alpaca", source, "--output", tmp_path / "out.jsonl", term="dumb") as terminal:
        assert terminal.end() == 0
    assert "\x1b" not in terminal.seen


def test_a_preview_shows_items_as_the_model_will_see_them(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", TALK, TALK, TALK)
    result = complete("convert-data", "sharegpt", source, "--preview", 2, "--output", tmp_path / "out.jsonl")
    assert result.stdout.count("### Assistant:⟦ a **town**") == 2
    assert f"{tmp_path / 'out.jsonl'} is not written" in words(result.stderr)
    assert os.listdir(tmp_path) == ["in.jsonl"]
    cut = ("--tokenizer", tokenizer_path, "--max-tokens", 40)
    assert "cut:" in invoke("convert-data", "sharegpt", source, "--preview", 1, *cut).stdout


def test_a_download_is_converted_to_where_finetune_finds_it(llama_acc_home: Path) -> None:
    raw = llama_acc_home / "data/gorilla/raw"
    raw.mkdir(parents=True)
    write(raw / "train.json", *[{"code": "###Instruction: name a town\n###Output: a town"}] * 3)
    output = llama_acc_home / "data/gorilla/gorilla.jsonl"
    for arguments in ((), ("gorilla",)):
        result = complete("convert-data", "gorilla", *arguments)
        assert result.stdout == f"{output}: 3 items of 3 rows, {output.stat().st_size} bytes\n"
        assert len(read(output)) == 3
        output.rename(raw.parent / "before.txt")
    (raw.parent / "before.txt").rename(output)
    assert invoke(*QUICKSTART, "--data", "gorilla", "--dry-run", "--no-timing").exit_code == 0


def test_a_download_that_finetune_reads_unchanged_gets_no_second_file_beside_it(llama_acc_home: Path) -> None:
    folder = llama_acc_home / "data/alpaca"
    folder.mkdir(parents=True)
    write(folder / "alpaca_gpt4_data.json", ROW, ROW)
    result = invoke("convert-data", "alpaca")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [ITEM, ITEM]
    assert os.listdir(folder) == ["alpaca_gpt4_data.json"]


def test_every_format_has_help_with_an_example() -> None:
    for format in SUBCOMMANDS:
        assert f"llama-acc convert-data {format} " in words(invoke("convert-data", format, "--help").stdout)
