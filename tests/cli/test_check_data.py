"""`llama-acc convert-data check` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from llama_acc.cli import console
from tests.cli.commands import QUICKSTART, complete, environment, invoke, refused, words
from tests.core.data.datasets import write

GOOD = {"instruction": "Name a town.", "output": "It is the town in which all of the people of the country live."}
CHECK = ("convert-data", "check")


def test_errors_end_with_2_after_all_was_reported_and_warnings_do_not(tmp_path: Path) -> None:
    bad = [GOOD, {**GOOD, "output": 7}, {"instuction": "x", "output": "y"}, GOOD, {**GOOD, "output": " "}]
    bad += [{"instruction": "", "output": ""}, {**GOOD, "output": "5", "source": "s", "\x1b[2J": 1}]
    path = write(tmp_path / "a.json", bad)
    result = invoke(*CHECK, path)
    assert result.exit_code == 2
    said = words(result.stdout)
    assert "error: missing fields: 1" in said
    assert "item 3: no 'instruction' (its keys: 'instuction', 'output'); did you mean 'instuction'?" in said
    assert "error: fields that are not text: 1 item 2: 'output' should be text, but is a number: 7" in said
    assert 'warning: empty replies: 1 item 5, output: an empty reply: " "' in said
    assert 'warning: exact duplicates: 1 item 4: the same as item 1: "Name a town."' in said
    assert "blank rows, left out: 1 item 6: no question and no answer" in said
    assert "not used: ␛[2J (1 item), source (1 item)" in said
    assert "left out 2 an error above" in said
    assert "2 of 7 items cannot be trained on" in result.stderr
    assert "data.on_error=skip" in result.stderr
    [file] = json.loads(invoke(*CHECK, path, "--json").stdout)["files"]
    assert (file["rows"], file["items"], file["unused_keys"]) == (7, 4, {"source": 1, "\x1b[2J": 1})
    assert invoke(*CHECK, write(tmp_path / "b.json", [GOOD] * 9)).exit_code == 0
    result = invoke(*CHECK, write(tmp_path / "c.json", [GOOD]))
    assert (result.exit_code, result.stderr) == (0, "")
    assert "c.json  1 single-turn item  prompt format alpaca" in result.stdout
    assert "\n  nothing wrong was found\n" in result.stdout
    assert "lengths in characters: min " in result.stdout


def test_the_first_of_many_findings_are_listed_and_with_all_all_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{**GOOD, "output": i} for i in range(150)])
    short, long = invoke(*CHECK, path), invoke(*CHECK, path, "--all").stdout
    assert short.stdout.count("should be text") == 5
    assert "... and 145 more (--all lists them)" in short.stdout
    assert "a.json  150 rows  prompt format alpaca" in short.stdout
    assert "llama-acc convert-data auto" in short.stderr
    assert long.count("should be text") == 150
    assert "more" not in long


def test_lengths_cuts_and_drops_with_a_tokenizer_and_a_picture_of_them(tmp_path: Path, tokenizer_path: Path) -> None:
    data = [GOOD, {"instruction": "go", "output": "the town " * 30}, {"instruction": "go " * 60, "output": "ok"}]
    flags = (
        "--tokenizer",
        tokenizer_path.parent,
        "--max-tokens",
        60,
        "--template",
        "none",
        "--plot",
        tmp_path / "p.png",
    )
    result = complete(*CHECK, write(tmp_path / "a.json", data), *flags)
    said = words(result.stdout)
    assert "items that are cut: 1 item 2, instruction: " in said
    assert "dropped 1 the prompt alone fills 60 tokens" in said
    assert "cut 1 longer than 60 tokens; they lose " in said
    assert "trained on 2 " in said
    assert "lengths in tokens: min " in said
    with Image.open(tmp_path / "p.png") as image:
        assert (image.format, image.size) == ("PNG", (960, 540))
    report = json.loads(invoke(*CHECK, tmp_path / "a.json", *flags, "--json", "--preview", 1).stdout)
    [file], [shown] = report["files"], report["preview"]
    assert (report["fatal"], file["dropped"], file["truncated"], file["max_tokens"]) == (0, 1, 1, 60)
    [cut], [gone] = (file["findings"][kind]["places"] for kind in ("cut", "no_label"))
    lost = file["truncated_tokens"]
    assert cut["where"] == "item 2"
    assert cut["message"] == f"{60 + lost} tokens: the last {lost} are cut, {lost} of them trained"
    assert "the first trained token is number " in gone["message"]
    assert ", and only 60 are kept" in gone["message"]
    assert shown["pieces"][0] == {"text": "<s>", "trained": False, "special": True}


def test_a_preview_marks_what_is_trained_and_what_only_looks_like_a_special_token(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.json", [{"instruction": "What is </s>?\x1b[2J", "output": "the end"}, GOOD])
    preview = (*CHECK, path, "--preview", 1, "--template", "none")
    for flags in ((), ("--tokenizer", tokenizer_path)):
        result = invoke(*preview, *flags)
        assert "example 1: a.json item 1 (trained tokens between ⟦ and ⟧)" in result.stdout
        assert "<s>What is \\</s>?␛[2J⟦the end</s>⟧" in result.stdout
        assert "example 2" not in result.stdout
    result = invoke(*preview, *flags, "--max-tokens", 30)
    assert "What is \\</s>?" in result.stdout
    assert "⟦</s>⟧" not in result.stdout
    monkeypatch.delenv("NO_COLOR", raising=False)
    with (tmp_path / "out").open("w") as file:
        terminal = Console(file=file, force_terminal=True, color_system="standard", width=300)
        monkeypatch.setattr(console, "out", terminal)
        assert invoke(*preview).exit_code == 0
    shown = (tmp_path / "out").read_text()
    assert "\x1b[1;35m<s>\x1b[0m" in shown
    assert "\x1b[32mthe end\x1b[0m" in shown
    assert "⟦" not in shown


def test_a_file_that_cannot_be_read_hides_neither_what_stands_before_nor_the_others(tmp_path: Path) -> None:
    """Of items that are there more than once both places are named, in another file, too."""
    rows = [{**GOOD, "instruction": f"{i}?"} for i in range(3)]
    broken = write(tmp_path / "a.json", json.dumps([rows[0], {**GOOD, "output": ""}])[:-1] + ', {"x": }]')
    table, same = write(tmp_path / "b.csv", "question,answer\na,b\n"), write(tmp_path / "c.json", [*rows, rows[1]])
    result = invoke(*CHECK, broken, table, same, write(tmp_path / "d.json", []), "--json")
    assert result.exit_code == 2
    assert "3 of 4 files cannot be read to the end" in result.stderr
    first, second, third, fourth = json.loads(result.stdout)["files"]
    assert [file["error"] is not None for file in (first, second, third, fourth)] == [True, True, False, True]
    assert "line 1" in first["error"]
    assert (first["items"], list(first["findings"])) == (2, ["empty_reply"])
    assert "found: question, answer" in second["hint"]
    found = [(place["where"], place["message"]) for place in third["findings"]["duplicate"]["places"]]
    assert found == [("item 1", "the same as item 1 of a.json"), ("item 4", "the same as item 2")]


def test_all_of_a_folder_is_checked_without_torch(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [GOOD])
    write(tmp_path / "b.jsonl", json.dumps({"conversations": [{"from": "human", "value": "Hi"}]}))
    program = (
        "import atexit, sys; from llama_acc.cli.app import main; "
        f"sys.argv = ['llama-acc', 'convert-data', 'check', {str(tmp_path)!r}, '--preview', '2']; "
        "atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", env=environment())
    result = done.stdout
    assert "b.jsonl  1 dialogue  prompt format dialogue" in result
    assert "example 2: b.jsonl item 1 (line 1)" in result
    assert result.endswith("False\n")


def test_a_run_finds_the_same_before_the_model_is_touched(tmp_path: Path) -> None:
    rows: list[Any] = [{"instruction": f"Name town {i}.", "output": f"Town {i}."} for i in range(8)]
    rows += [{"instruction": "x"}, rows[0], {**rows[1], "output": ""}, 7]
    path, held_out = write(tmp_path / "a.json", rows), write(tmp_path / "b.json", [rows[2], 3])
    output = tmp_path / "run"
    flags = (*QUICKSTART, "--data", path, "--output", output, f"data.validation.path={held_out}", "train.epochs=1")
    refused(
        invoke(*flags), "3 problems in the data", "a.json: item 9: no 'output'", "item 12: should be", output=output
    )
    refused(invoke(*flags, "data.on_error=ignore"), "data.on_error", "'stop' or 'skip'")
    missing = invoke(*flags, "data.on_error=skip", "data.validation.path=nowhere.json")
    refused(missing, "there is no data 'nowhere.json'", "give it with data.validation.path=FILE", output=output)
    result = complete(*flags, "data.on_error=skip")
    said = words(result.stderr)
    assert "10 items" in said
    assert ", 2 skipped" in said
    assert "empty replies: 1, exact duplicates: 1; see data.json" in said
    report = json.loads((output / "data.json").read_text())
    assert [place["where"] for place in report["files"][0]["skipped_items"]] == ["item 9", "item 12"]
    assert report["warnings"] == {"empty_reply": 1, "duplicate": 1}
    assert [place["where"] for place in report["validation"]["files"][0]["skipped_items"]] == ["item 2"]
    checked = json.loads(invoke(*CHECK, path, "--json").stdout)["files"][0]["findings"]
    found = checked["missing_field"]["places"] + checked["no_item"]["places"]
    assert found == report["files"][0]["skipped_items"]
    complete("finetune", "--output", output, "--resume", "--device", "cpu", "train.epochs=2")


def test_dialogues_for_a_single_turn_recipe_get_a_hint(dialogues: Path, tmp_path: Path) -> None:
    wrong = invoke(*CHECK, dialogues, "--format", "single_turn")
    assert wrong.exit_code == 2
    assert "hint: they are dialogues: data.sources.0.format=dialogue data.sources.0.template=dialogue" in wrong.stderr
    assert "(the format alone where the template is auto or a chat template)" in wrong.stderr
    assert f"llama-acc convert-data llava {dialogues}" in wrong.stderr
    assert "10 dialogues" in invoke(*CHECK, dialogues, "--format", "dialogue", "--template", "dialogue").stdout
    assert "10 single-turn items" in invoke(*CHECK, dialogues, "--format", "single_turn_llava").stdout
    complete("convert-data", "llava", dialogues, "--output", tmp_path / "all.json")
    assert invoke(*CHECK, tmp_path / "all.json", "--format", "single_turn").exit_code == 0


def test_images_are_opened(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "b.png").write_text("no picture")
    rows = [{**GOOD, "instruction": f"{i}?", "image": name} for i, name in enumerate(["a.png", "b.png", "c.png"])]
    path = write(tmp_path / "a.json", rows)
    lost = invoke(*CHECK, path)
    assert lost.exit_code == 2
    assert lost.stdout.count("the image was not found") == 3
    assert "--image-root DIR" in lost.stderr
    found = invoke(*CHECK, path, "--image-root", tmp_path / "pictures")
    assert found.exit_code == 2
    assert "images that cannot be opened: 2" in found.stdout
    assert 'item 3: the image was not found: "c.png"' in found.stdout
    assert "  1 image\n" in found.stdout
    assert invoke(*CHECK, path, "--no-images").exit_code == 0
