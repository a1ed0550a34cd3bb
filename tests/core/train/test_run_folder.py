"""A run's folder: what it may hold, what is refused before the first step, what is left when a run fails."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from llama_acc.core import finetune as whole_run
from llama_acc.core.atomic import check_manifest
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.train.log import MetricsLog
from llama_acc.core.train.run_folder import check_disk
from llama_acc.core.train.runs import read_metrics
from llama_acc.core.train.trainer import Trainer
from tests.core.train.runs import Notes, losses, metrics, names, plan_of, run, saved_weights

SAVING = ("train.epochs=3", "checkpoint.every_epochs=1", "checkpoint.keep=2")
ONE_STEP = ("train.max_steps=1", "train.warmup_epochs=0")


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs after two of them, with a checkpoint of each."""
    return run(tmp_path_factory.mktemp("two") / "run", *SAVING, "train.max_steps=8").output


@pytest.fixture
def begun(two_epochs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_epochs, tmp_path / "run", symlinks=True))


def _log_is_a_folder(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()


def _curves_are_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "tensorboard")
    (folder / "tensorboard").write_text("")


def _damaged_lines(folder: Path) -> None:
    log = folder / "metrics.jsonl"
    _, second, rest = log.read_bytes().split(b"\n", 2)
    log.write_bytes(b'{"loss": 1.0}\n' + second[:9] + b"\xff\n" + rest)


@pytest.mark.parametrize(
    ("damage", "steps", "noted"),
    [
        (
            lambda folder: (folder / "epoch0" / "state" / "progress.json").write_text("{"),
            12,
            "epoch0 does not say which step it is of",
        ),
        (_damaged_lines, 10, "has lines that cannot be read, left out: 2 (1, 2); the unchanged file is"),
        (_log_is_a_folder, 4, "metrics.jsonl is not a file; the unchanged file is"),
        (lambda folder: (folder / "latest").write_bytes(b"\xffepoch7\n"), 12, "taken instead: "),
        (_curves_are_a_file, 12, ""),
    ],
    ids=["older without step", "damaged lines", "log is a folder", "pointer to nothing", "curves are a file"],
)
def test_what_is_not_needed_to_go_on_never_stops_a_run(
    damage: Callable[[Path], None], steps: int, noted: str, begun: Path
) -> None:
    damage(begun)
    log, notes = begun / "metrics.jsonl", Notes()
    damaged = log.read_bytes() if "left out" in noted else None
    run(begun, *SAVING, resume=True, callback=notes)
    assert (begun / "latest").read_text() == "epoch2\n"
    assert noted in "\n".join(notes.texts)
    assert [line["step"] for line in metrics(begun)][-4:] == [9, 10, 11, 12]
    assert len(losses(begun)) == steps
    if damaged is not None:
        assert (begun / "metrics.damaged.jsonl").read_bytes() == damaged
    assert "The run is complete." in (begun / "report.md").read_text()


def test_a_link_in_a_runs_folder_is_never_written_through(begun: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    files = ["report.md", "loss.png", "metrics.jsonl", "recipe.yaml", "data.json", ".writing-latest"]
    files += [f".writing-{name}" for name in files[:-1]]
    for name in files:
        target = outside / name.replace(".", "-")
        target.write_bytes((begun / name).read_bytes() if (begun / name).exists() else b"mine")
        (begun / name).unlink(missing_ok=True)
        (begun / name).symlink_to(target)
    for name in ("tensorboard", ".writing-epoch2", "epoch2", ".writing-epoch2-old", ".writing-epoch0-old"):
        target = outside / name.replace(".", "-")
        target.mkdir()
        (target / "events.mine").write_text("mine")
        shutil.rmtree(begun / name, ignore_errors=True)
        (begun / name).symlink_to(target)

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}

    before = content()
    run(begun, *SAVING, resume=True)
    assert content() == before
    assert [path.name for path in begun.iterdir() if path.is_symlink()] == []
    assert names(begun) >= {"epoch1", "epoch2", "report.md", "loss.png", "tensorboard"}
    assert not any(name.startswith(".writing-") for name in names(begun))


