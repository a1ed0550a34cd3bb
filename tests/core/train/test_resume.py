"""A run that was stopped and resumed is, to the bit, the run that never was; another run is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_acc.core.atomic import write_manifest
from llama_acc.core.errors import UserError
from tests.core.train.runs import Notes, assert_bitwise_equal, losses, metrics, names, run, saved_state, saved_weights

LONG = ("train.epochs=3", "checkpoint.every_epochs=1", "checkpoint.keep=0")  # 12 steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    return run(tmp_path_factory.mktemp("whole") / "run", *LONG).output


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("two") / "run", "train.max_steps=2").output


@pytest.fixture
def begun(two_steps: Path, tmp_path: Path) -> Path:
    """A run that was stopped after two steps."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def assert_same_run(resumed: Path, whole: Path, last: str = "epoch2") -> None:
    lines = metrics(resumed)
    assert [line for line in lines if "loss" in line] == [line for line in metrics(whole) if "loss" in line]
    # A run that was stopped validated once more, at its end.
    assert all(line in lines for line in metrics(whole))
    assert_bitwise_equal(saved_weights(resumed / last), saved_weights(whole / last))
    assert_bitwise_equal(saved_state(resumed / last), saved_state(whole / last))


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.precision=bf16"],
        ["train.precision=bf16", "checkpoint.dtype=fp32"],
        [
            "train.precision=fp32",
            "checkpoint.dtype=bf16",
            "data.validation.fraction=0.25",
            "data.validation.every_steps=5",
            "train.global_batch_size=6",
        ],
    ],
    ids=str,
)
def test_resume_is_bitwise_the_uninterrupted_run(overrides: list[str], tmp_path: Path) -> None:
    common = ["train.epochs=3", "checkpoint.every_epochs=0", *overrides]
    run(tmp_path / "whole", *common)
    for number, stop in enumerate(("train.max_steps=4", "train.max_steps=9", "train.max_steps=null")):
        run(tmp_path / "resumed", *common, stop, resume=number > 0)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_what_a_killed_run_did_after_its_last_checkpoint_is_done_again(whole: Path, tmp_path: Path) -> None:
    """A first checkpoint that nothing names yet is found, too."""
    killed = tmp_path / "killed"
    run(killed, *LONG, "train.max_steps=4")
    log = killed / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 7, "loss": 99.0}\n{"step": 8, "lo')
    (killed / ".writing-epoch1-iter3").mkdir()
    (killed / ".writing-epoch1-iter3" / "config.json").write_text("{")
    (killed / "latest").unlink()
    notes = Notes()
    run(killed, *LONG, resume=True, callback=notes)
    assert any("epoch0, 4 of 12 steps done" in text for text in notes.texts)
    assert_same_run(killed, whole)
    assert not any(name.startswith(".") for name in names(killed))


def test_a_resume_with_nothing_left_to_do_changes_nothing(begun: Path) -> None:
    before = metrics(begun), saved_weights(begun / "epoch0-iter2"), names(begun)
    recipe = (begun / "recipe.yaml").read_text()
    finished = run(begun, "train.max_steps=2", "parallel.data_parallel=fsdp", resume=True)
    assert (begun / "recipe.yaml").read_text() == recipe
    assert (finished.checkpoint, finished.loss) == (begun / "epoch0-iter2", before[0][-1]["loss"])
    assert (metrics(begun), names(begun)) == (before[0], before[2])
    assert_bitwise_equal(saved_weights(begun / "epoch0-iter2"), before[1])
    (begun / "metrics.jsonl").unlink()
    assert run(begun, "train.max_steps=2", resume=True).loss is None


def test_how_long_how_often_saved_and_how_dealt_may_change(begun: Path) -> None:
    """A key that the run's recipe does not have, as it was not there yet, has its default."""
    kept = begun / "epoch0-iter2" / "recipe.yaml"
    before, key, after = kept.read_text().partition("  on_error: stop\n")
    assert key
    kept.write_text(before + after)
    write_manifest(kept.parent)
    with pytest.raises(UserError, match=r"data\.on_error: 'stop' before, 'skip' now"):
        run(begun, "data.on_error=skip", resume=True)
    run(
        begun,
        *("train.epochs=3", "train.batch_size=2", "train.micro_batch_tokens=100", "checkpoint.keep=1"),
        *("checkpoint.every_steps=1", "checkpoint.every_epochs=2", "parallel.data_parallel=fsdp"),
        resume=True,
    )
    assert len(losses(begun)) == 12


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-2 if path.parent.name == "state" else len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("state/training-00-of-01.safetensors", flip_a_byte, "training-00-of-01.safetensors was changed"),
        ("state/progress.json", flip_a_byte, "state/progress.json was changed"),
        # With float32 weights there are no separate masters: the weights are part of what a resume needs.
        ("consolidated.00-of-01.model.pth", flip_a_byte, "consolidated.00-of-01.model.pth was changed"),
        ("state", shutil.rmtree, "holds no training state to resume from"),
    ],
)
def test_a_damaged_state_is_never_resumed_from(
    file: str, damage: Callable[[Path], None], said: str, begun: Path
) -> None:
    damage(begun / "epoch0-iter2" / file)
    with pytest.raises(UserError) as refused:
        run(begun, resume=True)
    assert said in refused.value.message


def test_a_run_is_not_made_shorter_than_it_is(tmp_path: Path) -> None:
    run(tmp_path, "train.max_steps=3")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="has done 3 steps, the recipe asks for 2"):
        run(tmp_path, "train.max_steps=2", "checkpoint.keep=1", resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_newest_means_written_last_whatever_an_abandoned_run_left(tmp_path: Path) -> None:
    """A kill after a checkpoint took its name and before `latest` named it leaves one from the future."""
    run(tmp_path, *LONG, "train.max_steps=8")
    (tmp_path / "latest").write_text("epoch0\n")
    run(tmp_path, *LONG, "train.max_steps=6", "checkpoint.keep=1", resume=True)
    assert (tmp_path / "latest").read_text() == "epoch1-iter2\n"
    assert (tmp_path / "epoch1-iter2").is_dir()
    run(tmp_path, *LONG, resume=True)
    assert len(losses(tmp_path)) == 12


def test_the_random_number_generator_is_the_seeds_and_goes_on_where_it_was(begun: Path) -> None:
    torch.manual_seed(22)
    run(begun, resume=True)
    files = [begun / name / "state" / "rng-00000-of-00001.safetensors" for name in ("epoch0-iter2", "epoch1")]
    first, second = (load_file(file)["cpu"] for file in files)
    assert torch.equal(first, second)
    assert torch.equal(first, torch.manual_seed(0).get_state())  # of train.seed
