"""A run's folder is refused where it is another's, and resumed only as the run that it holds."""

import errno
import fcntl
import os
import shlex
from pathlib import Path

import pytest

from tests.cli.commands import QUICKSTART, invoke, refused


def test_a_folder_in_use_by_another_run_is_refused(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        result = invoke(*QUICKSTART, "--output", tmp_path)
        refused(result, f"{tmp_path} is in use by another run", "choose another --output", output=tmp_path)
    finally:
        os.close(descriptor)


def test_what_is_no_empty_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    holds = f"{tmp_path} is not empty: it holds thesis.tex"
    for dry_run in ([], ["--dry-run"]):
        again = "choose another --output, or continue the run in it with --resume"
        refused(invoke(*QUICKSTART, "--output", tmp_path, *dry_run), holds, again)
    for output in (thesis, thesis / "run"):
        refused(invoke(*QUICKSTART, "--output", output), f"cannot use {output} as output folder", "another --output")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "..", '""'])
def test_a_recipes_name_never_leads_out_of_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(invoke(*QUICKSTART, f"name={name}"), "is no name for a folder", "give --output DIR")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(invoke(*QUICKSTART, "--output", tmp_path), f"cannot write into {tmp_path}")
    refused(invoke(*QUICKSTART, "--output", tmp_path / "run"), f"cannot use {tmp_path / 'run'} as output folder")


# --resume


def test_resume_without_a_checkpoint_starts_at_step_0_and_says_so(tmp_path: Path) -> None:
    result = invoke(*QUICKSTART, "--output", tmp_path / "run", "--resume", "train.epochs=1")
    assert result.exit_code == 0
    assert "no whole checkpoint" in result.stderr
    assert "starting at step 0" in result.stderr
    assert (tmp_path / "run" / "latest").read_text() == "epoch0\n"


def test_resume_lists_every_key_that_was_changed_and_a_run_can_be_made_longer(trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    changed = ["optimizer.lr=0.1", "train.global_batch_size=4", "data.sources.0.ratio=0.5", "train.seed=1"]
    result = invoke(*QUICKSTART, "--output", trained, "--resume", "train.epochs=9", *changed)
    refused(
        result,
        f"the recipe is not the one {trained / 'epoch0'} was trained with:",
        "optimizer.lr: 0.002 before, 0.1 now",
        "train.global_batch_size: 8 before, 4 now",
        "data.sources.0.ratio: 1.0 before, 0.5 now",
        "train.seed: 0 before, 1 now",
        "leave out --recipe",
    )
    assert "epochs" not in result.stderr.partition("hint:")[0]
    assert (trained / "metrics.jsonl").read_bytes() == before
    longer = ("train.epochs=2", "checkpoint.keep=5")
    result = invoke("finetune", "--output", trained, "--resume", "--device", "cpu", *longer)
    assert result.exit_code == 0, result.stderr
    assert "4 of 8 steps done" in result.stderr
    assert (trained / "latest").read_text() == "epoch1\n"


@pytest.mark.parametrize(
    ("at", "hint"),
    [
        ("llama_acc.core.train.loop.Loop.run", "hint: resume with: {again}"),
        ("llama_acc.core.train.trainer.Trainer.probe_peak_memory", "hint: nothing was written: type the same command"),
    ],
)
def test_a_run_that_finds_no_room_names_the_command_that_goes_on(
    at: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(at, full)
        result = invoke(*QUICKSTART, "--output", output, "--force", "train.max_steps=1", "train.warmup_epochs=0")
    assert result.exit_code == 1
    assert "error: the disk is full: free some space; the last checkpoint before this is whole" in result.stderr
    again = ("finetune", "--output", output, "--resume", "--device", "cpu", "--force")
    assert hint.format(again="llama-acc " + shlex.join(map(str, again))) in result.stderr
    if output.exists():
        assert invoke(*again).exit_code == 0
