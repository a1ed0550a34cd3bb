"""The catalogue says what is true of the recipes, the formats and the documentation; addresses mean what users copy."""

import re
from pathlib import Path

import pytest

from llama_acc.core.atomic import digest_of
from llama_acc.core.catalogue import (
    Address,
    HubAddress,
    WebAddress,
    catalogue,
    find_entry,
    parse_address,
    without_secrets,
)
from llama_acc.core.data.convert.formats import AUTO, FORMATS
from llama_acc.core.errors import UserError
from llama_acc.core.recipe import Recipe, recipe_names

DOCS = Path(__file__).resolve().parents[2] / "docs"
LIMA = "64bits/lima_vicuna_format"

PROMISED = """
    alpaca alpaca-original gorilla gorilla-torchhub gorilla-huggingface lima sharegpt-example wizardlm wizardcode
    flacuna ultrachat moss platypus llava-instruct-150k cc3m sbu coyo
    llama2-7b llama2-7b-chat llama2-13b llama2-13b-chat llama2-70b llama2-70b-chat
    codellama-7b codellama-13b codellama-34b tinyllama blip2-opt-2.7b
    llama3-8b llama3.1-8b llama3.1-70b llama3.2-1b llama3.2-3b llama3.3-70b mistral-7b
    qwen2.5-0.5b qwen2.5-1.5b qwen2.5-3b qwen2.5-7b qwen2.5-14b qwen2.5-32b qwen2.5-72b
    qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b qwen3-32b smollm2-135m smollm2-360m smollm2-1.7b smollm3-3b
    accessory-alpaca accessory-gorilla accessory-dialog_sharegpt accessory-dialog_sharegpt_70b accessory-dialog_lima
    accessory-dialog_wizardLM accessory-caption_llamaQformerv2_13b accessory-alpacaLlava_llamaQformerv2_13b
"""
# Dialogues that their users collect themselves: LLaMA2-Accessory did not publish its own.
NOT_PUBLISHED = {"sharegpt"}


def test_everything_promised_is_in_it() -> None:
    assert set(PROMISED.split()) <= set(catalogue())


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_shipped_recipe_starts_from_can_be_downloaded(name: str) -> None:
    recipe = Recipe.load(name)
    for model in recipe.model.pretrained_list():
        assert find_entry(model).is_model
    for source in recipe.data.sources:
        if not source.path.startswith("shipped:") and source.path not in NOT_PUBLISHED:
            assert find_entry(source.path).kind in ("data", "images")


def test_every_entry_is_whole_and_says_which_recipe_uses_it() -> None:
    users: dict[str, set[str]] = {}
    for name in recipe_names():
        recipe = Recipe.load(name)
        for used in (*recipe.model.pretrained_list(), *(source.path for source in recipe.data.sources)):
            users.setdefault(used, set()).add(name)
    for entry in catalogue().values():
        assert entry.page.startswith("https://")
        assert entry.recipe is None or entry.recipe in recipe_names()
        assert entry.name not in users or entry.recipe in users[entry.name]
        assert entry.convert in (None, *FORMATS, AUTO)
        for address, alias in ((parse_address(file.get), file.name) for file in entry.files):
            # A data set and a model may have one name; the catalogue says which is meant: one question is enough.
            assert not isinstance(address, HubAddress) or (
                address.kind is not None and not ("*" in address.path and alias)
            )


def test_the_hashes_are_those_of_the_real_files(shared: Path) -> None:
    here = {
        "sharegpt-example": [shared / "assets/data/sharegpt_example.json"],
        "gorilla-torchhub": [shared / "assets/gorilla/torchhub_train.json"],
    }
    here["gorilla-eval"] = [
        shared / "assets/gorilla" / name
        for name in ("torchhub_api.jsonl", "huggingface_api.jsonl", "torchhub_eval.json", "huggingface_eval.json")
    ]
    for name, paths in here.items():
        known = {file.get.rpartition("/")[2]: file for file in find_entry(name).files}
        known["sharegpt_example.json"] = next(iter(known.values()))
        for path in paths:
            assert path.stat().st_size == known[path.name].bytes
            assert digest_of(path) == known[path.name].sha256


def test_the_guide_has_every_entry_with_its_page() -> None:
    listed = re.findall(r"\[`([^`]+)`\]\((\S+)\)", _catalogue_text())
    assert sorted(listed) == sorted((entry.name, entry.page) for entry in catalogue().values())


def _catalogue_text() -> str:
    return (DOCS / "download.md").read_text(encoding="utf-8").partition("\n## The catalogue\n")[2]


# Addresses


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("hf:owner/name", HubAddress("owner/name")),
        ("hf://owner/name", HubAddress("owner/name")),
        ("hf:owner/name@v1.0", HubAddress("owner/name", revision="v1.0")),
        ("hf:models/owner/name/", HubAddress("owner/name", "model")),
        (f"hf:datasets/{LIMA}", HubAddress(LIMA, "dataset")),
        ("hf:owner/name/a/b.json", HubAddress("owner/name", path="a/b.json")),
        ("hf:owner/name@main/a/*.json", HubAddress("owner/name", revision="main", path="a/*.json")),
        ("hf:owner/name@refs/convert/parquet/a", HubAddress("owner/name", revision="refs/convert/parquet", path="a")),
        # pages, as copied from a browser
        ("https://huggingface.co/owner/name", HubAddress("owner/name", "model")),
        ("https://huggingface.co/owner/name/tree/main", HubAddress("owner/name", "model")),
        ("https://huggingface.co/owner/name/tree/main/a/b", HubAddress("owner/name", "model", path="a/b")),
        ("https://huggingface.co/owner/name/blob/v1/a.pth", HubAddress("owner/name", "model", "v1", "a.pth")),
        ("https://hf.co/owner/name/resolve/main/a.pth?download=true", HubAddress("owner/name", "model", path="a.pth")),
        (
            f"https://huggingface.co/datasets/{LIMA}/tree/refs%2Fconvert%2Fparquet/default",
            HubAddress(LIMA, "dataset", "refs/convert/parquet", "default"),
        ),
        (f"https://huggingface.co/datasets/{LIMA}/raw/main/x.json", HubAddress(LIMA, "dataset", path="x.json")),
        (
            "https://github.com/o/n/blob/main/d/a.json",
            WebAddress("https://raw.githubusercontent.com/o/n/main/d/a.json"),
        ),
        ("https://example.org/a%20b.json?x=1", WebAddress("https://example.org/a%20b.json?x=1")),
    ],
)
def test_what_an_address_means(text: str, meant: Address) -> None:
    assert parse_address(text) == meant


def test_a_plain_address_is_shown_without_what_is_secret_in_it() -> None:
    address = WebAddress("https://user:secret@example.org:8443/a.json?key=hush#part")
    assert str(address) == "https://example.org:8443/a.json"
    assert "secret" not in address.identity
    assert "hush" not in address.identity
    assert address.identity != WebAddress("https://user:secret@example.org:8443/a.json?key=other").identity
    assert address.file_name == "a.json"


@pytest.mark.parametrize(
    "text",
    ["ftp://user:secret@example.org/a?key=hush", "https://user:secret@", "https://user:secret@[::1/a?key=hush#x"],
)
def test_not_even_an_address_that_is_refused_is_shown_with_its_secrets(text: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_address(text)
    assert not {"secret", "hush"} & set(re.findall(r"\w+", str(refused.value)))
    assert without_secrets("https://a:b@example.org/x/y.json?z#f") == "https://example.org/x/y.json"
