"""What a run will do, from its recipe and data alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llama_acc.cli.run_console import describe_plan
from llama_acc.core.checkpoint.save import write_checkpoint
from llama_acc.core.data.batches import build
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.train.plan import make_plan
from llama_acc.core.train.trainer import Trainer
from tests.core.tiny import CPU
from tests.core.train.runs import Notes, plan_of, quickstart


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["train.epochs=3", "train.global_batch_size=5"], 21),
        (["train.epochs=0.6"], 3),
        (["train.epochs=1.25"], 5),
        (["train.epochs=2.5"], 10),
        (["train.epochs=2.51"], 11),
        (["train.epochs=0.1"], 1),
        (["train.max_steps=3"], 3),
        (["train.max_steps=300"], 8),
    ],
    ids=str,
)
def test_steps_are_items_by_the_global_batch_and_epochs_rounded_up(overrides: list[str], steps: int) -> None:
    assert plan_of("train.warmup_epochs=0", *overrides).total_steps == steps


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["checkpoint.every_epochs=1"], ["epoch0", "epoch1", "epoch2"]),
        (["checkpoint.every_epochs=2"], ["epoch1", "epoch2"]),
        (["checkpoint.every_epochs=0"], ["epoch2"]),
        (["checkpoint.every_epochs=1", "train.epochs=1.5"], ["epoch0", "epoch1-iter2"]),
        (["checkpoint.every_epochs=1", "train.max_steps=7"], ["epoch0", "epoch1-iter3"]),
        (["checkpoint.every_epochs=0", "train.max_steps=2"], ["epoch0-iter2"]),
        (
            ["checkpoint.every_epochs=0", "checkpoint.every_steps=3"],
            ["epoch0-iter3", "epoch1-iter3", "epoch2-iter3", "epoch2"],
        ),
        (["checkpoint.every_epochs=1", "checkpoint.every_steps=2", "train.epochs=1"], ["epoch0-iter2", "epoch0"]),
    ],
    ids=str,
)
def test_checkpoints_are_due_where_the_recipe_says_and_at_the_end(overrides: list[str], expected: list[str]) -> None:
    plan = plan_of("train.epochs=3", *overrides)
    saved = [step for step in range(1, plan.total_steps + 1) if plan.saves_at(step)]
    assert [plan.checkpoint_name(step) for step in saved] == expected
    assert [plan.save_count(done) for done in saved] == list(range(len(saved)))[::-1]
    assert plan.save_count() == len(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["data.validation.fraction=0.25"], [3, 6, 8]),
        (["data.validation.fraction=0.25", "data.validation.every_steps=2"], [2, 4, 6, 8]),
        (["data.validation.fraction=0.25", "data.validation.every_steps=5"], [5, 8]),
    ],
)
def test_validation_is_due_each_epoch_or_every_so_many_steps_and_at_the_end(
    overrides: list[str], expected: list[int]
) -> None:
    plan = plan_of("train.epochs=2.5", *overrides)
    assert [step for step in range(1, plan.total_steps + 1) if plan.validates_at(step)] == expected


def test_held_out_items_are_never_trained_on() -> None:
    plan = plan_of("data.validation.fraction=0.25")
    assert plan.validation is not None
    trained = {plan.train.origin(i) for i in range(len(plan.train))}
    held_out = {plan.validation.origin(i) for i in range(len(plan.validation))}
    assert (len(trained), len(held_out), len(trained | held_out)) == (24, 8, 32)
    assert plan.report["items"] == 32


def test_every_item_is_used_once_an_epoch_and_the_last_step_takes_what_is_left() -> None:
    plan = plan_of("train.global_batch_size=5", "train.epochs=3")
    orders = []
    for epoch in range(3):
        steps = [plan.items(epoch * 7 + step) for step in range(7)]
        assert [len(items) for items in steps] == [5, 5, 5, 5, 5, 5, 2]
        orders.append(np.concatenate(steps).tolist())
        assert sorted(orders[-1]) == list(range(32))
    assert orders[0] != orders[1] != orders[2]
    thrice = plan_of("train.global_batch_size=5", "data.sources.0.weight=2.5")
    assert (thrice.items_per_epoch, thrice.steps_per_epoch) == (80, 16)
    used = np.concatenate([thrice.items(step) for step in range(16)])
    assert sorted(np.bincount(used).tolist()) == [2] * 16 + [3] * 16
    in_order = plan_of("train.shuffle=false")
    assert np.concatenate([in_order.items(step) for step in (4, 5, 6, 7)]).tolist() == list(range(32))


@pytest.mark.parametrize(
    "override",
    ["train.batch_size=1", "train.batch_size=3", "train.micro_batch_tokens=40", "parallel.data_parallel=fsdp"],
)
def test_which_items_a_step_takes_does_not_depend_on_how_they_are_dealt(override: str) -> None:
    plain, plan = plan_of(), plan_of(override)
    for step in range(8):
        items = plan.items(step)
        assert (plain.items(step) == items).all()
        (groups,) = plan.micro_batches(plan.train, items, 1)
        assert sorted(item for group in groups for item in group) == sorted(items.tolist())
        batches = [build(plan.train, group) for group in groups]
        if override == "train.micro_batch_tokens=40":
            assert all(sum(batch.lengths) <= 40 or len(batch.lengths) == 1 for batch in batches)
        elif "batch_size" in override:
            assert all(len(batch.lengths) <= int(override[-1]) for batch in batches)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "overrides", [(), ("train.batch_size=3",), ("train.micro_batch_tokens=90",), ("train.max_steps=2",)], ids=str
)
def test_no_micro_batch_of_the_run_has_more_tokens_than_the_largest(overrides: tuple[str, ...], ranks: int) -> None:
    plan = plan_of("train.epochs=5", *overrides)
    dealt = [
        int(plan.train.lengths[group].sum())
        for step in range(plan.total_steps)
        for own in plan.micro_batches(plan.train, plan.items(step), ranks)
        for group in own
    ]
    assert int(plan.train.lengths[plan.largest_micro_batch(ranks)].sum()) == max(dealt)
    assert plan_of("train.epochs=1e6", *overrides).largest_micro_batch(ranks), "at once, of however many epochs"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.params=null", "the model's shape is not known"),
        ("model.params.vocab_size=32000", "tokenizer and model do not fit"),
        ("model.params.dims=3", "unknown key 'dims': did you mean 'dim'"),
        ("parallel.model_parallel_size=4", r"n_kv_heads \(2\) is not divisible by the model-parallel size \(4\)"),
        # No step could change a weight.
        ("train.max_steps=1", "the run has one step, and a warm-up begins at rate 0"),
        ("optimizer={lr: 0}", r"optimizer\.lr is 0"),
    ],
)
def test_what_is_wrong_with_the_input_is_found_while_planning(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(override)


def test_a_plan_in_words() -> None:
    lines = dict(describe_plan(plan_of("data.validation.fraction=0.25", "checkpoint.keep=1")))
    assert lines["model"] == "2 layers, width 32, 4 heads (2 for keys and values), vocabulary 640"
    assert lines["steps"] == "6 of 8 examples; 3 in an epoch, 2 epochs, fp32"
    assert (lines["weights"], lines["validation"]) == ("random (seed 0)", "8 items")
    nf4 = plan_of("tuning.method=bias_norm", "tuning.quantize=nf4", "checkpoint.trainable_only=true")
    whole = ": wq wk wv wo w1 w2 w3 of every block, output; nothing else"
    assert dict(describe_plan(nf4))["quantized"].endswith(whole)
    never = dict(describe_plan(plan_of("checkpoint.every_steps=4")))["checkpoints"]
    assert never.endswith(" kept; checkpoint.every_steps=4 saves none, as an epoch has 4 steps")
    assert "every_steps" not in dict(describe_plan(plan_of("checkpoint.every_steps=3")))["checkpoints"]


@pytest.mark.parametrize(("steps", "warned"), [(2, True), (19, True), (20, False)])
def test_steps_of_rate_0_that_count_are_a_warning(steps: int, warned: bool) -> None:
    """One of 19 is more than 5%, one of 20 is not."""
    said = dict(describe_plan(plan_of("train.epochs=5", f"train.max_steps={steps}"))).get("warning", "")
    assert said.startswith(f"1 of the {steps} steps ({1 / steps:.0%}) has rate 0 and changes nothing" * warned)
    assert bool(said) == warned
    assert "warning" not in dict(describe_plan(plan_of("train.warmup_epochs=0", f"train.max_steps={steps}")))


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (["train.precision=fp32"], torch.float32),
        (["train.precision=bf16"], torch.bfloat16),
        (["train.precision=bf16", "checkpoint.dtype=fp32"], torch.float32),
    ],
)
def test_a_checkpoint_has_the_type_and_takes_the_disk_space_that_was_foretold(
    overrides: list[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    plan = plan_of("model.params.dim=64", *overrides)
    trainer = Trainer(plan, CPU, None, Parallel())
    trainer.advance()
    write_checkpoint(trainer.snapshot(), tmp_path / "epoch0", keep=0)
    assert plan.save_dtype == dtype
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 0.95 * plan.checkpoint_bytes() < written < plan.checkpoint_bytes()


@pytest.mark.parametrize(
    ("dim", "width", "size", "said"),
    [
        (96, 256, 1, ""),
        (128, 256, 2, ""),
        # Whole rows of 96 values stay whole blocks where a part has an even number of them.
        (96, 256, 2, "wo (96 x 48)"),
        (128, 192, 2, "w2 (128 x 96)"),
        (128, 256, 4, "wo (128 x 32)"),
    ],
)
def test_parts_in_nf4_that_are_other_blocks_are_named(dim: int, width: int, size: int, said: str) -> None:
    keys = ("tuning.method=bias_norm", "tuning.quantize=nf4", "checkpoint.trainable_only=true")
    params = f"{{dim: {dim}, n_layers: 1, n_heads: 4, multiple_of: {width}, ffn_dim_multiplier: 0.1, max_seq_len: 256}}"
    notes = Notes()
    make_plan(quickstart(*keys, f"model.params={params}", f"parallel.model_parallel_size={size}"), notes)
    parts = f"size {size}: parts of {said} are not the whole matrix's blocks of 64 values"
    assert [parts in text for text in notes.texts] == [True] * bool(said)
