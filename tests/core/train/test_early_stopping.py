"""A run that ends when its validation loss does not fall any more."""

import json
from pathlib import Path

from tests.core.train.runs import Notes, assert_bitwise_equal, metrics, names, plan_of, run, saved_weights

HELD_OUT = "data.validation.fraction=0.25"
# A rate that is too high after some steps.
WORDS = (HELD_OUT, "data.validation.every_steps=2", "train.epochs=30", "optimizer.lr=3e-2", "train.warmup_epochs=2")
EARLY = (*WORDS, "train.early_stopping_patience=3", "checkpoint.keep=2", "checkpoint.every_epochs=0")


def validations(output: Path) -> list[tuple[int, float, float]]:
    lines = [line for line in metrics(output) if "validation_loss" in line]
    return [(line["step"], line["validation_loss"], line["validations_since_best"]) for line in lines]


def test_a_run_ends_after_so_many_validations_without_a_better_one_and_keeps_the_best(tmp_path: Path) -> None:
    whole, stopped, notes = tmp_path / "whole", tmp_path / "stopped", Notes()
    finished = run(whole, *EARLY, callback=notes)
    found = validations(whole)
    best = min(found, key=lambda line: line[1])
    last = found[-1]
    assert last == (best[0] + 6, last[1], 3)
    assert all(since < 3 for _, _, since in found[:-1])
    plan = plan_of(*EARLY)
    assert 0 < best[0] < last[0] < plan.total_steps
    # For what fits on the disk: one at each validation that may come, and at the end.
    assert plan.save_count() == plan.total_steps // 2 + 1
    kept = {plan.checkpoint_name(best[0]), plan.checkpoint_name(last[0])}
    assert names(whole) >= kept
    assert {name for name in names(whole) if name.startswith("epoch")} == kept
    assert finished.checkpoint.name == plan.checkpoint_name(last[0])
    said = (
        f"in 3 validations the loss was not below the {best[1]:.4f} of step {best[0]}, {plan.checkpoint_name(best[0])}"
    )
    assert said in (whole / "report.md").read_text()
    assert any(said in note for note in notes.texts)
    # The count is kept over a resume, and what has ended stays so.
    run(stopped, *EARLY, f"train.max_steps={best[0] + 2}")
    for _ in range(2):
        run(stopped, *EARLY, resume=True)
        assert metrics(stopped) == metrics(whole)
        assert_bitwise_equal(*(saved_weights(folder / finished.checkpoint.name) for folder in (stopped, whole)))
    more = json.loads((stopped / finished.checkpoint.name / "state" / "progress.json").read_text())["best"]
    assert more == {"step": best[0], "loss": best[1], "since": 3}
    run(stopped, *EARLY, "train.early_stopping_patience=4", f"train.max_steps={last[0] + 1}", resume=True)
    assert validations(stopped)[:-1] == found
    # A last validation that is not due does not count.
    assert validations(stopped)[-1][::2] == (last[0] + 1, 3)
