import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_acc.core.data.check import FileReport, check_files, histogram
from llama_acc.core.data.checks import quantiles
from llama_acc.core.data.dataset import load_dataset
from llama_acc.core.data.sources import Source, expand
from llama_acc.core.tokenizer import Tokenizer
from tests.core.data.datasets import write


def check(*paths: Path, tokenizer: Tokenizer | None = None, max_tokens: int | None = None) -> list[FileReport]:
    return check_files(expand([Source(str(path), template="none") for path in paths]), tokenizer, max_tokens)


def items(*outputs: str, question: str = "go") -> list[dict[str, str]]:
    return [{"instruction": f"{question} {i}", "output": output} for i, output in enumerate(outputs)]


def test_a_broken_first_row_does_not_hide_the_kind(tmp_path: Path) -> None:
    talk = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path = write(tmp_path / "a.jsonl", "\n".join(["{", "7", "{}", json.dumps(talk)]))
    [report] = check_files(expand([Source(str(path))]), None, None)
    assert (report.kind, report.stats.items) == ("dialogue", 1)
    [report] = check(path)
    assert "'none' is for single-turn items" in str(report.error)


@pytest.mark.parametrize(("template", "most", "positions"), [("auto", 150, None), ("none", 80, 34)])
def test_the_figures_are_those_of_the_data_report(
    tmp_path: Path, tokenizer: Tokenizer, template: str, most: int, positions: int | None
) -> None:
    data = [*items(*(f"the answer is {'so ' * i}" for i in range(60))), *items("ok", question="go " * 200)]
    if positions is not None:
        data = [{**item, "image": "a.png"} for item in data]
    sources = [Source(str(write(tmp_path / "a.json", data)), template=template)]
    report = load_dataset(sources, tokenizer, most, 0, image_positions=positions).report()
    [checked] = check_files(expand(sources), tokenizer, most, image_positions=positions or 0)
    ours = checked.to_json()
    same = ("tokens", "label_tokens", "truncated", "dropped")
    assert {key: ours[key] for key in same} == {key: report[key] for key in same}
    assert (ours["items"], ours["images"], ours["dropped_without_room"]) == (61, 61 * (positions is not None), 1)
    assert ours["truncated"] > 0
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
    long = histogram([10] * 400 + [1015] * 600 + [90_000])
    assert [name for name, _, _ in (*histogram([0, 1]), long[0], long[-1])] == ["0", "1", "0 to 99", "1,100 or more"]


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
