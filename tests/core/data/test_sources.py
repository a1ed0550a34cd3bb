"""Where data is found: beside a recipe, among the downloads, on the hub, in LLaMA2-Accessory's lists, in shards."""

import gzip
import json
from pathlib import Path

import pytest
from backports import zstd

from llama_acc.core.data import sources as sources_module
from llama_acc.core.data.dataset import Dataset
from llama_acc.core.data.sources import Source, resolve_data_path
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer
from tests.core.data.datasets import load, refused, singles, talks, texts, write
from tests.hub import Servers


def test_where_data_is_looked_for(tmp_path: Path, llama_acc_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, here, shipped = tmp_path / "recipe", tmp_path / "here", tmp_path / "shipped"
    for folder in (recipe, here, shipped):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sources_module, "SHIPPED", shipped)
    with pytest.raises(UserError) as caught:
        resolve_data_path("lima", recipe)
    for words in (recipe / "lima", llama_acc_home / "data/lima", "--data FILE", "llama-acc download lima"):
        assert str(words) in str(caught.value)
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


def accessory_yaml(folder: Path, *entries: str) -> Path:
    return write(folder / "data.yaml", "META:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries))


def test_llama2_accessorys_data_yaml(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.json", singles(10))
    write(tmp_path / "sub/b.csv", "instruction\toutput\nx\ty\n")
    write(tmp_path / "c.jsonl", talks(10))
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
        ("path: a.json, type: image_text, root: 3", "root: should be a valid string, not 3"),
        ("path: a.json, type: text, ratio: 2", "ratio: should be less than or equal to 1, not 2"),
        ("path: nowhere.json, type: text", "there is no data 'nowhere.json'"),
        ("path: data.yaml, type: text", ".yaml is not a kind of data file"),
    ],
)
def test_wrong_entries_of_an_accessory_yaml(entry: str, words: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "a.json", singles(1))
    assert words in str(refused(tokenizer, accessory_yaml(tmp_path, "path: a.json, type: text", entry)))


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
    assert words in refused(tokenizer, write(tmp_path / "data.yaml", content)).message


ITEMS = [{"instruction": f"question {i}", "output": "answer " * (i % 5 + 1)} for i in range(60)]


def lines(items: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Sixty items in four files, each of another kind."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "0.jsonl").write_bytes(lines(ITEMS[:10]))
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(lines(ITEMS[10:30])))
    (folder / "2.jsonl.zst").write_bytes(zstd.compress(lines(ITEMS[30:45])))
    (folder / "3.json.gz").write_bytes(gzip.compress(json.dumps(ITEMS[45:]).encode()))
    return folder


@pytest.fixture
def whole(tmp_path: Path, tokenizer: Tokenizer) -> Dataset:
    (tmp_path / "whole.jsonl").write_bytes(lines(ITEMS))
    return load(tokenizer, tmp_path / "whole.jsonl")


def test_packed_shards_are_the_plain_file_bit_by_bit(shards: Path, tokenizer: Tokenizer, whole: Dataset) -> None:
    for source in (shards, shards / "*", shards.parent / "**" / "[0-9].json*"):
        sharded = load(tokenizer, source)
        assert sharded.fingerprint() == whole.fingerprint()
        assert texts(sharded, tokenizer) == texts(whole, tokenizer)
    assert [file["items"] for file in sharded.report()["files"]] == [10, 20, 15, 15]
    assert sharded.origin(30) == "2.jsonl.zst item 1"
    totals = [{k: v for k, v in d.report().items() if k != "files"} for d in (sharded, whole)]
    assert totals[0] == totals[1]
    mixture = load(tokenizer, Source(str(shards), ratio=0.5), Source(str(shards.parent / "whole.jsonl"), ratio=0.1))
    assert [file["items"] for file in mixture.report()["files"]] == [5, 10, 7, 7, 6]
    assert set(texts(mixture, tokenizer)) <= set(texts(whole, tokenizer))
    damaged = shards / "1.jsonl.gz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    assert "1.jsonl.gz is damaged" in refused(tokenizer, shards).message


def test_hubs_data_sets_are_fetched_once_and_found_without_the_network(
    servers: Servers, tokenizer: Tokenizer, whole: Dataset
) -> None:
    parts = {"data/a.jsonl": lines(ITEMS[:30]), "data/b.jsonl.gz": gzip.compress(lines(ITEMS[30:]))}
    servers.dataset("owner/name", {**parts, "README.md": b"# about", "test.jsonl": lines(ITEMS)})
    servers.dataset("owner/empty", {"README.md": b"# about"})
    error = refused(tokenizer, Source("hf:datasets/owner/empty"))
    assert "hf:datasets/owner/empty holds no data files, but README.md" in error.message
    assert load(tokenizer, "hf:datasets/owner/name/data/*").fingerprint() == whole.fingerprint()
    assert len(servers.asked_for_bytes("a.jsonl")) == 1
    servers.close()
    assert load(tokenizer, "hf:datasets/owner/name/data/*").fingerprint() == whole.fingerprint()


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
