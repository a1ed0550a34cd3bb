"""Features of images that are kept on disk, and what happens where they cannot be."""

import shutil
from pathlib import Path

import pytest
import torch

from llama_acc.core.data.images import Transform
from llama_acc.core.train.image_loader import FeatureCache
from tests.core.data.pictures import write_pictures

SHAPE = (3, 4)


def cache(reserve: int = 0) -> FeatureCache:
    return FeatureCache("encoder", Transform("pad_to_square", 8), SHAPE, torch.bfloat16, reserve)


@pytest.mark.parametrize("is_full", [True, False])
def test_a_disk_that_takes_no_more_is_reported_once(
    tmp_path: Path, llama_acc_home: Path, is_full: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What checkpoints need is left to them."""
    kept = cache(reserve=shutil.disk_usage(tmp_path).free * 2 if is_full else 0)
    if not is_full:
        llama_acc_home.mkdir(exist_ok=True)
        (llama_acc_home / "features").write_text("in the way of the folder", encoding="utf-8")
    for image in write_pictures(tmp_path, 2):
        kept.store(image, torch.rand(SHAPE))
        assert not kept.has(image)
    (record,) = caplog.records
    assert record.message.startswith("cannot keep features in ")
    assert ("left that checkpoints need" in record.message) == is_full
