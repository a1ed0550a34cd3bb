"""What ends a run, before its first step or within it, and what is left then."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from llama_acc.core.atomic import check_manifest
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.train.run_folder import RunFolder
from tests.core.train.runs import losses, metrics, names, run, saved_weights


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_items(tmp_path: Path) -> None:
    """The first step of a warm-up has rate 0, the second one ruins the weights, the third one's loss tells."""
    with pytest.raises(RunError) as failed:
        run(tmp_path, "optimizer.lr=1e38", "checkpoint.every_steps=1", "checkpoint.keep=0")
    assert failed.value.exit_code == 1
    message = failed.value.message
    assert message.startswith("the loss of step 3 is ")
    assert "the weights did not take this step" in message
    items = message.partition("The step's items:\n")[2].splitlines()
    assert len(items) == 8
    assert all(item.startswith("  instructions.json item ") for item in items)
    assert "lower optimizer.lr" in str(failed.value)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "latest").read_text() == "epoch0-iter2\n"
    for name in ("epoch0-iter1", "epoch0-iter2"):
        check_manifest(tmp_path / name, contents=True)
        assert all(torch.isfinite(tensor).all() for tensor in saved_weights(tmp_path / name).values())
    assert "The run did not finish." in (tmp_path / "report.md").read_text()


def test_a_poisoned_base_is_found_at_its_first_step(tmp_path: Path) -> None:
    run(tmp_path / "base", "train.max_steps=1", "train.warmup_epochs=0", "checkpoint.keep=0")
    weights = saved_weights(tmp_path / "base" / "epoch0-iter1")
    weights["llma.norm.weight"][0] = float("nan")
    poisoned = tmp_path / "poisoned"
    poisoned.mkdir()
    torch.save({"model": weights}, poisoned / "consolidated.00-of-01.model.pth")
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(tmp_path / "base" / "epoch0-iter1" / name, poisoned)
    with pytest.raises(RunError, match="the loss of step 1 is nan"):
        run(tmp_path / "run", f"model.pretrained={poisoned}")
    assert not any(name.startswith("epoch") for name in names(tmp_path / "run"))


def test_too_little_disk_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1 << 30, (1 << 30) - 4096, 4096))
    with pytest.raises(UserError, match=r"too little disk for the checkpoints: 3 of .* need .*, 4\.0 KiB are free at"):
        run(tmp_path, "train.epochs=4", "checkpoint.every_epochs=1", "checkpoint.keep=2")
    assert names(tmp_path) == set()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def full(descriptor: int) -> None:
        if (tmp_path / "epoch0").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="the disk is full: free some space; the last checkpoint before this is whole"):
        # The pointer to the first checkpoint is the first thing that finds no room.
        run(tmp_path, "checkpoint.every_epochs=1")
    check_manifest(tmp_path / "epoch0", contents=True)
    monkeypatch.undo()
    run(tmp_path, "checkpoint.every_epochs=1", resume=True)
    assert len(losses(tmp_path)) == 8
    assert (tmp_path / "latest").read_text() == "epoch1\n"


def test_a_folder_in_use_by_another_run_is_refused(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(fd, fcntl.LOCK_EX);"
            "print('held', flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(UserError, match="is in use by another run"):
                run(tmp_path, resume=resume)
    finally:
        holder.communicate()
    run(tmp_path, "train.max_steps=1", "train.warmup_epochs=0")


def test_a_runs_own_lock_goes_with_its_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open(resume=False)
    with pytest.raises(UserError, match="is in use"):
        RunFolder(tmp_path).open(resume=True)
    folder.close()
    folder.open(resume=True)
    folder.close()


def test_a_folder_that_holds_something_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"is not empty: it holds thesis\.tex") as refused:
        run(tmp_path)
    assert "--resume" in str(refused.value)
    assert names(tmp_path) == {"thesis.tex"}


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use .*file as output folder"):
        run(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot use .*inside as output folder"):
        run(tmp_path / "file" / "inside")


@pytest.mark.parametrize(
    "override", ["data.sources.0.path=nowhere.json", "model.pretrained=nowhere", "data.max_tokens=4000"]
)
def test_input_that_is_refused_leaves_the_folder_free_for_the_next_try(override: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(tmp_path, override)
    run(tmp_path, "train.max_steps=1", "train.warmup_epochs=0")


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    from llama_acc.core.device import pick_device

    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=rf"device '{name}' cannot be used here"):
            pick_device(name)


def test_a_base_that_does_not_fit_its_shape_is_refused_with_every_tensor(tmp_path: Path) -> None:
    run(tmp_path / "base", "train.max_steps=1", "train.warmup_epochs=0")
    config = tmp_path / "base" / "epoch0-iter1" / "config.json"
    (tmp_path / "base" / "epoch0-iter1" / "manifest.json").unlink()
    config.write_text(config.read_text().replace('"dim": 32', '"dim": 64'))
    with pytest.raises(UserError, match=r"shape: tok_embeddings\.weight is \[640, 32\], the model needs \[640, 64\]"):
        run(tmp_path / "run", f"model.pretrained={tmp_path / 'base'}")
