"""Features of images that are kept on disk, and what happens where they cannot be."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llama_acc.core.data.features import FeatureCache
from llama_acc.core.data.images import Transform

SHAPE = (3, 4)


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((5, 5, 3), number, dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def cache(leave: int = 0) -> FeatureCache:
    return FeatureCache("encoder", Transform("pad_to_square", 8), SHAPE, torch.bfloat16, leave)


def test_features_come_back_to_the_bit(images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ACC_HOME", str(tmp_path / "home"))
    features = torch.rand(SHAPE).to(torch.bfloat16)
    cache().store(images[0], features)
    assert cache().has(images[0])
    assert not cache().has(images[1])
    assert torch.equal(cache().load(images[0]), features)


def test_a_disk_that_takes_no_more_is_told_of_once(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLAMA_ACC_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "features").write_text("in the way of the folder")
    kept = cache()
    with caplog.at_level(logging.WARNING, "llama_acc"):
        for image in images:
            kept.store(image, torch.rand(SHAPE))
            assert not kept.has(image)
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["cannot keep features"]


def test_what_checkpoints_need_of_the_disk_is_left_to_them(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLAMA_ACC_HOME", str(tmp_path / "home"))
    free = shutil.disk_usage(tmp_path).free
    with caplog.at_level(logging.WARNING, "llama_acc"):
        cache(leave=free // 2).store(images[0], torch.rand(SHAPE))
        assert cache().has(images[0])
        cache(leave=free * 2).store(images[1], torch.rand(SHAPE))
        assert not cache().has(images[1])
    (record,) = caplog.records
    assert "left that checkpoints need; from here on they are made each time" in record.message
