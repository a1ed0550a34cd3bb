"""`llama-acc finetune` on images: every one is looked at before the first step, shards are data like any other."""

import json
from itertools import islice
from pathlib import Path

import pytest

from tests.cli.commands import PATIENCE, QUICKSTART, complete, invoke, metrics, refused, start, words
from tests.cli.test_caption_quickstart import members
from tests.core.data.pictures import encoded, pattern, plain
from tests.core.data.test_tar_shards import write_shard
from tests.core.ranks import free_port
from tests.core.seeing import TINY
from tests.core.train.image_runs import words_for, write_data


def finetune(data: Path, output: Path, *more: object) -> tuple[object, ...]:
    return (*QUICKSTART, "--output", output, *words_for(TINY, data), *more)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawings with their captions."""
    return write_shard(tmp_path_factory.mktemp("shard") / "drawings.tar", dict(islice(members("train"), 24)))


def test_every_image_that_cannot_be_used_is_named_before_the_first_step(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    images = data.parent / "images"
    (images / "1-0.png").unlink()
    (images / "2-1.png").write_bytes(b"no picture")
    (images / "4-0.png").write_bytes(encoded(plain(0, size=(400, 300))))
    output = tmp_path / "run"
    result = invoke(*finetune(data, output, "data.images.max_pixels=100000"))
    refused(
        result,
        "3 problems in the data",
        f"items.json item 2: the image {images / '1-0.png'} was not found",
        f"items.json item 3: the image {images / '2-1.png'} is not a picture of a known kind",
        f"items.json item 5: the image {images / '4-0.png'} has 400 x 300 pixels, more than 100,000",
        "data.sources.root says where relative paths begin",
        output=output,
    )


def test_a_picture_broken_inside_ends_the_run_by_name_when_its_turn_comes(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    picture, content = data.parent / "images" / "1-0.png", encoded(pattern(40, 30))
    picture.write_bytes(content[:-900])
    refused(invoke(*finetune(data, tmp_path / "cut")), f"the image {picture} is broken: image file is truncated")
    picture.write_bytes(content[:-900] + content[-12:])
    result = invoke(*finetune(data, tmp_path / "run"))
    assert result.exit_code == 1
    assert f"the image {picture} is broken: " in words(result.stderr)
    assert "though it could be opened before" in words(result.stderr)
    assert "mend it, then go on from the last checkpoint" in words(result.stderr)


def test_items_of_bad_images_are_skipped_where_the_recipe_says_so(tmp_path: Path) -> None:
    """And what is learned then is what is learned from data that never had these items."""
    data = write_data(tmp_path / "data")
    rows = json.loads(data.read_text())
    (data.parent / "images" / "1-0.png").unlink()
    (data.parent / "images" / "2-1.png").write_bytes(b"no picture")
    clean = data.with_name("clean.json")
    clean.write_text(json.dumps([row for number, row in enumerate(rows) if number not in (1, 2)]))
    rows.append({"instruction": "x", "image": "images/4-0.png"})
    data.write_text(json.dumps(rows))
    result = complete(*finetune(data, tmp_path / "run", "data.on_error=skip"))
    assert ", 3 skipped" in result.stderr
    assert invoke(*finetune(clean, tmp_path / "clean")).exit_code == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "clean")
    report = json.loads((tmp_path / "run/data.json").read_text(encoding="utf-8"))
    assert (report["items"], report["skipped"]) == (14, 3)
    assert [(place["where"], place["kind"]) for place in report["files"][0]["skipped_items"]] == [
        ("item 17", "missing_field"),
        ("item 2", "image_file"),
        ("item 3", "image_file"),
    ]


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    moved = (tmp_path / "moved").mkdir() or data.rename(tmp_path / "moved" / data.name)
    refused(invoke(*finetune(moved, tmp_path / "run")), f"{tmp_path / 'moved/images/1-0.png'} was not found")
    complete(*finetune(moved, tmp_path / "run", f"data.sources.0.root={tmp_path / 'data'}"), "--dry-run", "--no-timing")


def test_a_run_on_a_shard_resumes_at_the_sample_and_torchrun_s_ranks_share_it(shard: Path, tmp_path: Path) -> None:
    """Bitwise after a stop within an epoch; in two processes the same steps, so no sample twice and none left out.

    So it is beside other data, of which an item is skipped as its image is not there.
    """
    others = write_data(tmp_path / "data", items=8)
    (others.parent / "images/1-0.png").unlink()
    sources = f"data.sources=[{{path: {shard}, template: caption}}, {{path: {others}}}]"
    settings = (sources, "data.on_error=skip", "train.global_batch_size=5")
    complete(*finetune(shard, tmp_path / "whole", *settings))
    assert invoke(*finetune(shard, tmp_path / "parts", *settings, "train.max_steps=2")).exit_code == 0
    again = complete("finetune", "--output", tmp_path / "parts", "--resume", "--device", "cpu", "train.max_steps=null")
    assert again.stdout == f"llama-acc caption --ckpt {tmp_path / 'parts'} IMAGE\n"
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    weights = [tmp_path / name / "epoch1/consolidated.00-of-01.model.pth" for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    two = start(*finetune(shard, tmp_path / "two", *settings), launcher=torchrun)
    out, err = two.communicate(timeout=PATIENCE)
    assert (two.returncode, out) == (0, f"llama-acc caption --ckpt {tmp_path / 'two'} IMAGE\n"), err
    reports = [(tmp_path / name / "data.json").read_text(encoding="utf-8") for name in ("whole", "two")]
    assert (json.loads(reports[0])["items"], json.loads(reports[0])["skipped"]) == (19, 1)
    assert reports[0] == reports[1]
    for alone, shared in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "two"), strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert shared["label_tokens"] == alone["label_tokens"]
