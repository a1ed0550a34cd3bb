"""What fits and what would; a run that cannot fit is refused before anything is loaded."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llama_acc.cli.run_console import describe_plan
from llama_acc.core import finetune
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.memory import fit, guard
from llama_acc.core.memory.fit import FILLED, WAYS, _largest, best_changes, fill, filled, fitting
from llama_acc.core.memory.guard import _bound, check_fits, fill_memory, run_in_subprocess, setup_of_run
from llama_acc.core.memory.predict import PARTS, MemoryRequest, Usage, predict, recipe_and_config, setup_of
from llama_acc.core.memory.simulate import Setup
from llama_acc.core.recipe import Recipe, TrainSection
from llama_acc.core.train.plan import Plan
from tests.core.memory.setups import NF4, setup
from tests.core.tiny import CPU
from tests.core.train.runs import assert_bitwise_equal, plan_of, quickstart, run, saved_state, saved_weights

GPU = torch.device("cuda")


def usage(allocated: int, slack: int) -> Usage:
    return Usage(dict.fromkeys(PARTS, 0) | {"activations kept": allocated, "allocator slack": slack}, "loss")


@pytest.mark.parametrize("segment", [1, 20, 333])
@pytest.mark.parametrize("each", [1, 7, 60])
def test_the_largest_count_below_the_memory_is_found_where_slack_goes_in_steps(segment: int, each: int) -> None:
    tried = []

    def taken(count: int) -> Usage:
        tried.append(count)
        allocated = 1000 + each * count
        return usage(allocated, -allocated % segment)

    for limit in (1, 100, 256):
        for count_that_fits in (1, 2, 3, 17, 64, 99, 255):
            memory = taken(count_that_fits).total
            largest = max(count for count in range(1, limit + 1) if taken(count).total <= memory)
            tried.clear()
            assert _largest(taken(1), taken, memory, limit) == largest
            assert len(tried) <= 24


def test_methods_come_best_first_with_what_an_example_takes_in_each() -> None:
    shape = "model.params={dim: 64, n_layers: 1, n_heads: 4, multiple_of: 16, vocab_size: 300, max_seq_len: 512}"
    keys = (shape, "model.max_seq_len=512", "train.global_batch_size=1")
    request = MemoryRequest(recipe="alpaca", batch_size=1, max_tokens=64, overrides=keys)
    fits = list(fitting(request, memory=1 << 20))
    assert [(fit.method, fit.quantize) for fit in fits] == WAYS
    assert all(fit.batch_size == fit.longest == 0 for fit in fits)
    needed = predict(setup_of(replace(request, tuning="full", quantize="none"))).total
    assert fits[0].least == needed


AUTO = tuple(f"train.{key}=auto" for key in ("batch_size", "micro_batch_tokens", "activation_checkpointing"))
# An optimizer step of many tokens.
LARGE = (*AUTO, "train.precision=bf16", "data.sources.0.weight=100", "train.global_batch_size=640")


@pytest.mark.parametrize(
    ("memory", "left_open", "expected"),
    [
        (10_000_000, AUTO, (16_384, False)),
        (1_638_400, AUTO, (16_384, False)),
        (1_638_399, AUTO, (12_288, False)),
        (409_600, AUTO, (4096, False)),
        (409_599, AUTO, (16_384, True)),  # fewer tokens without recomputing are too few
        (100_000, AUTO, (9216, True)),
        (500, AUTO, (1024, True)),  # nothing fits: what takes least is refused later
        (409_599, AUTO[:2], (3072, False)),
        (300_000, (*AUTO[1:], "train.batch_size=2"), (16_384, True)),
        (300_000, (AUTO[0], AUTO[2], "train.micro_batch_tokens=2048"), (2048, False)),
        (200_000, (AUTO[0], AUTO[2], "train.micro_batch_tokens=2048"), (2048, True)),
    ],
)
def test_auto_is_off_and_on_as_it_fits_then_has_as_many_tokens_as_fit(
    memory: int, left_open: tuple[str, ...], expected: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def taken(section: TrainSection) -> Usage:
        asked.append(section)
        tokens = section.bounds()[1]
        assert tokens is not None
        return usage(tokens * (10 if section.activation_checkpointing else 100) - 20, 20)

    train = quickstart("train.activation_checkpointing=false", *left_open).train
    monkeypatch.setattr(fit, "predict", taken)
    section = lambda train: train  # noqa: E731
    chosen, found = fill(train, section, memory, lambda function, *arguments: function(*arguments))  # type: ignore[arg-type]
    assert (chosen.micro_batch_tokens, chosen.activation_checkpointing) == expected
    assert chosen.batch_size == (2 if "train.batch_size=2" in left_open else train.global_batch_size)
    assert found == taken(chosen)
    assert len(asked) <= 8, "a prediction of a large model takes seconds"


def test_on_a_kind_of_gpu_a_base_is_streamed_where_it_does_not_fit_otherwise() -> None:
    shape = "model.params={dim: 256, n_layers: 12, n_heads: 4, vocab_size: 300, max_seq_len: 512}"
    keys = (shape, "train.activation_checkpointing=true", "train.micro_batch_tokens=128", "train.global_batch_size=2")
    request = MemoryRequest(recipe="alpaca-lora-nf4", max_tokens=64, overrides=keys)
    assert recipe_and_config(request)[0].train.stream_base == "auto"
    least = int(predict(setup_of(request)).total / FILLED)
    for memory, gpus, is_streamed in ((least + 2, None, False), (least - 2, None, True), (least - 2, 2, False)):
        found = filled(replace(request, gpus=gpus), memory, math.inf)
        assert found.settings.stream_base is is_streamed
        if is_streamed:
            assert predict(found).total <= FILLED * memory
    kept = replace(request, overrides=(*keys, "train.stream_base=false"))
    assert not filled(kept, least - 2, math.inf).settings.stream_base


def test_a_run_fills_the_gpu_it_finds_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(*LARGE)

    def total(tokens: int, recompute: bool) -> int:
        section = plan.recipe.train.without_auto(tokens, recompute)
        return predict(setup_of_run(plan.with_chosen(section, ""), 1, "cuda")).total

    for tokens, recompute in ((4096, False), (2048, True)):
        free = int(total(tokens, recompute) / FILLED) + 2
        monkeypatch.setattr(guard, "free_memory", lambda device, free=free: free)
        chosen, said = fill_memory(plan, 1, GPU)
        assert (chosen.micro_batch_tokens, chosen.activation_checkpointing) == (tokens, recompute)
        checkpointing = "with" if recompute else "without"
        assert said.startswith(f"at most {tokens:,} tokens, {checkpointing} activation checkpointing: auto, ")
        filled = plan.with_chosen(chosen, said)
        assert filled.settings.activation_checkpointing is recompute
        assert ("micro-batches", said) in describe_plan(filled)
        (groups,) = filled.micro_batches(filled.train, filled.items(0), 1)
        assert tokens / 2 < max(filled.train.lengths[group].sum() for group in groups) <= tokens
        assert len(groups) > 1
        assert filled.accumulates(1)
    monkeypatch.setattr(guard, "free_memory", lambda device: 1 << 40)
    assert fill_memory(plan, 1, GPU)[1].endswith(
        "activation checkpointing: auto, far below the 1,024.0 GiB that are free"
    )
    chosen, said = fill_memory(plan, 1, CPU)
    assert (chosen.batch_size, chosen.micro_batch_tokens, chosen.activation_checkpointing) == (4, None, True)
    assert said == "at most 4 examples, with activation checkpointing: what auto is on cpu"


def test_a_resumed_run_goes_on_with_what_it_chose_whatever_gpu_it_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = []

    def on_a_gpu(plan: Plan, world_size: int, device: torch.device, resumed: Path | None) -> tuple[TrainSection, str]:
        monkeypatch.setattr(guard, "free_memory", lambda device: free[-1])
        return fill_memory(plan, world_size, GPU, resumed)

    monkeypatch.setattr(finetune, "fill_memory", on_a_gpu)
    steps = (*LARGE, "train.warmup_epochs=0", "checkpoint.every_steps=1", "checkpoint.keep=0")
    free.append(int(predict(setup_of_run(_chosen(plan_of(*steps), 4096), 1, "cuda")).total / FILLED) + 2)
    whole = run(tmp_path / "whole", *steps, "train.max_steps=2").output
    run(tmp_path / "run", *steps, "train.max_steps=1")
    free.append(1 << 40)
    resumed = run(tmp_path / "run", *steps, "train.max_steps=2", resume=True).output
    kept = Recipe.load(resumed / "recipe.yaml").train
    assert (kept.batch_size, kept.micro_batch_tokens, kept.activation_checkpointing) == (640, 4096, False)
    last = "epoch0-iter2"
    assert_bitwise_equal(saved_weights(resumed / last), saved_weights(whole / last))
    assert_bitwise_equal(saved_state(resumed / last), saved_state(whole / last))


def _chosen(plan: Plan, tokens: int) -> Plan:
    return plan.with_chosen(plan.recipe.train.without_auto(tokens, recompute=False), "")


def test_the_largest_micro_batch_of_the_data_is_what_is_predicted() -> None:
    plan = plan_of("train.batch_size=2")
    found = setup_of_run(plan, 1, "cpu")
    assert (len(found.lengths), found.micro_batches) == (2, 2)
    assert found.tokens >= max(plan.train.lengths)
    assert found.labels is not None
    assert 0 < found.labels < found.tokens


def test_a_run_that_does_not_fit_is_refused_with_three_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("train.batch_size=4", "train.activation_checkpointing=false")
    needed = predict(setup_of_run(plan, 1, "cuda")).allocated
    monkeypatch.setattr(guard, "free_memory", lambda device: needed)
    check_fits(plan, Parallel(), GPU)
    monkeypatch.setattr(guard, "free_memory", lambda device: needed - 1)
    with pytest.raises(UserError) as refused:
        check_fits(plan, Parallel(), GPU)
    assert "the run does not fit: it takes" in refused.value.message
    assert "activations kept: " in refused.value.message
    assert refused.value.hint is not None
    assert refused.value.hint.count("(saves ") == 3
    assert "train.activation_checkpointing=true" in refused.value.hint
    assert "--force" in refused.value.hint


def test_nothing_is_loaded_or_written_and_force_starts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "free_memory", lambda device: 1 << 20)
    with pytest.raises(UserError, match="does not fit"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", "train.max_steps=1", "train.warmup_epochs=0", force=True)
    assert (tmp_path / "run" / "latest").exists()


def test_a_small_run_is_not_simulated_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "run_in_subprocess", lambda *_: pytest.fail("it was"))
    check_fits(plan_of(), Parallel(), CPU)


@pytest.mark.parametrize(("method", "world_size"), [("full", 4), ("adapter", 1), ("nf4", 1)])  # fsdp keeps less
def test_what_is_not_simulated_is_never_more_than_what_is_free(method: str, world_size: int) -> None:
    changes = (*(NF4 if method == "nf4" else ()),)
    changes += (f"tuning.method={'lora' if method == 'nf4' else method}", "train.activation_checkpointing=false")
    plan = plan_of(*changes, "train.precision=fp32", "parallel.data_parallel=ddp")
    for device_type in ("cpu", "cuda"):
        run = setup_of_run(plan, world_size, device_type)
        predicted = predict(run).allocated
        if device_type == "cuda":
            predicted -= 9 << 20  # cuBLAS's workspace: a share of it for so small a model
        assert predicted <= _bound(run)


def test_changes_that_leave_the_run_what_it_is_come_first_and_save_what_they_say() -> None:
    run = setup("train.activation_checkpointing=false", lengths=(256, 256), micro_batches=2, n_layers=2)
    allocated = predict(run).allocated
    found = best_changes(run, allocated - 1)
    assert found[0].keeps_the_run
    assert all(change.fits for change in found)
    (checkpointing,) = (change for change in found if change.keys == "train.activation_checkpointing=true")
    again = setup("train.activation_checkpointing=true", lengths=(256, 256), micro_batches=2, n_layers=2)
    assert checkpointing.saves == allocated - predict(again).allocated
    (streamed,) = best_changes(setup("tuning.method=lora", *NF4, lengths=(100,)), 0)
    assert streamed.keys.startswith("train.stream_base=true")
    assert best_changes(setup("tuning.method=lora", *NF4, "train.stream_base=true", lengths=(100,)), 0) == []


def test_slack_alone_is_no_reason_for_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(run: Setup) -> Usage:
        allocated, slack = 100_000, 20_000
        if run.settings.activation_checkpointing:
            slack = 0
        elif len(run.lengths) == 1:
            assert run.micro_batches == 2, "smaller micro-batches are more of them"
            allocated, slack = 99_950, 0
        elif max(run.lengths) < 512:
            assert run.micro_batches == 1
            allocated, slack = 90_000, 40_000
        elif run.is_quantized:
            allocated = 60_000
        elif run.config.tuning.method == "lora":
            allocated, slack = 80_000, 30_000
        return usage(allocated, slack)

    monkeypatch.setattr(fit, "predict", predicted)
    run = setup("train.activation_checkpointing=false", lengths=(512, 512))
    quantized, lora, shorter = "checkpoint.trainable_only=true", "tuning.method=lora", "data.max_tokens=256"
    found = [(change.keys.split()[-1], change.saves, change.fits) for change in best_changes(run, 80_000)]
    assert found == [(quantized, 40_000, True), (lora, 20_000, True), (shorter, 10_000, False)]
    found = [(change.keys.split()[-1], change.saves, change.fits) for change in best_changes(run, 80_000, True)]
    assert found == [(quantized, 40_000, True), (lora, 20_000, False)]  # shorter ones take as much more of slack


def test_the_answer_of_another_process_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    run = setup("parallel.data_parallel=fsdp", world_size=2, n_layers=1)
    here = run_in_subprocess(predict, run)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert run_in_subprocess(predict, run) == here
