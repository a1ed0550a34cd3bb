"""Shards of pictures with texts: rows with places, found again without reading through the shard."""

import gzip
import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data import tar_shards
from llama_acc.core.data.cache import content_digest
from llama_acc.core.data.images import read_reference, resolved
from llama_acc.core.data.items import Dialogue, SingleTurn
from llama_acc.core.data.tar_shards import tar_rows
from llama_acc.core.errors import UserError
from tests.core.data.pictures import encoded, plain
from tests.core.data.reading import read_items


def write_shard(path: Path, members: dict[str, bytes | str | dict[str, Any]], mode: Any = "w") -> Path:
    """A tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(count: int) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for number in range(count):
        members |= {
            f"{number:04}.jpg": encoded(plain((number, 9, 9)), "JPEG"),
            f"{number:04}.txt": f"caption {number}\n",
        }
    return members


def test_json_is_an_item_or_says_the_caption(tmp_path: Path) -> None:
    picture = encoded(plain(0))
    talk = {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]}
    shard = write_shard(
        tmp_path / "a.tar",
        {
            # img2dataset writes all three
            "sub/1.jpg": picture,
            "sub/1.txt": "from txt",
            "sub/1.json": {"caption": "from json", "url": "https://a.org/b", "status": "success"},
            "sub/2.webp": picture,
            "sub/2.json": {"text": "from text"},
            "sub/3.json": {"instruction": "what?", "output": "that", "image": "elsewhere.png"},
            "sub/3.png": picture,
            "4.json": {"instruction": "no picture", "output": "none needed"},
        },
    )
    items = read_items(shard)
    assert [(item.instruction, item.output) for item in items if isinstance(item, SingleTurn)] == [
        ("", "from txt"),
        ("", "from text"),
        ("what?", "that"),
        ("no picture", "none needed"),
    ]
    assert [len(item.images) for item in items] == [1, 1, 1, 0]
    assert all(item.images[0].startswith("a.tar#") for item in items[:3])
    dialogues = read_items(write_shard(tmp_path / "b.tar", {"1.png": picture, "1.json": talk}))
    assert isinstance(dialogues[0], Dialogue)
    assert len(dialogues[0].images) == 1


def test_a_caption_goes_with_the_picture_of_its_name_and_what_is_no_sample_is_passed_over(tmp_path: Path) -> None:
    more = {"README.md": "x", "0000.cls": "7", ".hidden.jpg": "x", "._0000.jpg": "x", "0000.seg.png": "x"}
    for name, members in (("a.tar", {**more, **samples(3)}), ("b.tar", {**samples(3), **more})):
        items = read_items(write_shard(tmp_path / name, members))
        assert [item.output for item in items if isinstance(item, SingleTurn)] == [f"caption {i}" for i in range(3)]
        for number, item in enumerate(items):
            assert read_reference(resolved(item.images[0], tmp_path)) == members[f"{number:04}.jpg"]


def test_every_sample_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    picture = encoded(plain(0))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({".jpg": picture}, "no .txt and no .json with a caption beside the picture"),
        ({".txt": "no picture"}, "no picture beside 2.txt"),
        ({".jpg": picture, ".json": {"nothing": 1}}, "no caption in .json"),
        ({".jpg": picture, ".json": "[1]"}, "4.json should hold an object"),
        ({".jpg": picture, ".json": "?"}, "5.json cannot be read: Expecting value: line 1 column 1 (char 0)"),
        ({".jpg": picture, ".txt": b"\xff"}, "6.txt is not UTF-8 at byte 0"),
        ({".jpg": picture, ".png": picture, ".txt": "two"}, "more than one picture of this name"),
    ]
    members = {f"{n}{suffix}": data for n, (files, _) in enumerate(wrong, start=1) for suffix, data in files.items()}
    shard = write_shard(tmp_path / "a.tar", {**members, **samples(1)})
    problems = [f"{where}: {problem}" for where, _, problem in tar_rows(shard) if problem is not None]
    assert problems == [f"item {n} ({n}): {problem}" for n, (_, problem) in enumerate(wrong, start=1)]
    with pytest.raises(UserError, match=r"7 problems(.|\n)*item 2 \(2\): no picture beside 2\.txt"):
        read_items(shard)


def test_shards_that_cannot_be_reached_into_are_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", samples(4))
    packed = tmp_path / "b.tar"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    cut, damaged = tmp_path / "c.tar", tmp_path / "damaged.tar"
    whole = shard.read_bytes()
    second = whole.index(b"0001.jpg")
    damaged.write_bytes(whole[:second] + b"?" * 512 + whole[second + 512 :])
    with pytest.raises(UserError, match=r"b\.tar is compressed"):
        read_items(packed)
    for size in (100, 3000, second, second + 700, whole.rindex(b"caption 3") + 100):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"c\.tar is not a whole tar file"):
            read_items(cut)
    with pytest.raises(
        UserError, match=rf"damaged\.tar is not a whole tar file: damaged or cut off at byte {second:,}"
    ):
        read_items(damaged)
    with pytest.raises(UserError, match="holds no samples"):
        read_items(write_shard(tmp_path / "d.tar", {"a.md": "x"}))
    with pytest.raises(UserError, match="there is no data file"):
        read_items(tmp_path / "e.tar")


def test_the_digest_is_of_what_decides_the_rows_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_acc_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_shard(tmp_path / "1/a.tar", samples(3))
    digest = partial(content_digest, stopped=lambda: False)
    first = digest(shard)
    assert digest(write_shard(tmp_path / "2/a.tar", samples(3))) == first
    assert digest(write_shard(tmp_path / "2/b.tar", samples(3))) != first, "its items name the shard"
    for number, other in enumerate([{**samples(3), "0001.txt": "another"}, {"x.md": "moves all", **samples(3)}]):
        assert digest(write_shard(tmp_path / f"other{number}/a.tar", other)) != first
    with monkeypatch.context() as patch:
        patch.setattr(tar_shards, "_samples", None)
        assert digest(shard) == first
    assert digest(write_shard(shard, samples(4))) != first
    (llama_acc_home / "cache/tars").rename(llama_acc_home / "cache/moved")
    (llama_acc_home / "cache/tars").write_text("in the way", encoding="utf-8")
    digest(shard)
    assert "not keeping the index" in caplog.text
