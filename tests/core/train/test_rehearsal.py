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
from llama_acc.core.train.callback import Callback
from llama_acc.core.train.trainer import Trainer, largest_micro_batch
from tests.core.tiny import CPU
from tests.core.train.runs import assert_bitwise_equal, metrics, plan_of, run, saved_state, saved_weights


def test_a_probe_peak_memoryd_run_is_bitwise_the_run_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = run(tmp_path / "with")
    monkeypatch.setattr(Trainer, "probe_peak_memory", lambda trainer: None)
    without = run(tmp_path / "without")
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    assert_bitwise_equal(saved_weights(with_it.checkpoint), saved_weights(without.checkpoint))
    assert_bitwise_equal(saved_state(with_it.checkpoint), saved_state(without.checkpoint))


def test_a_rehearsal_leaves_no_gradient_and_no_trace_in_the_random_numbers() -> None:
    trainer = Trainer(plan_of(), CPU, None, Parallel())
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    before = torch.get_rng_state()
    trainer.probe_peak_memory()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert_bitwise_equal(dict(trainer.model.named_parameters()), weights)
    assert not any(value.any() for _, _, value in trainer.optimizer.state_tensors())


@pytest.mark.parametrize("data_size", [1, 2])
@pytest.mark.parametrize(
    "overrides", [(), ("train.batch_size=3",), ("train.micro_batch_tokens=90",), ("train.max_steps=2",)], ids=str
)
def test_no_micro_batch_of_the_run_has_more_tokens(overrides: tuple[str, ...], data_size: int) -> None:
    plan = plan_of("train.epochs=5", *overrides)
    trainer = Trainer(plan, CPU, None, Parallel(data_size=1))
    trainer.parallel = Parallel(data_size=data_size)
    dealt = [
        int(plan.train.lengths[group].sum())
        for step in range(plan.total_steps)
        for group in trainer.split_into_micro_batches(plan.train, trainer.items(step))[0]
    ]
    if data_size == 2:
        trainer.parallel = Parallel(data_size=2, data_rank=1)
        dealt += [
            int(plan.train.lengths[group].sum())
            for step in range(plan.total_steps)
            for group in trainer.split_into_micro_batches(plan.train, trainer.items(step))[0]
        ]
    assert int(plan.train.lengths[largest_micro_batch(plan, data_size)].sum()) == max(dealt)


def test_a_plan_of_very_many_epochs_has_its_largest_micro_batch_at_once() -> None:
    assert largest_micro_batch(plan_of("train.epochs=1e6"), 1)


def test_memory_that_runs_out_is_told_with_the_documents_and_what_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_peak_memory = Trainer.probe_peak_memory

    def too_large(trainer: Trainer) -> None:
        probe_peak_memory(trainer)
        torch.empty(1 << 60)  # the real allocator's error

    monkeypatch.setattr(Trainer, "probe_peak_memory", too_large)
    with pytest.raises(RunError) as told:
        run(tmp_path / "run")
    text = str(told.value)
    longest = max(plan_of().train.lengths)
    assert text.startswith("out of memory while the largest micro-batch was tried")
    assert f"documents of {longest}" in text
    for part in ("weights", "optimizer", "trainable masters", "activations kept"):
        assert f"  {part}: " in text
    assert "Every checkpoint that was saved is whole" in text
    assert "what would help most: " in text
    assert not (tmp_path / "run" / "latest").exists()


def test_memory_that_runs_out_at_a_step_leaves_the_checkpoint_before_it_to_resume_from_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("checkpoint.every_steps=2", "train.batch_size=3")
    whole = run(tmp_path / "whole", *overrides)
    lengths: list[list[int]] = []
    computed = step.forward

    def forward(model: Transformer, batch: MicroBatch, *rest: Any) -> Tensor:
        lengths.append(batch.lengths)
        if len(lengths) == 3 * 3 + 2:  # the second of three micro-batches of step 4
            torch.empty(1 << 60)  # the real allocator's error
        return computed(model, batch, *rest)

    with monkeypatch.context() as patched, pytest.raises(RunError) as told:
        patched.setattr(step, "forward", forward)
        run(tmp_path / "run", *overrides)
    text = str(told.value)
    assert text.startswith("out of memory at step 4: ")
    assert f"documents of {', '.join(map(str, sorted(lengths[-1], reverse=True)))} tokens" in text
    assert "Predicted at most" in text
    assert "what would help most: " in text
    assert (tmp_path / "run" / "latest").read_text() == "epoch0-iter2\n"
    check_manifest(tmp_path / "run" / "epoch0-iter2", contents=True)
    resumed = run(tmp_path / "run", *overrides, resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert_bitwise_equal(saved_weights(resumed.checkpoint), saved_weights(whole.checkpoint))
    assert_bitwise_equal(saved_state(resumed.checkpoint), saved_state(whole.checkpoint))


def test_a_report_that_cannot_be_written_does_not_hide_why_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, calls, notes = step.forward, count(), []

    def forward(*args: Any) -> Tensor:
        if next(calls) == 3 * 3 + 1:
            (tmp_path / "run" / "report.md").mkdir()
            torch.empty(1 << 60)  # the real allocator's error
        return computed(*args)

    class Notes(Callback):
        def note(self, text: str) -> None:
            notes.append(text)

    monkeypatch.setattr(step, "forward", forward)
    with pytest.raises(RunError, match="out of memory at step 4"):
        run(tmp_path / "run", "train.batch_size=3", callback=Notes())
    assert [note for note in notes if note.startswith("report.md could not be written: ")]
