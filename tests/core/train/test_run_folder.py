"""What a run's folder may hold, and a resume goes on all the same; what is refused leaves nothing."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from llama_acc.core import finetune as planned
from llama_acc.core.errors import UserError
from llama_acc.core.train.callback import Callback
from llama_acc.core.train.log import MetricsLog, describe_plan, read_metrics
from llama_acc.core.train.run_folder import check_disk
from llama_acc.core.train.trainer import Trainer
from tests.core.train.runs import losses, metrics, names, plan_of, run

SAVING = ("train.epochs=3", "checkpoint.every_epochs=1", "checkpoint.keep=2")


class Notes(Callback):
    """Keeps what a run notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)

    @property
    def all(self) -> str:
        return "\n".join(self.texts)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs after two of them, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("two") / "run"
    run(folder, *SAVING, "train.max_steps=8")
    return folder


@pytest.fixture
def begun(two_epochs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_epochs, tmp_path / "run", symlinks=True))


def _older_without_step(folder: Path) -> None:
    (folder / "epoch0" / "state" / "progress.json").write_text("{")


def _log_not_utf8(folder: Path) -> None:
    log = folder / "metrics.jsonl"
    first, second, rest = log.read_bytes().split(b"\n", 2)
    log.write_bytes(first + b"\n" + second[:9] + b"\xff\n" + rest)


def _log_without_a_step(folder: Path) -> None:
    log = folder / "metrics.jsonl"
    log.write_bytes(b'{"loss": 1.0}\n' + log.read_bytes().split(b"\n", 1)[1])


def _log_is_a_folder(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()


def _pointer_to_nothing(folder: Path) -> None:
    (folder / "latest").write_bytes(b"\xffepoch7\n")


def _curves_are_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "tensorboard")
    (folder / "tensorboard").write_text("")


@pytest.mark.parametrize(
    ("damage", "steps", "told"),
    [
        (_older_without_step, 12, "epoch0 does not say which step it is of"),
        (_log_not_utf8, 11, "has lines that cannot be read, left out: 1 (2); the unchanged file is"),
        (
            _log_without_a_step,
            11,
            "has lines that cannot be read, left out: 1 (1); the unchanged file is",
        ),
        (_log_is_a_folder, 4, "metrics.jsonl is not a file; the unchanged file is"),
        (_pointer_to_nothing, 12, "taken instead: "),
        (_curves_are_a_file, 12, ""),
    ],
)
def test_what_is_not_needed_to_go_on_never_stops_a_run(
    damage: Callable[[Path], None], steps: int, told: str, begun: Path
) -> None:
    damage(begun)
    damaged_log = (begun / "metrics.jsonl").read_bytes() if (begun / "metrics.jsonl").is_file() else None
    notes = Notes()
    run(begun, *SAVING, resume=True, callback=notes)
    assert (begun / "latest").read_text() == "epoch2\n"
    assert told in notes.all
    assert [line["step"] for line in metrics(begun)][-4:] == [9, 10, 11, 12]
    assert len(losses(begun)) == steps
    if "the file as it was" in told and damaged_log is not None:
        assert (begun / "metrics.damaged.jsonl").read_bytes() == damaged_log
    assert "The run is complete." in (begun / "report.md").read_text()


def test_a_finished_run_whose_log_was_taken_away_is_resumed_without_a_word_of_its_loss(tmp_path: Path) -> None:
    run(tmp_path, "train.max_steps=2")
    (tmp_path / "metrics.jsonl").unlink()
    assert run(tmp_path, "train.max_steps=2", resume=True).loss is None


# Links


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
        if (begun / name).is_dir():
            shutil.rmtree(begun / name)
        (begun / name).symlink_to(target)

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}

    before = content()
    run(begun, *SAVING, resume=True)
    assert content() == before
    assert [path.name for path in begun.iterdir() if path.is_symlink()] == []
    assert names(begun) >= {"epoch1", "epoch2", "report.md", "loss.png", "tensorboard"}
    assert not any(name.startswith(".writing-") for name in names(begun))


# What is refused


@pytest.mark.parametrize("refusal", ["weights", "rehearsal"])
def test_a_run_that_is_refused_leaves_nothing(refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the folders above its own that were made for it."""

    def refused(*arguments: object, **named: object) -> None:
        raise UserError("its tensors do not fit")

    where, name = {"weights": (planned, "read_base"), "rehearsal": (Trainer, "probe_peak_memory")}[refusal]
    monkeypatch.setattr(where, name, refused)
    with pytest.raises(UserError, match="do not fit"):
        run(tmp_path / "runs" / "mine")
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.max_steps=1"], "the run has one step, and a warm-up begins at rate 0"),
        (["train.global_batch_size=32", "train.epochs=1"], "the run has one step, and a warm-up begins at rate 0"),
        (["optimizer.lr=0", "optimizer.min_lr=0"], "optimizer.lr is 0"),
    ],
)
def test_a_run_in_which_no_step_can_change_a_weight_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_of(*overrides)


@pytest.mark.parametrize(("steps", "warned"), [(2, True), (19, True), (20, False)])
def test_steps_of_rate_0_that_count_are_told(steps: int, warned: bool) -> None:
    """One of 19 is more than 5%, one of 20 is not."""
    lines = dict(describe_plan(plan_of("train.epochs=5", f"train.max_steps={steps}")))
    assert ("warning" in lines) == warned
    if warned:
        assert lines["warning"].startswith(f"1 of the {steps} steps ({1 / steps:.0%}) has rate 0 and changes nothing")
    assert "warning" not in dict(describe_plan(plan_of("train.warmup_epochs=0", f"train.max_steps={steps}")))


# The disk


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
    one = plan.checkpoint_bytes()
    for number in range(there):
        state = tmp_path / f"epoch{number}" / "state"
        state.mkdir(parents=True)
        (state / "progress.json").write_text(json.dumps({"step": number + 1}))
        with (state / "training").open("wb") as file:
            file.truncate(one - (state / "progress.json").stat().st_size)

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1 << 40, 0, size))

    free(new * one)
    check_disk(plan, tmp_path, done)
    if new:
        free(new * one - 1)
        with pytest.raises(UserError, match=rf"too little disk for the checkpoints: {new} of"):
            check_disk(plan, tmp_path, done)


def test_curves_that_find_no_room_end_with_one_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    told: list[str] = []
    line = {"step": 1, "loss": 1.0, "lr": 0.1, "tokens": 9, "tokens_per_second": 9.0, "peak_memory_gib": 0.5}
    with MetricsLog(tmp_path, 0, told.append) as log:

        def full(records: RecordWriter) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        log.write(line)
        monkeypatch.setattr(RecordWriter, "flush", full)
        for step in (2, 3):
            log.write({**line, "step": step})
    assert len(told) == 1
    assert told[0].startswith("TensorBoard's curves end here (No space left on device)")
    assert [step["step"] for step in read_metrics(tmp_path / "metrics.jsonl").lines] == [1, 2, 3]
    assert capfd.readouterr() == ("", "")


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
