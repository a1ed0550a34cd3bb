"""A run goes on where its data, base or tokenizer lie elsewhere now, and says what differs where they are others."""

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from tests.cli.commands import QUICKSTART, complete, invoke, refused

WORDS = ("finetune", "--device", "cpu")
LONGER = ("train.epochs=2",)
ITEMS = [{"instruction": f"Question {i}?", "output": f"Answer {i}."} for i in range(16)]
METHODS = {"full": (), "bias_norm": ("tuning.method=bias_norm",)}
METHODS["part"] = (*METHODS["bias_norm"], "checkpoint.trainable_only=true")


def done(*words: object) -> str:
    return complete(*words).stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a tokenizer."""
    output = tmp_path_factory.mktemp("base")
    done(*QUICKSTART, "--output", output, "train.max_steps=2")
    checkpoint = output / "epoch0-iter2"
    shutil.rmtree(checkpoint / "state")
    (checkpoint / "manifest.json").unlink()
    return checkpoint


def trained(method: str, base: Path, folder: Path) -> Path:
    """A run of one epoch in `folder`/run, of a base and data beside it."""
    (folder / "data.json").write_text(json.dumps(ITEMS))
    shutil.copytree(base, folder / "base")
    words = ["--pretrained", folder / "base", "--data", folder / "data.json", "--output", folder / "run"]
    done(*QUICKSTART, *words, *METHODS[method], "train.epochs=1")
    return folder / "run"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_where_its_files_have_moved(method: str, base: Path, tmp_path: Path) -> None:
    run = trained(method, base, tmp_path)
    new = tmp_path / "new"
    new.mkdir()
    (tmp_path / "data.json").rename(new / "items.json")
    (tmp_path / "base").rename(new / "llama")
    command = (*WORDS, "--output", run, "--resume", *LONGER)
    # The hints lead out, one flag after the other.
    refused(invoke(*command), "there is no data", "give it with --data FILE")
    data = new / "linked.json"
    data.symlink_to(new / "items.json")
    needed: tuple[object, ...] = ("--data", data)
    if method != "full":
        refused(invoke(*command, *needed), "there is no checkpoint folder", "--resume --pretrained DIR")
        needed = (*needed, "--pretrained", new / "llama")
    told = done(*command, *needed)
    assert "of 4 steps done" in told
    assert (run / "latest").read_text() == "epoch1\n"
    assert str(data) in (run / "recipe.yaml").read_text()
    # What was given once is known from then on.
    done(*command[:-1], "train.epochs=3")
    assert (run / "latest").read_text() == "epoch2\n"
    # Nothing of a checkpoint that will go is in the recipe.
    assert str(run) not in (run / "recipe.yaml").read_text()


def test_the_base_of_a_full_run_may_be_named_anew_and_must_be_the_same(base: Path, tmp_path: Path) -> None:
    run = trained("full", base, tmp_path)
    command = (*WORDS, "--output", run, "--resume", *LONGER)
    other = tmp_path / "other"
    done(*QUICKSTART, "--output", other, "train.max_steps=2", "train.seed=5")
    refused(
        invoke(*command, "--pretrained", other),
        "the recipe is not the one",
        f"model.pretrained: ['{tmp_path / 'base'}'] before, ['{other / 'epoch0-iter2'}'] now, with other weights",
        "start a new run in another --output",
    )
    same = tmp_path / "same"
    shutil.copytree(base, same)
    assert "of 4 steps done" in done(*command, "--pretrained", same)


@pytest.mark.parametrize("method", ["bias_norm", "part"])
def test_a_base_that_became_another_one_in_its_place_is_found(method: str, base: Path, tmp_path: Path) -> None:
    run = trained(method, base, tmp_path)
    done(*QUICKSTART, "--output", tmp_path / "other", "train.max_steps=2", "train.seed=5")
    name = "consolidated.00-of-01.model.pth"
    shutil.copy(tmp_path / "other" / "epoch0-iter2" / name, tmp_path / "base" / name)
    refused(
        invoke(*WORDS, "--output", run, "--resume", *LONGER),
        f"model.pretrained: {tmp_path / 'base'}, with other weights",
    )


def test_other_data_is_told_by_its_size_and_another_tokenizer_by_name(base: Path, tmp_path: Path) -> None:
    run = trained("full", base, tmp_path)
    command = (*WORDS, "--output", run, "--resume", *LONGER)
    fewer, swapped, other = tmp_path / "fewer.json", tmp_path / "swapped.json", tmp_path / "tokenizer.model"
    fewer.write_text(json.dumps(ITEMS[1:]))
    swapped.write_text(json.dumps([ITEMS[1], ITEMS[0], *ITEMS[2:]]))
    refused(invoke(*command, "--data", fewer), "the data is not what", "16 items and", "before, 15 items and", "now")
    refused(invoke(*command, "--data", swapped), "as before, but other text, in another order, or labeled otherwise")
    copy = tmp_path / "copy.model"
    shutil.copy(base / "tokenizer.model", copy)
    assert "of 4 steps done" in done(*command, "--tokenizer", copy)
    pieces = sentencepiece_model_pb2.ModelProto.FromString(copy.read_bytes())
    pieces.pieces[-1].piece += "?"
    other.write_bytes(pieces.SerializeToString())
    refused(invoke(*command[:-1], "train.epochs=3", "--tokenizer", other), "model.tokenizer:", "another tokenizer")


def test_the_items_of_a_source_with_a_ratio_are_found_again_elsewhere(tmp_path: Path) -> None:
    data, moved = tmp_path / "data.json", tmp_path / "moved.json"
    data.write_text(json.dumps(ITEMS))
    run = tmp_path / "run"
    done(*QUICKSTART, f"data.sources.0.path={data}", "data.sources.0.ratio=0.5", "--output", run, "train.epochs=1.9")
    data.rename(moved)
    assert "steps done" in done(*WORDS, "--output", run, "--resume", "--data", moved, "train.epochs=4")
