"""`data.on_error`: what cannot be trained on stops a run, or is skipped and told; it is never replaced."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_acc.core.data import checks
from llama_acc.core.data import load as load_module
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.findings import MOST_PROBLEMS
from llama_acc.core.data.load import OnError, load_dataset
from llama_acc.core.data.sources import Source
from llama_acc.core.errors import DataError, UserError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer

BAD: list[Any] = [7, {"instruction": "x"}, {"instruction": 1, "output": 2}]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


def good(count: int) -> list[Any]:
    return [{"instruction": f"go {i}", "output": f"the answer is {i}"} for i in range(count)]


def mixed(count: int) -> list[Any]:
    """Every fourth row is none."""
    return [BAD[i // 4 % 3] if i % 4 == 3 else row for i, row in enumerate(good(count))]


def write(path: Path, rows: list[Any], broken: bool = False) -> Path:
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text[:-1] if broken else text, encoding="utf-8")
    return path


def load(tokenizer: Tokenizer, *paths: Path, on_error: OnError = "skip", ratio: float = 1.0) -> Dataset:
    return load_dataset(
        [Source(str(p), template="none", ratio=ratio) for p in paths], tokenizer, 64, 0, on_error=on_error
    )


def texts(dataset: Dataset, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(dataset.document(i)[0]) for i in range(len(dataset))]


def test_what_is_skipped_is_told_with_place_and_reason_and_nothing_takes_its_place(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    dataset = load(tokenizer, write(tmp_path / "a.jsonl", mixed(12)))
    kept = [i for i in range(12) if i % 4 != 3]
    assert texts(dataset, tokenizer) == [f"go {i}the answer is {i}" for i in kept]
    assert [dataset.origin(i) for i in range(9)] == [f"a.jsonl item {i + 1}" for i in kept]
    report = dataset.report()
    [file] = report["files"]
    assert (report["items"], report["skipped"], file["skipped"], report["dropped"]) == (9, 3, 3, 0)
    assert [(place["where"], place["kind"], place["field"]) for place in file["skipped_items"]] == [
        ("item 4 (line 4)", "no_item", ""),
        ("item 8 (line 8)", "missing_field", "output"),
        ("item 12 (line 12)", "wrong_type", "instruction"),
        ("item 12 (line 12)", "wrong_type", "output"),
    ]
    assert file["skipped_items"][0]["message"] == "should be an object, but is a number"


def test_the_same_problems_stop_a_run_whether_they_were_cached_or_not(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", mixed(12))
    with pytest.raises(DataError) as fresh:
        load(tokenizer, path, on_error="stop")
    first = load(tokenizer, path)
    monkeypatch.setattr(load_module, "prepare_batches", None)  # from now on, all comes from the cache
    assert load(tokenizer, path).fingerprint() == first.fingerprint()
    with pytest.raises(DataError) as cached:
        load(tokenizer, path, on_error="stop")
    assert cached.value.problems == fresh.value.problems
    assert len(fresh.value.problems) == 4


def test_it_is_told_whether_rows_or_the_form_of_the_file_are_to_be_mended(tmp_path: Path, tokenizer: Tokenizer) -> None:
    some, all_wrong = write(tmp_path / "a.json", mixed(8)), write(tmp_path / "b.json", [{"question": "x"}] * 3)
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            load(tokenizer, some, on_error="stop")
        assert caught.value.hint == "mend them, or leave them out with data.on_error=skip"
        load(tokenizer, some)  # into the cache
    with pytest.raises(DataError) as caught:
        load(tokenizer, all_wrong, on_error="stop")
    assert caught.value.hint == f"if it is in a form of its own: llama-acc convert-data auto {all_wrong}"


def test_clean_data_is_the_same_either_way(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.json", good(5))
    stop, skip = (load(tokenizer, path, on_error=on_error).report() for on_error in ("stop", "skip"))
    assert stop == skip
    assert (stop["skipped"], stop["warnings"], stop["files"][0]["skipped_items"]) == (0, {}, [])


def test_a_file_that_cannot_be_read_to_its_end_stops_in_any_case(tmp_path: Path, tokenizer: Tokenizer) -> None:
    broken = write(tmp_path / "a.json", mixed(4), broken=True)
    with pytest.raises(UserError, match="is not JSON"):
        load(tokenizer, broken, write(tmp_path / "b.json", good(2)))


def test_nothing_but_what_is_skipped_is_nothing_to_train_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"no item in 3 rows, all skipped; the first: item 1: should be") as caught:
        load(tokenizer, write(tmp_path / "a.json", BAD))
    assert "llama-acc convert-data auto FILE" in str(caught.value.hint)
    with pytest.raises(UserError, match="of 1 item none has a label within 64 tokens; skipped: 3 rows"):
        load(tokenizer, write(tmp_path / "b.json", [*BAD, {"instruction": "so " * 99, "output": "x"}]))


def test_a_ratio_chooses_among_the_items(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with_bad = load(tokenizer, write(tmp_path / "a.json", mixed(40)), ratio=0.5)
    without = load(tokenizer, write(tmp_path / "b.json", [row for row in mixed(40) if row in good(40)]), ratio=0.5)
    assert texts(with_bad, tokenizer) == texts(without, tokenizer)
    report = with_bad.report()
    assert (report["items"], len(with_bad), report["skipped"]) == (15, 15, 10)


def test_warnings_are_counted_over_all_batches_in_any_number_of_processes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = mixed(60)
    rows[20] = rows[0]
    rows[40] = {"instruction": "go 41", "output": " "}
    path = write(tmp_path / "a.jsonl", rows)
    reports = []
    for batch, cores in ((1000, 1), (3, 1), (3, 2)):
        monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", "0")
        monkeypatch.setattr(load_module, "_BATCH", batch)
        monkeypatch.setattr(load_module, "_cores", lambda cores=cores: cores)
        reports.append(load(tokenizer, path).report())
    assert reports[1:] == reports[:1] * 2
    assert reports[0]["warnings"] == {"empty_reply": 1, "duplicate": 1}
    [file] = reports[0]["files"]
    assert file["warning_places"]["duplicate"][0]["where"] == "item 21"
    assert file["warning_places"]["empty_reply"][0]["where"] == "item 41 (line 41)"


def test_a_split_keeps_origins_with_skipped_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tokenizer, write(tmp_path / "a.json", mixed(12)))
    train, held = dataset.split(0.3, seed=1)
    origins = sorted(part.origin(i) for part in (train, held) for i in range(len(part)))
    assert origins == sorted(dataset.origin(i) for i in range(9))
    assert np.array_equal(np.sort(np.concatenate([train.lengths, held.lengths])), np.sort(dataset.lengths))


def test_a_file_in_which_all_is_wrong_is_not_read_to_its_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"what": "is this"}] * 5 * MOST_PROBLEMS)
    with pytest.raises(DataError, match=f"{MOST_PROBLEMS} problems in the data") as caught:
        load(tokenizer, path, on_error="stop")
    assert "reading ended after 1,000 problems" in str(caught.value.hint)
    assert caught.value.problems[-1].startswith(f"{path}: item {MOST_PROBLEMS // 2} ")


def test_of_any_number_of_skipped_items_the_first_are_told_and_all_are_counted(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    bad = [{"instruction": 1, "output": 2}] * MOST_PROBLEMS + [7] * 3
    path = write(tmp_path / "a.jsonl", [*bad, *good(4)])
    for _ in ("fresh", "from the cache"):
        dataset = load(tokenizer, path, ratio=0.5)
        assert len(dataset) == 2
        assert {dataset.where(i) for i in range(2)} <= {f"item {len(bad) + i}" for i in range(1, 5)}
        report = dataset.report()
        [file] = report["files"]
        assert (report["skipped"], file["skipped"]) == (len(bad), len(bad))
        assert file["skipped_kinds"] == {"wrong_type": 2 * MOST_PROBLEMS, "no_item": 3}
        assert len(file["skipped_items"]) == MOST_PROBLEMS
        assert file["skipped_items"][-1]["where"] == f"item {MOST_PROBLEMS // 2} (line {MOST_PROBLEMS // 2})"


@pytest.mark.parametrize("at_once", [1 << 20, 3])
def test_what_several_files_have_is_told_once_for_each_and_never_of_a_file_given_twice(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(checks, "_AT_ONCE", at_once)
    rows = good(8)
    a = write(tmp_path / "a.jsonl", rows[:4])
    b = write(tmp_path / "b.jsonl", [rows[6], rows[2], rows[6], rows[2], rows[5]])
    c = write(tmp_path / "c.json", [rows[7], rows[5], rows[0]])
    report = load(tokenizer, a, b, a, c).report()
    # In all 16 items, of which a's four are there twice as the user wants it; seven are different.
    assert report["warnings"] == {"duplicate": 16 - 4 - 7}
    files = {Path(file["path"]).name: file for file in report["files"]}
    told = {
        name: [(place["where"], place["message"]) for place in file["warning_places"].get("duplicate", ())]
        for name, file in files.items()
    }
    assert told == {
        "a.jsonl": [],
        "b.jsonl": [
            ("item 3", "the same as item 1"),
            ("item 4", "the same as item 2"),
            ("item 2", "the same as item 3 of a.jsonl"),
        ],
        "c.json": [("item 2", "the same as item 5 of b.jsonl"), ("item 3", "the same as item 1 of a.jsonl")],
    }
    assert files["c.json"]["warnings"] == {"duplicate": 2}


def test_blank_rows_are_left_out_and_counted_and_stop_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    table = tmp_path / "a.csv"
    table.write_text('instruction,output,source\ngo 0,the answer is 0,s\n  \n,,\n" ",,s\ngo 1,the answer is 1,\n')
    for on_error in ("stop", "skip", "stop"):
        dataset = load(tokenizer, table, on_error=on_error)
        assert texts(dataset, tokenizer) == ["go 0the answer is 0", "go 1the answer is 1"]
        report = dataset.report()
        [file] = report["files"]
        assert (report["items"], report["skipped"], file["skipped_kinds"]) == (2, 2, {"blank": 2})
        assert report["warnings"] == {"blank": 2}
        assert [place["where"] for place in file["warning_places"]["blank"]] == ["item 2 (line 4)", "item 3 (line 5)"]
        assert (file["skipped_items"], file["unused_keys"]) == ([], {"source": 1})
        assert dataset.origin(1) == "a.csv item 4"
    with pytest.raises(UserError, match="nothing to train on: 2 rows, all of them blank"):
        load(tokenizer, write(tmp_path / "b.json", [{"instruction": "", "output": None}] * 2))


def test_single_turn_items_are_dialogues_where_one_has_a_history(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{**row, "history": []} for row in good(3)]
    turns = [["first", "one"], ["second", "two"]]
    late = [*good(3), {**rows[0], "history": turns}]
    for number, (items, template) in enumerate(
        [(rows, "alpaca"), ([*rows, {**rows[0], "history": turns}], "dialogue"), (late, "alpaca")]
    ):
        path = write(tmp_path / f"{number}.json", items)
        dataset = load_dataset([Source(str(path))], tokenizer, 640, 0, on_error="skip")
        assert dataset.template.name == template
        assert dataset.report()["skipped"] == (items is late)
    dialogues = load_dataset([Source(str(path), format="dialogue")], tokenizer, 640, 0)
    asked = tokenizer.decode(dialogues.document(3)[0])
    for text in (
        "Human: first\n### Assistant: one\n",
        "Assistant: two\n### Human: go 0\n### Assistant: the answer is 0",
    ):
        assert text in asked
    with pytest.raises(DataError, match="turns before the instruction among single-turn items: use format: dialogue"):
        load(tokenizer, path, on_error="stop")
