"""The largest micro-batch is computed before the first step: memory runs out then or never, and nothing changes."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_acc.core.atomic import check_manifest
from llama_acc.core.data.batches import MicroBatch
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import RunError
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.train import step
from llama_acc.core.train.trainer import Trainer
from tests.core.tiny import CPU
from tests.core.train.runs import Notes, assert_bitwise_equal, assert_same_run, plan_of, run

SAVING = ("checkpoint.every_steps=2", "train.batch_size=3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "run", *SAVING).output


def test_a_rehearsal_changes_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(plan_of(), CPU, None, Parallel())
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    before = torch.get_rng_state()
    trainer.probe_peak_memory()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert_bitwise_equal(dict(trainer.model.named_parameters()), weights)
    assert not any(value.any() for _, _, value in trainer.optimizer.state_tensors())
    monkeypatch.setattr(Trainer, "probe_peak_memory", lambda trainer: None)
    run(tmp_path, *SAVING)
    assert_same_run(tmp_path, whole)


def test_memory_that_runs_out_is_reported_with_the_documents_and_what_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_peak_memory = Trainer.probe_peak_memory

    def too_large(trainer: Trainer) -> None:
        probe_peak_memory(trainer)
        torch.empty(1 << 60)  # the real allocator's error

    monkeypatch.setattr(Trainer, "probe_peak_memory", too_large)
    with pytest.raises(RunError) as failed:
        run(tmp_path / "run")
    text = str(failed.value)
    assert text.startswith("out of memory while the largest micro-batch was tried")
    assert f"documents of {max(plan_of().train.lengths)}" in text
    for part in ("weights", "optimizer", "trainable masters", "activations kept"):
        assert f"  {part}: " in text
    assert "Every checkpoint that was saved is whole" in text
    assert "what would help most: " in text
    assert not (tmp_path / "run" / "latest").exists()


def test_memory_that_runs_out_at_a_step_leaves_the_checkpoint_before_it_to_resume_from_to_the_bit(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a report that cannot be written does not hide why the run ended."""
    lengths: list[list[int]] = []
    computed, calls, notes = step.forward, count(1), Notes()

    def forward(model: Transformer, batch: MicroBatch, *rest: Any) -> Tensor:
        lengths.append(batch.lengths)
        if next(calls) == 3 * 3 + 2:  # the second of three micro-batches of step 4
            (tmp_path / "run" / "report.md").mkdir()
            torch.empty(1 << 60)  # the real allocator's error
        return computed(model, batch, *rest)

    with monkeypatch.context() as patched, pytest.raises(RunError) as failed:
        patched.setattr(step, "forward", forward)
        run(tmp_path / "run", *SAVING, callback=notes)
    text = str(failed.value)
    assert text.startswith("out of memory at step 4: ")
    assert f"documents of {', '.join(map(str, sorted(lengths[-1], reverse=True)))} tokens" in text
    assert "Predicted at most" in text
    assert "what would help most: " in text
    assert [note for note in notes.texts if note.startswith("report.md could not be written: ")]
    (tmp_path / "run" / "report.md").rmdir()
    assert (tmp_path / "run" / "latest").read_text() == "epoch0-iter2\n"
    check_manifest(tmp_path / "run" / "epoch0-iter2", verify=True)
    run(tmp_path / "run", *SAVING, resume=True)
    assert_same_run(tmp_path / "run", whole)