def test_a_folder_that_is_deleted_under_a_run_is_made_again_at_its_next_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Deleting(Notes):
        def step(self, metrics: dict[str, float], plan: object) -> None:
            if metrics["step"] == 3:
                shutil.rmtree(tmp_path / "run")

    assert run(tmp_path / "run", callback=Deleting()).loss is None
    assert (tmp_path / "run" / "latest").read_text() == "epoch1\n"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["input", "weights", "memory"])
def test_a_run_that_is_refused_leaves_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the folders above its own that were made for it."""

    def refused(*arguments: object, **named: object) -> None:
        raise UserError("it does not fit")

    if where != "input":
        owner, name = {"weights": (whole_run, "read_base_weights"), "memory": (Trainer, "probe_peak_memory")}[where]
        monkeypatch.setattr(owner, name, refused)
    with pytest.raises(UserError, match=r"does not fit|is more than"):
        run(tmp_path / "runs" / "mine", *(["data.max_tokens=4000"] if where == "input" else []))
    assert names(tmp_path) == set()


def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_items(tmp_path: Path) -> None:
    """The first step of a warm-up has rate 0, the second one ruins the weights, the third one's loss tells."""
    with pytest.raises(RunError) as failed:
        run(tmp_path, "optimizer.lr=1e38", "checkpoint.every_steps=1", "checkpoint.keep=0")
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
        check_manifest(tmp_path / name, verify=True)
        assert all(torch.isfinite(tensor).all() for tensor in saved_weights(tmp_path / name).values())
    assert "The run did not finish." in (tmp_path / "report.md").read_text()


def test_a_poisoned_base_is_found_at_its_first_step(begun: Path, tmp_path: Path) -> None:
    weights = saved_weights(begun / "epoch1")
    weights["llma.norm.weight"][0] = float("nan")
    torch.save({"model": weights}, begun / "epoch1" / "consolidated.00-of-01.model.pth")
    (begun / "epoch1" / "manifest.json").unlink()
    with pytest.raises(RunError, match="the loss of step 1 is nan"):
        run(tmp_path / "tuned", f"model.pretrained={begun}")
    assert not any(name.startswith("epoch") for name in names(tmp_path / "tuned"))


class Disk(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(
    ("keep", "there", "done", "new"),
    [
        # keep, checkpoints that are there, steps done of 12, and how many new ones must find room beside them
        (3, 0, 0, 3),
        (1, 0, 0, 2),
        (1, 1, 4, 1),
        (2, 2, 8, 1),
        (3, 3, 8, 1),
        (1, 3, 8, 1),
        (0, 2, 8, 1),
        (0, 0, 0, 3),
        (3, 3, 12, 0),
    ],
)
def test_a_run_needs_the_room_its_coming_checkpoints_take_beside_those_there(
    keep: int, there: int, done: int, new: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("train.epochs=3", "checkpoint.every_epochs=1", f"checkpoint.keep={keep}")
    for number in range(there):
        (tmp_path / f"epoch{number}" / "state").mkdir(parents=True)
        (tmp_path / f"epoch{number}" / "state" / "progress.json").write_text(json.dumps({"step": number + 1}))
    needed = new * plan.checkpoint_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1 << 40, 0, needed))
    check_disk(plan, tmp_path, done)
    if new:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1 << 40, 0, needed - 1))
        with pytest.raises(UserError, match=rf"too little disk for the checkpoints: {new} of"):
            check_disk(plan, tmp_path, done)


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
    check_manifest(tmp_path / "epoch0", verify=True)
    monkeypatch.undo()
    run(tmp_path, "checkpoint.every_epochs=1", resume=True)
    assert len(losses(tmp_path)) == 8
    assert (tmp_path / "latest").read_text() == "epoch1\n"


def test_curves_that_find_no_room_end_with_one_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(records: RecordWriter) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    notes: list[str] = []
    line = {"loss": 1.0, "lr": 0.1, "tokens": 9, "tokens_per_second": 9.0, "peak_memory_gib": 0.5}
    with MetricsLog(tmp_path, 0, notes.append) as log:
        log.write({**line, "step": 1})
        monkeypatch.setattr(RecordWriter, "flush", full)
        for step in (2, 3):
            log.write({**line, "step": step})
    assert len(notes) == 1
    assert notes[0].startswith("TensorBoard's curves end here (No space left on device)")
    assert [step["step"] for step in read_metrics(tmp_path / "metrics.jsonl")[0]] == [1, 2, 3]
    assert capfd.readouterr() == ("", "")
