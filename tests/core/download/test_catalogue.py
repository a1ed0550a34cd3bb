"""The catalogue says what is true of the recipes, the formats and the documentation."""

import re
from pathlib import Path

import pytest

from llama_acc.core.data.convert.formats import AUTO, FORMATS
from llama_acc.core.download.address import HubAddress, parse_address
from llama_acc.core.download.catalogue import Entry, catalogue, find_entry
from llama_acc.core.download.finish import finish
from llama_acc.core.download.remote import Digest
from llama_acc.core.errors import UserError
from llama_acc.core.recipe import Recipe, recipe_names
from tests.core.download.watch import Watch

DOCS = Path(__file__).resolve().parents[3] / "docs"

PROMISED = """
    alpaca alpaca-original gorilla gorilla-torchhub gorilla-huggingface lima sharegpt-example wizardlm wizardcode
    flacuna ultrachat moss platypus llava-instruct-150k cc3m sbu coyo
    llama2-7b llama2-7b-chat llama2-13b llama2-13b-chat llama2-70b llama2-70b-chat
    codellama-7b codellama-13b codellama-34b tinyllama blip2-opt-2.7b
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
        made_here = ":" in source.path  # shipped: or drawn:
        if not made_here and source.path not in NOT_PUBLISHED:
            assert find_entry(source.path).kind in ("data", "images")


@pytest.mark.parametrize("entry", catalogue().values(), ids=lambda entry: entry.name)
def test_an_entry_is_whole(entry: Entry) -> None:
    assert entry.page.startswith("https://")
    assert entry.recipe is None or entry.recipe in recipe_names()
    for file in entry.files:
        address = parse_address(file.get)
        # A data set and a model may have one name; the catalogue says which is meant, so that one question is enough.
        assert not isinstance(address, HubAddress) or address.kind is not None
        assert not (isinstance(address, HubAddress) and address.is_glob and file.name)


def test_what_a_shipped_recipe_uses_says_so() -> None:
    users: dict[str, set[str]] = {}
    for name in recipe_names():
        recipe = Recipe.load(name)
        for used in (*recipe.model.pretrained_list(), *(source.path for source in recipe.data.sources)):
            users.setdefault(used, set()).add(name)
    told = {name: entry.recipe for name, entry in catalogue().items()}
    assert [name for name in users if name in told and told[name] not in users[name]] == []
    assert told["accessory-alpacaLlava_llamaQformerv2_13b"] == "llava-qformer-13b"


def test_what_is_to_be_converted_is_in_a_format_there_is() -> None:
    formats = {entry.convert for entry in catalogue().values() if entry.convert}
    assert formats <= {*FORMATS, AUTO}


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
            assert Digest("sha256", "").of(path).hex == known[path.name].sha256


def test_torch_hubs_items_all_come_out(shared: Path, tmp_path: Path) -> None:
    raw = shared / "assets/gorilla/torchhub_train.json"
    made = finish(find_entry("gorilla-torchhub"), raw.parent, (raw,), tmp_path, Watch())
    assert made is not None
    assert len(made.read_text(encoding="utf-8").splitlines()) == 837


def test_unknown_names_are_refused_with_near_ones() -> None:
    with pytest.raises(UserError, match=r"the catalogue has no 'lama2-7b': did you mean 'llama2-7b'") as refused:
        find_entry("lama2-7b")
    assert "llama-acc download --list" in (refused.value.hint or "")
    with pytest.raises(UserError) as refused:
        find_entry("meta-llama/Llama-2-7b")
    assert refused.value.hint == "of Hugging Face, type: llama-acc download hf:meta-llama/Llama-2-7b"


def test_the_guide_has_every_entry_with_what_is_known_of_it() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \| (.*) \| (.*) \| (.*) \| \[.*\]\((.*)\) \|$", _catalogue_text(), re.M)
    told = {name: (what, size, licence, recipe.strip("`"), page) for name, what, size, licence, recipe, page in rows}
    assert told == {
        e.name: (e.what, e.size or "", e.licence + ", gated" * e.gated, e.recipe or "", e.page)
        for e in catalogue().values()
    }


def _catalogue_text() -> str:
    return (DOCS / "download.md").read_text(encoding="utf-8").partition("\n## The catalogue\n")[2]
