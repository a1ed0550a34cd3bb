"""Sources to a dataset: what is used, what is left out and counted, what stops a run, what is the same again."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llama_acc.core.data import checks
from llama_acc.core.data import dataset as module
from llama_acc.core.data.cache import EntryStore
from llama_acc.core.data.dataset import load_published, publish
from llama_acc.core.data.findings import MOST_PROBLEMS, Finding
from llama_acc.core.data.sources import Source
from llama_acc.core.errors import DataError, UserError
from llama_acc.core.tokenizer import Tokenizer
from tests.core.data.datasets import BAD, good, load, mixed, origins, plain, refused, singles, talks, texts, write


def two_files(folder: Path) -> list[Path]:
    long = [{"instruction": "x " * 600, "output": "y"}, *singles(1, "long " * 600)]
    return [write(folder / "a.json", [*singles(3), *long]), write(folder / "b.json", talks(4))]


def test_files_are_joined_and_the_report_adds_up(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tokenizer, *two_files(tmp_path))
    assert [origins(dataset)[i] for i in (0, 3, 4, 7)] == [
        *("a.json item 1", "a.json item 5", "b.json item 1", "b.json item 4"),
    ]
    documents = [dataset.document(i) for i in range(len(dataset))]
    assert [len(tokens) for tokens, _ in documents] == dataset.lengths.tolist()
    assert [labeled.sum() for _, labeled in documents] == dataset.label_counts.tolist()
    report = json.loads(json.dumps(dataset.report()))
    first, second = report["files"]
    assert list(report) == [
        *("format_version", "items", "tokens", "label_tokens", "truncated", "dropped", "lengths"),
        *("skipped", "warnings", "template", "files"),
    ]
    assert (first["items"], first["truncated"], first["dropped"], first["template"]) == (5, 1, 1, "alpaca")
    assert (second["items"], second["truncated"], second["dropped"], second["template"]) == (4, 0, 0, "dialogue")
    assert first["path"] == str(tmp_path / "a.json")
    for key in ("items", "tokens", "label_tokens", "truncated", "dropped"):
        assert report[key] == first[key] + second[key]
    assert report["items"] == len(dataset) + report["dropped"]
    assert (report["tokens"], report["label_tokens"]) == (dataset.tokens, dataset.label_tokens)
    assert list(report["lengths"]) == ["min", "p25", "p50", "p75", "p95", "p99", "max"]
    assert (report["lengths"]["min"], report["lengths"]["max"]) == (dataset.lengths.min(), 512)
    assert report["template"] == ["alpaca", "dialogue"]
    assert dataset.template.name == "alpaca"


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_dialogues_in_the_place_of_single_turn_items_are_told_what_they_may_be(
    on_error: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = str(write(tmp_path / "b.json", talks(4)))
    error = refused(tokenizer, Source(path, format="single_turn"), on_error=on_error)
    assert "among single-turn items" in error.message
    assert "they are dialogues: data.sources.0.format=dialogue data.sources.0.template=dialogue" in str(error)
    error = refused(tokenizer, Source(path, template="alpaca"), on_error=on_error)
    assert "b.json: template 'alpaca' is for single-turn items, but these are dialogues" in error.message
    assert "or format: single_turn_llava" in str(error.hint)
    taken = load(tokenizer, Source(path, format="single_turn_llava"), on_error=on_error)
    assert (len(taken), taken.template.name) == (4, "alpaca")
    # One among items is a mistake in the file.
    if on_error == "stop":
        error = refused(tokenizer, write(tmp_path / "a.json", [*singles(1), *talks(1)]))
        assert "among single-turn items" in error.message
        assert "single_turn_llava" not in str(error.hint)


def test_encoding_twice_is_reading_the_cache_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = two_files(tmp_path)
    told: list[tuple[str, int, float]] = []
    first = load(tokenizer, *sources, progress=lambda *args: told.append(args))
    assert told == [("a.json", 5, 1.0), ("b.json", 4, 1.0)]
    monkeypatch.setattr(module, "encode_batches", None)
    again = load(tokenizer, *sources)
    assert again.report() == first.report()
    assert again.fingerprint() == first.fingerprint()
    with pytest.raises(TypeError):
        load(tokenizer, *sources, max_tokens=511)


def test_the_fingerprint_is_of_tokens_labels_and_order_however_files_are_cut(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    sources = two_files(tmp_path)
    prints = {
        load(tokenizer, *sources).fingerprint(),
        load(tokenizer, *reversed(sources)).fingerprint(),
        load(tokenizer, *sources, max_tokens=256).fingerprint(),
        load(tokenizer, sources[1]).fingerprint(),
    }
    assert len(prints) == 4
    assert load(tokenizer, write(tmp_path / "copy.json", talks(4))).fingerprint() in prints
    whole = load(tokenizer, write(tmp_path / "whole.json", singles(10)))
    write(tmp_path / "shards/1.json", singles(10)[:3])
    write(tmp_path / "shards/2.json", singles(10)[3:])
    shards = load(tokenizer, tmp_path / "shards")
    assert shards.fingerprint() == whole.fingerprint()
    assert shards.select(np.arange(9)).fingerprint() != whole.fingerprint()
    assert shards.select(np.array([1, 0, *range(2, 10)])).fingerprint() != whole.fingerprint()


def test_a_ratio_takes_a_fixed_part_of_the_items(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = str(write(tmp_path / "a.json", singles(100)))
    part = load(tokenizer, Source(path, ratio=0.3))
    assert (len(part), part.report()["items"], part.report()["dropped"]) == (30, 30, 0)
    assert part.fingerprint() == load(tokenizer, Source(path, ratio=0.3)).fingerprint()
    assert part.fingerprint() != load(tokenizer, Source(path, ratio=0.3), seed=1).fingerprint()
    both = origins(load(tokenizer, Source(path, ratio=0.3), Source(path, ratio=0.3)))
    assert both[:30] == origins(part) != both[30:]
    dropped = [*singles(5), *[{"instruction": "x " * 600, "output": "y"}] * 5]
    report = load(tokenizer, Source(str(write(tmp_path / "b.json", dropped)), ratio=0.8)).report()
    assert report["items"] == 8
    assert 3 <= report["dropped"] <= 5
    with_bad = plain(tokenizer, write(tmp_path / "c.json", mixed(40)), ratio=0.5)
    without = plain(tokenizer, write(tmp_path / "d.json", [row for row in mixed(40) if row in good(40)]), ratio=0.5)
    assert texts(with_bad, tokenizer) == texts(without, tokenizer)
    assert (with_bad.report()["items"], len(with_bad), with_bad.report()["skipped"]) == (15, 15, 10)


def test_nothing_to_train_on_says_why(tmp_path: Path, tokenizer: Tokenizer) -> None:
    silent = write(tmp_path / "a.json", [{"conversations": [{"from": "human", "value": "hello?"}]}])
    assert refused(tokenizer, silent).message == "nothing to train on: of 1 item none has a label within 512 tokens"
    report = load(tokenizer, silent, write(tmp_path / "b.json", singles(2))).report()
    assert next((file["items"], file["dropped"], file["lengths"]) for file in report["files"]) == (1, 1, {})
    with pytest.raises(UserError, match=r"no item in 3 rows, all skipped; the first: item 1: should be") as caught:
        plain(tokenizer, write(tmp_path / "c.json", BAD))
    assert "llama-acc convert-data auto FILE" in str(caught.value.hint)
    with pytest.raises(UserError, match="of 1 item none has a label within 64 tokens; skipped: 3 rows"):
        plain(tokenizer, write(tmp_path / "d.json", [*BAD, {"instruction": "so " * 99, "output": "x"}]))
    with pytest.raises(UserError, match="nothing to train on: 2 rows, all of them blank"):
        plain(tokenizer, write(tmp_path / "e.json", [{"instruction": "", "output": None}] * 2))


def test_what_is_skipped_is_told_with_place_and_reason_and_nothing_takes_its_place(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    dataset = plain(tokenizer, write(tmp_path / "a.jsonl", mixed(12)))
    kept = [i for i in range(12) if i % 4 != 3]
    assert texts(dataset, tokenizer) == [f"go {i}the answer is {i}" for i in kept]
    assert origins(dataset) == [f"a.jsonl item {i + 1}" for i in kept]
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
    path, other = write(tmp_path / "a.jsonl", mixed(12)), write(tmp_path / "b.json", [{"question": "x"}] * 3)
    fresh = refused(tokenizer, Source(str(path), template="none"), max_tokens=64)
    assert fresh.hint == "mend them, or leave them out with data.on_error=skip"
    both = refused(tokenizer, path, other)
    assert isinstance(both, DataError)
    assert {problem.split(": item")[0] for problem in both.problems} == {str(path), str(other)}
    hint = f"if it is in a form of its own: llama-acc convert-data auto {other} --output NEW.jsonl"
    assert refused(tokenizer, other).hint == hint
    tools = write(tmp_path / "tools.json", [{"turns": [], "tools": [{"name": "f"}]}])
    assert f"llama-acc convert-data auto {tools}" in str(refused(tokenizer, tools).hint)
    dialogues = Source(str(write(tmp_path / "c.json", [*talks(1), {"conversations": []}])), "single_turn")
    assert "they are dialogues: data.sources.0.format=dialogue" in str(refused(tokenizer, dialogues).hint)
    first = plain(tokenizer, path)
    monkeypatch.setattr(module, "encode_batches", None)  # from now on, all comes from the cache
    assert plain(tokenizer, path).fingerprint() == first.fingerprint()
    cached = refused(tokenizer, Source(str(path), template="none"), max_tokens=64)
    assert isinstance(fresh, DataError)
    assert isinstance(cached, DataError)
    assert (cached.problems, cached.hint, len(fresh.problems)) == (fresh.problems, fresh.hint, 4)


def test_clean_data_is_the_same_either_way_and_a_broken_file_stops_in_any_case(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "a.json", good(5))
    stop, skip = (plain(tokenizer, path, on_error=on_error).report() for on_error in ("stop", "skip"))
    assert stop == skip
    assert (stop["skipped"], stop["warnings"], stop["files"][0]["skipped_items"]) == (0, {}, [])
    broken = write(tmp_path / "b.json", json.dumps(mixed(4))[:-1])
    with pytest.raises(UserError, match="is not JSON"):
        plain(tokenizer, broken, path)
    told = str(refused(tokenizer, broken))
    assert "b.json: item 4: should be an object" in told
    assert "b.json is not JSON" in told


def test_of_any_number_of_problems_the_first_are_told_and_all_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    bad = [{"instruction": 1, "output": 2}] * MOST_PROBLEMS + [7] * 3
    path = write(tmp_path / "a.jsonl", [*bad, *good(4)])
    for _ in ("fresh", "from the cache"):
        dataset = plain(tokenizer, path, ratio=0.5)
        assert {dataset.where(i) for i in range(len(dataset))} <= {f"item {len(bad) + i}" for i in range(1, 5)}
        report = dataset.report()
        [file] = report["files"]
        assert (len(dataset), report["skipped"], file["skipped"]) == (2, len(bad), len(bad))
        assert file["skipped_kinds"] == {"wrong_type": 2 * MOST_PROBLEMS, "no_item": 3}
        assert len(file["skipped_items"]) == MOST_PROBLEMS
        assert file["skipped_items"][-1]["where"] == f"item {MOST_PROBLEMS // 2} (line {MOST_PROBLEMS // 2})"
    error = refused(tokenizer, write(tmp_path / "b.jsonl", [{"what": "is this"}] * 5 * MOST_PROBLEMS))
    assert f"{MOST_PROBLEMS} problems in the data" in error.message
    assert "reading ended after 1,000 problems" in str(error.hint)


def test_warnings_are_counted_over_all_batches_in_any_number_of_processes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = mixed(130)
    rows[20] = rows[0]
    rows[40] = {"instruction": "go 41", "output": " "}
    path = write(tmp_path / "a.jsonl", rows)
    monkeypatch.setenv("LLAMA_ACC_CACHE_GIB", "0")
    reports = []
    for batch, cores in ((1000, 1), (3, 1), (3, 2)):
        monkeypatch.setattr(module, "_BATCH", batch)
        monkeypatch.setattr(module, "cores", lambda cores=cores: cores)
        reports.append(plain(tokenizer, path).report())
    assert reports[1:] == reports[:1] * 2
    assert reports[0]["warnings"] == {"empty_reply": 1, "duplicate": 1}
    [file] = reports[0]["files"]
    assert file["warning_places"]["duplicate"][0]["where"] == "item 21"
    assert file["warning_places"]["empty_reply"][0]["where"] == "item 41 (line 41)"


@pytest.mark.parametrize("at_once", [1 << 20, 3])
def test_what_several_files_have_is_told_once_for_each_and_never_of_a_file_given_twice(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(checks, "_AT_ONCE", at_once)
    rows = good(8)
    a = write(tmp_path / "a.jsonl", rows[:4])
    b = write(tmp_path / "b.jsonl", [rows[6], rows[2], rows[6], rows[2], rows[5]])
    c = write(tmp_path / "c.json", [rows[7], rows[5], rows[0]])
    report = plain(tokenizer, a, b, a, c).report()
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
    text = 'instruction,output,source\ngo 0,the answer is 0,s\n  \n,,\n" ",,s\ngo 1,the answer is 1,\n'
    table = write(tmp_path / "a.csv", text)
    for on_error in ("stop", "skip", "stop"):
        dataset = plain(tokenizer, table, on_error=on_error)
        assert texts(dataset, tokenizer) == ["go 0the answer is 0", "go 1the answer is 1"]
        report = dataset.report()
        [file] = report["files"]
        assert (report["items"], report["skipped"], file["skipped_kinds"]) == (2, 2, {"blank": 2})
        assert report["warnings"] == {"blank": 2}
        assert [place["where"] for place in file["warning_places"]["blank"]] == ["item 2 (line 4)", "item 3 (line 5)"]
        assert (file["skipped_items"], file["unused_keys"]) == ([], {"source": 1})
        assert dataset.origin(1) == "a.csv item 4"


def test_single_turn_items_are_dialogues_where_one_has_a_history(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{**row, "history": []} for row in good(3)]
    turns = [["first", "one"], ["second", "two"]]
    late = [*good(3), {**rows[0], "history": turns}]
    for number, (items, template) in enumerate(
        [(rows, "alpaca"), ([*rows, {**rows[0], "history": turns}], "dialogue"), (late, "alpaca")]
    ):
        path = write(tmp_path / f"{number}.json", items)
        dataset = load(tokenizer, path, max_tokens=640, on_error="skip")
        assert dataset.template.name == template
        assert dataset.report()["skipped"] == (items is late)
    dialogues = load(tokenizer, Source(str(path), format="dialogue"), max_tokens=640)
    asked = tokenizer.decode(dialogues.document(3)[0])
    assert "Human: first\n### Assistant: one\n" in asked
    assert "Assistant: two\n### Human: go 0\n### Assistant: the answer is 0" in asked
    wanted = "turns before the instruction among single-turn items: use format: dialogue"
    assert wanted in refused(tokenizer, path, max_tokens=640).message


def test_a_split_is_fixed_and_disjoint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = two_files(tmp_path)
    dataset = load(tokenizer, *sources)
    train, validation = dataset.split(0.25, seed=3)
    assert (len(train), len(validation)) == (6, 2)
    assert sorted(origins(train, validation)) == origins(dataset)
    assert train.fingerprint() == load(tokenizer, *sources).split(0.25, seed=3)[0].fingerprint()
    assert train.report()["tokens"] + validation.report()["tokens"] == dataset.report()["tokens"]
    assert train.report()["items"] == 6
    with_skipped = plain(tokenizer, write(tmp_path / "c.jsonl", mixed(12)))
    assert sorted(origins(*with_skipped.split(0.3, seed=1))) == sorted(origins(with_skipped))
    for count, fraction, held in ((2, 0.01, 1), (2, 0.99, 1), (8, 0.5, 4)):
        parts = dataset.select(np.arange(count)).split(fraction, seed=0)
        assert list(map(len, parts)) == [count - held, held]
    for wrong, words in ((0.5, "at least 2"), (1.0, "fraction")):
        with pytest.raises(UserError, match=words):
            dataset.select(np.arange(1)).split(wrong, seed=0)


def test_of_documents_left_out_all_are_counted_and_the_first_findings_are_kept(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_PROBLEMS", 3)
    whole = load(tokenizer, *two_files(tmp_path))
    some = whole.select(np.arange(len(whole))[::-1].copy())
    last = len(some) - 1
    wrong = [(0, "a"), (0, "b"), (2, "c"), (last - 1, "d"), (last, "e"), (last, "f")]
    good_ones = some.without((i, Finding("image_file", some.where(i), "image", said, said)) for i, said in wrong)
    assert origins(good_ones) == [some.origin(i) for i in range(last) if i not in (0, 2, last - 1)]
    report = good_ones.report()
    assert (report["skipped"], report["items"]) == (4, len(some) - 4)
    told = [[place["message"] for place in file["skipped_items"]] for file in report["files"]]
    assert told == [["d", "e", "f"], ["a", "b", "c"]]
    assert [file["skipped_kinds"] for file in report["files"]] == [{"image_file": 3}, {"image_file": 3}]


def test_what_is_published_is_mapped_by_others_and_outlives_its_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = load(tokenizer, *two_files(tmp_path))
    with EntryStore() as store:
        for name, dataset in (("whole", whole), ("part", whole.split(0.5, seed=0)[0])):
            publish(dataset, store.own_folder / name)
        found = [load_published(store.own_folder / name, tokenizer) for name in ("whole", "part")]
    for loaded, dataset in zip(found, (whole, whole.split(0.5, seed=0)[0]), strict=True):
        assert (loaded.fingerprint(), loaded.template) == (dataset.fingerprint(), dataset.template)
        assert (texts(loaded, tokenizer), origins(loaded)) == (texts(dataset, tokenizer), origins(dataset))
        assert np.array_equal(loaded.lengths, dataset.lengths)
        assert not loaded.lengths.flags.writeable
        assert [file.path for file in loaded.files] == [file.path for file in dataset.files]


_LOAD = """
import resource, sys
from pathlib import Path
files = int(sys.argv[3])
if files:
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from llama_acc.core.data.dataset import load_dataset
from llama_acc.core.data.sources import Source
from llama_acc.core.tokenizer import load_tokenizer
dataset = load_dataset([Source(sys.argv[1], template="none")], load_tokenizer(sys.argv[2]), 64, 0)
print(len(dataset), len(dataset.parts), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "torch" in sys.modules)
"""


def load_alone(path: Path, tokenizer: Path, files: int = 0) -> list[str]:
    """Documents, parts, the most memory in KiB and whether torch was imported, in a process of its own: a script
    that does not guard what it does, and that may open so many files at first."""
    script = path.parent / "script.py"
    script.write_text(_LOAD)
    command = [sys.executable, str(script), str(path), str(tokenizer), str(files)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_more_shards_than_a_process_may_open_at_first(tmp_path: Path, tokenizer_path: Path) -> None:
    for number in range(100):
        write(tmp_path / f"shards/{number}.jsonl", [{"instruction": f"question {number}", "output": "yes"}])
    found = load_alone(tmp_path / "shards", tokenizer_path, files=64)
    assert (found[:2], found[3]) == (["100", "100"], "False")


def test_encoding_takes_as_much_memory_for_large_files_as_for_small_ones(tmp_path: Path, tokenizer_path: Path) -> None:
    """The larger one has 20 MB of text, and goes to worker processes."""
    peaks = []
    for count in (1000, 20_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for number in range(count):
                row = {"instruction": f"question {number}", "output": "it is so", "unused": "it is so " * 104}
                file.write(json.dumps(row) + "\n")
        documents, _, peak, _ = load_alone(path, tokenizer_path)
        assert int(documents) == count
        peaks.append(int(peak) / 2**10)
    assert peaks[1] - peaks[0] < 15, peaks
