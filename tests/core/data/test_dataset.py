import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_acc.core.data import dataset as dataset_module
from llama_acc.core.data import load as load_module
from llama_acc.core.data import sources as sources_module
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.findings import Finding
from llama_acc.core.data.load import load_dataset
from llama_acc.core.data.sources import Source, resolve_data_path
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


def singles(count: int, output: str = "the answer") -> list[dict[str, str]]:
    return [{"instruction": f"question {i}", "output": output} for i in range(count)]


def talks(count: int) -> list[dict[str, Any]]:
    return [
        {"conversations": [{"from": "human", "value": f"{i}"}, {"from": "gpt", "value": "ok"}]} for i in range(count)
    ]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def load(tokenizer: Tokenizer, *sources: Source, max_tokens: int = 512, seed: int = 0, **options: Any) -> Dataset:
    return load_dataset(sources, tokenizer, max_tokens, seed, **options)


def two_files(folder: Path) -> list[Source]:
    write(folder / "a.json", [*singles(3), {"instruction": "x " * 600, "output": "y"}, *singles(1, "long " * 600)])
    write(folder / "b.json", talks(4))
    return [Source(str(folder / "a.json")), Source(str(folder / "b.json"))]


def test_files_are_joined_and_documents_know_where_they_came_from(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tokenizer, *two_files(tmp_path))
    assert len(dataset) == 8
    assert [dataset.origin(i) for i in (0, 3, 4, 7)] == [
        "a.json item 1",
        "a.json item 5",
        "b.json item 1",
        "b.json item 4",
    ]
    for i in range(8):
        tokens, labeled = dataset.document(i)
        assert len(tokens) == len(labeled) == dataset.lengths[i]
        assert labeled.sum() == dataset.label_counts[i] > 0
    assert dataset.lengths.sum() == dataset.tokens


