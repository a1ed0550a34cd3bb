import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_acc.core.data.check import FileReport, check_files, histogram
from llama_acc.core.data.checks import quantiles
from llama_acc.core.data.dataset import load_dataset
from llama_acc.core.data.sources import Source, expand
from llama_acc.core.tokenizer import Tokenizer


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def check(*paths: Path, tokenizer: Tokenizer | None = None, max_tokens: int | None = None) -> list[FileReport]:
    return check_files(expand([Source(str(path), template="none") for path in paths]), tokenizer, max_tokens)


def items(*outputs: str, question: str = "go") -> list[dict[str, str]]:
    return [{"instruction": f"{question} {i}", "output": output} for i, output in enumerate(outputs)]


def test_every_problem_has_its_file_place_field_and_value(tmp_path: Path) -> None:
    rows = map(json.dumps, items("a", "b"))
    lines = [*rows, '{"instruction": ', '{"instruction": "x", "output": 3}', '{"output": "x"}']
    [report] = check(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert (report.stats.rows, report.stats.items, report.fatal) == (5, 2, 3)
    assert {kind: [str(f) for f in found] for kind, found in report.findings.places.items()} == {
        "unreadable": ['item 3 (line 3), column 17: not JSON: Expecting value: "{\\"instruction\\": "'],
        "wrong_type": ["item 4 (line 4): 'output' should be text, but is a number: 3"],
        "missing_field": ["item 5 (line 5): no 'instruction' (its keys: 'output'): {\"output\": \"x\"}"],
    }
    assert report.findings.places["wrong_type"][0].field == "output"


def test_a_broken_first_row_does_not_hide_the_kind(tmp_path: Path) -> None:
    talk = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path = write(tmp_path / "a.jsonl", "\n".join(["{", "7", "{}", json.dumps(talk)]))
    [report] = check_files(expand([Source(str(path))]), None, None)
    assert (report.kind, report.stats.items) == ("dialogue", 1)
    [report] = check(path)
    assert "'none' is for single-turn items" in str(report.error)


def test_what_stands_before_a_break_is_checked_and_the_other_files_too(tmp_path: Path) -> None:
    broken = write(tmp_path / "a.json", json.dumps(items("a", ""))[:-1] + ', {"x": }]')
    table = write(tmp_path / "d.csv", "question,answer\na,b\n")
    reports = check(broken, write(tmp_path / "b.json", []), write(tmp_path / "c.json", items("c")), table)
    assert [report.error is not None for report in reports] == [True, True, False, True]
    assert "line 1" in str(reports[0].error)
    assert (reports[0].stats.items, reports[0].findings.counts["empty_reply"]) == (2, 1)
    assert (reports[0].fatal, reports[2].fatal) == (1, 0)
    assert "found: question, answer" in str(reports[3].hint)


def test_duplicates_are_found_across_files_with_both_places(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, items("x", "y"))))
    second = write(tmp_path / "b.json", [*items("z"), *items("x"), *items("Y ", "Y "), *items("z")])
    reports = check(first, second)
    assert not reports[0].findings.counts
    assert [str(f) for f in reports[1].findings.places["duplicate"]] == [
        'item 2: the same as item 1 (line 1) of a.jsonl: "go 0"',
        'item 5: the same as item 1: "go 0"',
    ]


def test_tokens_are_counted_as_training_would_cut_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = [*items("a town"), *items("ok " * 50), *items("ok", question="go " * 80)]
    [report] = check(write(tmp_path / "a.json", data), tokenizer=tokenizer, max_tokens=40)
    lengths = [len(tokenizer.encode(i["instruction"] + i["output"], bos=True, eos=True)) for i in data]
    prompts = [len(tokenizer.encode(i["instruction"], bos=True)) for i in data]
    assert report.lengths.tolist() == lengths
    assert report.counts == {
        "tokens": lengths[0] + 40,
        "label_tokens": lengths[0] - prompts[0] + 40 - prompts[1],
        "truncated": 1,
        "truncated_tokens": lengths[1] - 40,
        "truncated_label_tokens": lengths[1] - 40,
        "dropped": 1,
        "dropped_without_reply": 0,
        "dropped_without_room": 1,
    }
    [cut], [gone] = (report.findings.places[kind] for kind in ("cut", "no_label"))
    assert str(cut).startswith(f"item 2, instruction: {lengths[1]} tokens: the last {lengths[1] - 40} are cut")
    assert f"the first trained token is number {prompts[2] + 1}, and only 40 are kept" in str(gone)


@pytest.mark.parametrize(("template", "most", "positions"), [("auto", 150, None), ("none", 80, 34)])
def test_the_figures_are_those_of_the_data_report(
    tmp_path: Path, tokenizer: Tokenizer, template: str, most: int, positions: int | None
) -> None:
    data = items(*(f"the answer is {'so ' * i}" for i in range(60)))
    if positions is not None:
        data = [{**item, "image": "a.png"} for item in data]
    sources = [Source(str(write(tmp_path / "a.json", data)), template=template)]
    report = load_dataset(sources, tokenizer, most, 0, image_positions=positions).report()
    [checked] = check_files(expand(sources), tokenizer, most, image_positions=positions or 0)
    ours = checked.to_json()
    same = ("tokens", "label_tokens", "truncated", "dropped")
    assert {key: ours[key] for key in same} == {key: report[key] for key in same}
    assert (ours["items"], ours["images"], ours["truncated"] > 0) == (60, 60 * (positions is not None), True)
    json.dumps(ours)


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=60))
def test_quantiles_are_numpys_and_every_item_is_in_one_bar(lengths: list[int]) -> None:
    expected = np.percentile(lengths, [0, 25, 50, 75, 95, 99, 100], method="lower").tolist()
    assert list(quantiles(lengths).values()) == expected
    bars = histogram(lengths)
    assert len(bars) <= 17
    assert sum(count for _, _, count in bars) == len(lengths)
    ends = [begin for _, begin, _ in bars[1:]] + [max(lengths) + 1]
    assert [count for _, _, count in bars] == [
        sum(begin <= n < end for n in lengths) for (_, begin, _), end in zip(bars, ends, strict=True)
    ]


def test_a_bar_says_which_lengths_are_in_it() -> None:
    assert [name for name, _, _ in histogram([0, 1])] == ["0", "1"]
    long = histogram([10] * 400 + [1015] * 600 + [90_000])
    assert (long[0][0], long[-1][0]) == ("0 to 99", "1,100 or more")


def test_memory_does_not_grow_with_the_items(tmp_path: Path) -> None:
    import tracemalloc

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps({"instruction": f"go {i}", "output": "x" * 500}) + "\n" for i in range(count))
        tracemalloc.start()
        check(path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)  # imports
    few, many = peak(1000), peak(3000)
    assert many - few < 2000 * 350, "texts of 500 characters are not kept"
