"""Data in many files, compressed or not, near or far: the same documents as one file would give."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backports import zstd

from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.load import load_dataset
from llama_acc.core.data.sources import Source
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer
from tests.hub import Servers

ITEMS = [{"instruction": f"question {i}", "output": "answer " * (i % 5 + 1)} for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


def load(tokenizer: Tokenizer, *sources: str | Source) -> Dataset:
    return load_dataset([s if isinstance(s, Source) else Source(s) for s in sources], tokenizer, 2048, 0)


def lines(items: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def shards(folder: Path) -> Path:
    """Sixty items in four files, each of another kind."""
    folder.mkdir(parents=True)
    (folder / "0.jsonl").write_bytes(lines(ITEMS[:10]))
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(lines(ITEMS[10:30])))
    (folder / "2.jsonl.zst").write_bytes(zstd.compress(lines(ITEMS[30:45])))
    (folder / "3.json.gz").write_bytes(gzip.compress(json.dumps(ITEMS[45:]).encode()))
    return folder


@pytest.fixture
def whole(tmp_path: Path, tokenizer: Tokenizer) -> Dataset:
    (tmp_path / "whole.jsonl").write_bytes(lines(ITEMS))
    return load(tokenizer, str(tmp_path / "whole.jsonl"))


def assert_same(actual: Dataset, expected: Dataset) -> None:
    assert actual.fingerprint() == expected.fingerprint()
    assert np.array_equal(actual.lengths, expected.lengths)
    for i in range(len(expected)):
        assert all(np.array_equal(a, b) for a, b in zip(actual.document(i), expected.document(i), strict=True))


def test_compressed_shards_are_the_plain_file_bit_by_bit(tmp_path: Path, tokenizer: Tokenizer, whole: Dataset) -> None:
    folder = shards(tmp_path / "shards")
    for source in (folder, folder / "*", tmp_path / "**" / "[0-9].json*"):
        sharded = load(tokenizer, str(source))
        assert_same(sharded, whole)
    assert [file["items"] for file in sharded.report()["files"]] == [10, 20, 15, 15]
    assert sharded.origin(30) == "2.jsonl.zst item 1"
    totals = [{k: v for k, v in d.report().items() if k != "files"} for d in (sharded, whole)]
    assert totals[0] == totals[1]


def test_shards_are_mixed_by_ratios_of_each(tmp_path: Path, tokenizer: Tokenizer, whole: Dataset) -> None:
    folder = str(shards(tmp_path / "shards"))
    mixed = load(tokenizer, Source(folder, ratio=0.5), Source(str(tmp_path / "whole.jsonl"), ratio=0.1))
    assert [file["items"] for file in mixed.report()["files"]] == [5, 10, 7, 7, 6]
    assert len(mixed) == 35
    known = {tokens.tobytes() for tokens, _ in (whole.document(i) for i in range(60))}
    assert all(mixed.document(i)[0].tobytes() in known for i in range(35))
    train, held_out = mixed.split(0.2, seed=1)
    assert [file["items"] for file in train.report()["files"]] == [
        a["items"] - b["items"] for a, b in zip(mixed.report()["files"], held_out.report()["files"], strict=True)
    ]


def test_a_damaged_shard_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = shards(tmp_path / "shards")
    damaged = folder / "1.jsonl.gz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"1\.jsonl\.gz is damaged"):
        load(tokenizer, str(folder))


def test_hubs_data_sets_are_fetched_once_and_found_without_the_network(
    servers: Servers, tokenizer: Tokenizer, whole: Dataset
) -> None:
    parts = {"data/a.jsonl": lines(ITEMS[:30]), "data/b.jsonl.gz": gzip.compress(lines(ITEMS[30:]))}
    servers.dataset("owner/name", {**parts, "README.md": b"# about", "test.jsonl": lines(ITEMS)})
    remote = load(tokenizer, "hf:datasets/owner/name/data/*")
    assert_same(remote, whole)
    assert len(servers.asked_for_bytes("a.jsonl")) == 1
    servers.close()
    assert_same(load(tokenizer, "hf:datasets/owner/name/data/*"), whole)


def test_a_remote_source_without_data_says_what_it_holds(servers: Servers, tokenizer: Tokenizer) -> None:
    servers.dataset("owner/name", {"README.md": b"# about"})
    with pytest.raises(UserError, match=r"hf:datasets/owner/name holds no data files, but README\.md"):
        load(tokenizer, "hf:datasets/owner/name")


def test_a_recipe_keeps_the_address_of_its_data(servers: Servers) -> None:
    from tests.core.train.runs import plan_of

    servers.dataset("owner/name", {"a.jsonl": lines(ITEMS), "b.jsonl": lines(ITEMS[:4])})
    plan = plan_of(
        "data.sources=[{path: 'hf:datasets/owner/name/a.jsonl'}]",
        "data.validation.path=hf:datasets/owner/name/b.jsonl",
    )
    assert plan.recipe.data.sources[0].path == "hf:datasets/owner/name/a.jsonl"
    assert plan.recipe.data.validation.path == "hf:datasets/owner/name/b.jsonl"
    assert plan.validation is not None
    assert (len(plan.train), len(plan.validation)) == (60, 4)


_FEW_FILES = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from llama_acc.core.data.load import load_dataset
from llama_acc.core.data.sources import Source
from llama_acc.core.tokenizer import load_tokenizer
dataset = load_dataset([Source(sys.argv[1], template="none")], load_tokenizer(sys.argv[2]), 64, 0)
print(len(dataset), len(dataset.parts))
"""


def test_more_shards_than_a_process_may_open_at_first(tmp_path: Path, tokenizer_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.jsonl").write_bytes(lines([{"instruction": f"question {number}", "output": "yes"}]))
    command = [sys.executable, "-c", _FEW_FILES, str(tmp_path), str(tokenizer_path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["100", "100"]


_MEASURED = """
import resource, sys
from pathlib import Path
from llama_acc.core.data.load import load_dataset
from llama_acc.core.data.sources import Source
from llama_acc.core.tokenizer import load_tokenizer
dataset = load_dataset([Source(sys.argv[1], template="none")], load_tokenizer(sys.argv[2]), 64, 0)
print(len(dataset), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_encoding_takes_as_much_memory_for_large_files_as_for_small_ones(tmp_path: Path, tokenizer_path: Path) -> None:
    """The larger one has 20 MB of text, and goes to worker processes."""
    peaks = []
    for count in (1000, 20_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for number in range(count):
                file.write(json.dumps({"instruction": f"question {number}", "output": "it is so " * 104}) + "\n")
        command = [sys.executable, "-c", _MEASURED, str(path), str(tokenizer_path)]
        documents, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        assert documents == count
        peaks.append(peak / 2**10)
    assert peaks[1] - peaks[0] < 15, peaks