def test_the_template_follows_the_kind_of_items(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = two_files(tmp_path)
    dataset = load(tokenizer, *sources)
    assert [template.name for template in dataset.templates] == ["alpaca", "dialogue"]
    assert dataset.template.name == "alpaca"
    assert load(tokenizer, Source(sources[0].path, template="none")).template.name == "none"
    with pytest.raises(UserError, match=r"b\.json: template 'qg' is for single-turn items"):
        load(tokenizer, Source(sources[1].path, template="qg"))


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_dialogues_in_the_place_of_single_turn_items_are_told_what_they_may_be(
    on_error: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "b.json", talks(4))
    with pytest.raises(UserError, match="among single-turn items") as caught:
        load(tokenizer, Source(str(path), format="single_turn"), on_error=on_error)
    assert "they are dialogues: use format: dialogue and template: dialogue, or format: single_turn_llava" in str(
        caught.value.hint
    )
    with pytest.raises(UserError, match="these are dialogues") as caught:
        load(tokenizer, Source(str(path), template="alpaca"), on_error=on_error)
    assert "or format: single_turn_llava" in str(caught.value.hint)
    taken = load(tokenizer, Source(str(path), format="single_turn_llava"), on_error=on_error)
    assert (len(taken), taken.template.name) == (4, "alpaca")
    # One among items is a mistake in the file.
    mixed = write(tmp_path / "a.json", [*singles(1), *talks(1)])
    if on_error == "stop":
        with pytest.raises(UserError, match="among single-turn items") as caught:
            load(tokenizer, Source(str(mixed)))
        assert "single_turn_llava" not in str(caught.value.hint)


def test_the_report_adds_up(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tokenizer, *two_files(tmp_path))
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
    documents = [dataset.document(i) for i in range(len(dataset))]
    assert report["tokens"] == sum(len(tokens) for tokens, _ in documents) == dataset.tokens
    assert report["label_tokens"] == sum(labeled.sum() for _, labeled in documents) == dataset.label_tokens
    assert list(report["lengths"]) == ["min", "p25", "p50", "p75", "p95", "p99", "max"]
    assert (report["lengths"]["min"], report["lengths"]["max"]) == (dataset.lengths.min(), 512)
    assert report["template"] == ["alpaca", "dialogue"]


def test_a_file_of_which_nothing_is_left_is_reported(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.json", singles(2))
    write(tmp_path / "b.json", [{"conversations": [{"from": "human", "value": "hello?"}]}])
    dataset = load(tokenizer, Source(str(tmp_path)))
    assert [(f["items"], f["dropped"], f["lengths"]) for f in dataset.report()["files"]][1] == (1, 1, {})
    with pytest.raises(UserError, match="nothing to train on: of 1 item none"):
        load(tokenizer, Source(str(tmp_path / "b.json")))


def test_encoding_twice_is_reading_the_cache_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = two_files(tmp_path)
    first = load(tokenizer, *sources)

    def fail(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(load_module, "prepare_batches", fail)
    again = load(tokenizer, *sources)
    assert again.report() == first.report()
    assert again.fingerprint() == first.fingerprint()
    with pytest.raises(AssertionError, match="encoded again"):
        load(tokenizer, *sources, max_tokens=511)


def test_the_fingerprint_is_of_tokens_labels_and_borders(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = two_files(tmp_path)
    prints = {
        load(tokenizer, *sources).fingerprint(),
        load(tokenizer, *reversed(sources)).fingerprint(),
        load(tokenizer, *sources, max_tokens=256).fingerprint(),
        load(tokenizer, sources[1]).fingerprint(),
    }
    assert len(prints) == 4
    write(tmp_path / "copy.json", talks(4))
    assert load(tokenizer, Source(str(tmp_path / "copy.json"))).fingerprint() in prints


def test_the_fingerprint_does_not_depend_on_how_files_are_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    items = singles(10)
    whole = load(tokenizer, Source(str(write(tmp_path / "whole.json", items))))
    for name, part in (("shards/1.json", items[:3]), ("shards/2.json", items[3:])):
        write(tmp_path / name, part)
    shards = load(tokenizer, Source(str(tmp_path / "shards")))
    assert shards.fingerprint() == whole.fingerprint()
    assert shards.select(np.arange(9)).fingerprint() != whole.fingerprint()
    assert shards.select(np.array([1, 0, *range(2, 10)])).fingerprint() != whole.fingerprint()


def test_a_ratio_takes_a_fixed_part(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = str(write(tmp_path / "a.json", singles(100)))
    part = load(tokenizer, Source(path, ratio=0.3))
    assert (len(part), part.report()["items"], part.report()["dropped"]) == (30, 30, 0)
    assert part.fingerprint() == load(tokenizer, Source(path, ratio=0.3)).fingerprint()
    assert part.fingerprint() != load(tokenizer, Source(path, ratio=0.3), seed=1).fingerprint()
    both = load(tokenizer, Source(path, ratio=0.3), Source(path, ratio=0.3))
    items = [int(both.origin(i).split()[-1]) - 1 for i in range(60)]
    assert items[:30] == [int(part.origin(i).split()[-1]) - 1 for i in range(30)] != items[30:]
    whole = load(tokenizer, Source(path))
    for i in (0, 17, 29):
        assert part.document(i)[0].tolist() == whole.document(items[i])[0].tolist()


def test_a_ratio_counts_what_it_takes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = str(write(tmp_path / "a.json", [*singles(5), *[{"instruction": "x " * 600, "output": "y"}] * 5]))
    report = load(tokenizer, Source(path, ratio=0.8)).report()
    assert report["items"] == 8
    assert 3 <= report["dropped"] <= 5


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Source("a.json", ratio=0), "ratio should be above 0 and at most 1"),
        (Source("a.json", ratio=1.5), "ratio"),
        (Source("a.json", format="dialog"), "did you mean 'dialogue'"),
        (Source("a.json", template="alpacca"), "did you mean 'alpaca'"),
        (Source("b.json"), "did you mean 'a.json'"),
    ],
)
def test_a_wrong_source_is_an_error(source: Source, words: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.json", singles(1))
    with pytest.raises(UserError, match=words):
        load(tokenizer, source, recipe_folder=tmp_path)


def test_the_problems_of_all_sources_come_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.json", [{"instruction": "x"}])
    write(tmp_path / "b.jsonl", "{")
    with pytest.raises(UserError) as caught:
        load(tokenizer, Source(str(tmp_path / "a.json")), Source(str(tmp_path / "b.jsonl")))
    assert "a.json: item 1" in str(caught.value)
    assert "b.jsonl: item 1" in str(caught.value)


def test_no_sources_and_no_room_are_errors(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no data"):
        load(tokenizer)
    with pytest.raises(UserError, match="max_tokens"):
        load(tokenizer, max_tokens=1)


def test_progress_names_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    told: list[tuple[str, int, float]] = []
    load(tokenizer, *two_files(tmp_path), progress=lambda *args: told.append(args))
    assert told == [("a.json", 5, 1.0), ("b.json", 4, 1.0)]


def test_a_split_is_fixed_and_disjoint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = two_files(tmp_path)
    dataset = load(tokenizer, *sources)
    train, validation = dataset.split(0.25, seed=3)
    assert (len(train), len(validation)) == (6, 2)
    origins = [part.origin(i) for part in (train, validation) for i in range(len(part))]
    assert sorted(origins) == [dataset.origin(i) for i in range(8)]
    again, _ = load(tokenizer, *sources).split(0.25, seed=3)
    assert train.fingerprint() == again.fingerprint()
    assert train.report()["tokens"] + validation.report()["tokens"] == dataset.report()["tokens"]
    assert train.report()["items"] == 6


@pytest.mark.parametrize(("count", "fraction", "held"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.5, 5)])
def test_both_parts_of_a_split_get_one(
    count: int, fraction: float, held: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    dataset = load(tokenizer, Source(str(write(tmp_path / "a.json", singles(count)))))
    train, validation = dataset.split(fraction, seed=0)
    assert (len(train), len(validation)) == (count - held, held)


def test_a_split_that_cannot_be_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = load(tokenizer, Source(str(write(tmp_path / "a.json", singles(1)))))
    with pytest.raises(UserError, match="at least 2"):
        dataset.split(0.5, seed=0)
    with pytest.raises(UserError, match="fraction"):
        dataset.split(1.0, seed=0)


def test_where_data_is_looked_for(tmp_path: Path, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, here, shipped = tmp_path / "recipe", tmp_path / "here", tmp_path / "shipped"
    for folder in (recipe, here, shipped):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sources_module, "SHIPPED", shipped)
    write(llama_acc_home / "data/lima/lima.json", talks(1))
    assert resolve_data_path("lima", recipe) == llama_acc_home / "data/lima"
    write(here / "lima", "x")
    assert resolve_data_path("lima", recipe) == here / "lima"
    write(recipe / "lima", "x")
    assert resolve_data_path("lima", recipe) == recipe / "lima"
    assert resolve_data_path("li*", recipe) == recipe / "li*"
    assert resolve_data_path(str(here / "lima"), recipe) == here / "lima"
    write(shipped / "tiny/data.json", "x")
    assert resolve_data_path("shipped:tiny/data.json") == shipped / "tiny/data.json"
    for wrong in ("shipped:tini/data.json", "shipped:../recipe/lima", "shipped:"):
        with pytest.raises(UserError, match="comes with llama-acc"):
            resolve_data_path(wrong)


def test_missing_data_says_where_it_was_looked_for(tmp_path: Path, llama_acc_home: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve_data_path("lima", tmp_path)
    for words in (str(tmp_path / "lima"), str(llama_acc_home / "data/lima"), "--data FILE", "llama-acc download lima"):
        assert words in str(caught.value)


def accessory_yaml(folder: Path, *entries: str) -> Source:
    return Source(str(write(folder / "data.yaml", "META:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries))))


def test_llama2_accessorys_data_yaml(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.json", singles(10))
    write(tmp_path / "sub/b.csv", "instruction\toutput\nx\ty\n")
    write(tmp_path / "c.jsonl", "\n".join(map(json.dumps, talks(10))))
    source = accessory_yaml(
        tmp_path,
        "path: a.json, type: text, prompt_type: None",
        "path: 'sub/b.csv', type: 'text', prompt_type: 'None'",
        "path: a.json, type: text",
        "path: c.jsonl, type: text, ratio: 0.5, root: /images",
        "path: a.json, type: text, prompt_type: shortqa",
    )
    files = load(tokenizer, source).report()["files"]
    assert [(Path(f["path"]).name, f["items"], f["template"]) for f in files] == [
        ("a.json", 10, "none"),
        ("b.csv", 1, "none"),
        ("a.json", 10, "alpaca"),
        ("c.jsonl", 5, "dialogue"),
        ("a.json", 10, "shortqa"),
    ]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("path: a.json", "entry 2: missing key 'type'"),
        ("type: text", "missing key 'path'"),
        ("path: a.json, type: texts", "type: should be 'text' or 'image_text', not 'texts'"),
        ("path: a.json, type: text, promt_type: qg", "unknown key 'promt_type': did you mean 'prompt_type'?"),
        ("path: a.json, type: text, prompt_type: alpacca", "unknown prompt_type 'alpacca'"),
        (
            "path: a.json, type: text, preprocess: magic",
            "preprocess: should be 'caption' or 'single_turn_llava', not 'magic'",
        ),
        ("path: a.json, type: image", "type: should be 'text' or 'image_text', not 'image'"),
        ("path: a.json, type: image_text, root: 3", "root: should be text, not 3"),
        ("path: a.json, type: text, ratio: 2", "ratio: should be at most 1, not 2"),
        ("path: a.json, type: text, ratio: all", "ratio: should be a number, not 'all'"),
        ("path: 3, type: text", "path: should be text, not 3"),
        ("path: nowhere.json, type: text", "there is no data 'nowhere.json'"),
    ],
)
def test_wrong_entries_of_an_accessory_yaml(entry: str, words: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.json", singles(1))
    with pytest.raises(UserError) as caught:
        load(tokenizer, accessory_yaml(tmp_path, "path: a.json, type: text", entry))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "is not YAML"),
        ("name: lima", "one key, META"),
        ("META: 3", "META should be a list"),
        ("", "one key, META"),
    ],
)
def test_a_yaml_that_is_no_data_file(content: str, words: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=words):
        load(tokenizer, Source(str(write(tmp_path / "data.yaml", content))))


def test_a_real_file_on_llamas_tokenizer(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "assets/tokenizer")
    source = Source(str(shared / "assets/data/alpaca_data_cleaned_1000.json"))
    whole = load(tokenizer, source, max_tokens=2048)
    dataset = load(tokenizer, source, max_tokens=256)
    report = dataset.report()
    assert (report["items"], report["dropped"] + len(dataset)) == (1000, 1000)
    assert report["truncated"] + report["dropped"] == int((whole.lengths > 256).sum()) > 0


def test_data_is_loaded_without_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, llama_acc.core.data.load, llama_acc.core.data.batches; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_of_documents_left_out_all_are_counted_and_the_first_findings_are_kept(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "MOST_PROBLEMS", 3)
    whole = load(tokenizer, *two_files(tmp_path))
    some = whole.select(np.arange(len(whole))[::-1].copy())
    last = len(some) - 1
    wrong = [(0, "a"), (0, "b"), (2, "c"), (last - 1, "d"), (last, "e"), (last, "f")]
    findings = ((i, Finding("image_file", some.where(i), "image", said, said)) for i, said in wrong)
    good = some.without(findings)
    left = [i for i in range(last) if i not in (0, 2, last - 1)]
    assert [good.origin(i) for i in range(len(good))] == [some.origin(i) for i in left]
    report = good.report()
    assert (report["skipped"], report["items"]) == (4, len(some) - 4)
    told = [[place["message"] for place in file["skipped_items"]] for file in report["files"]]
    assert told == [["d", "e", "f"], ["a", "b", "c"]]
    assert [file["skipped_kinds"] for file in report["files"]] == [{"image_file": 3}, {"image_file": 3}]
    assert [file["skipped"] for file in report["files"]] == [2, 2]
