"""What a run will do, from its recipe and data alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_acc.core.checkpoint.save import write_checkpoint
from llama_acc.core.data.batches import build
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.model.transformer import parameter_count
from llama_acc.core.train.log import describe_plan
from llama_acc.core.train.plan import Plan
from tests.core.tiny import CPU
from tests.core.train.runs import plan_of


def saves(plan: Plan) -> list[str]:
    return [plan.checkpoint_name(step) for step in range(1, plan.total_steps + 1) if plan.saves_at(step)]


def test_steps_follow_from_items_epochs_and_the_global_batch() -> None:
    plan = plan_of("train.epochs=3", "train.global_batch_size=5")
    assert (len(plan.train), plan.steps_per_epoch, plan.total_steps) == (32, 7, 21)


@pytest.mark.parametrize(
    ("epochs", "steps"), [("0.6", 3), ("1", 4), ("1.25", 5), ("2.5", 10), ("2.51", 11), ("0.1", 1)]
)
def test_a_fraction_of_an_epoch_is_rounded_up_to_whole_steps(epochs: str, steps: int) -> None:
    assert plan_of(f"train.epochs={epochs}", "train.warmup_epochs=0").total_steps == steps


def test_max_steps_ends_a_run_early_and_never_prolongs_it() -> None:
    assert plan_of("train.max_steps=3").total_steps == 3
    assert plan_of("train.max_steps=300").total_steps == 8


def test_a_checkpoint_is_named_after_what_is_done() -> None:
    plan = plan_of()
    names = [plan.checkpoint_name(step) for step in range(1, 9)]
    assert names[:4] == ["epoch0-iter1", "epoch0-iter2", "epoch0-iter3", "epoch0"]
    assert names[4:] == ["epoch1-iter1", "epoch1-iter2", "epoch1-iter3", "epoch1"]


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
    assert saves(plan) == expected
    assert plan.save_count() == len(expected)


@pytest.mark.parametrize(("steps", "said"), [(0, False), (3, False), (4, True), (20, True)])
def test_it_says_where_no_epoch_is_long_enough_for_a_checkpoint_within_it(steps: int, said: bool) -> None:
    plan = plan_of("train.epochs=3", "checkpoint.every_epochs=0", f"checkpoint.every_steps={steps}")
    assert (plan.save_count() == 1) == (steps != 3)
    line = dict(describe_plan(plan))["checkpoints"]
    assert ("every_steps" in line) == said
    assert line.endswith(f" kept; checkpoint.every_steps={steps} saves none, as an epoch has 4 steps" * said)


def test_validation_is_due_each_epoch_or_every_so_many_steps_and_at_the_end() -> None:
    def due(*overrides: str) -> list[int]:
        plan = plan_of("train.epochs=2.5", *overrides)
        return [step for step in range(1, plan.total_steps + 1) if plan.validates_at(step)]

    assert due() == []
    assert due("data.validation.fraction=0.25") == [3, 6, 8]
    assert due("data.validation.fraction=0.25", "data.validation.every_steps=2") == [2, 4, 6, 8]
    assert due("data.validation.fraction=0.25", "data.validation.every_steps=5") == [5, 8]


def test_held_out_items_are_never_trained_on() -> None:
    plan = plan_of("data.validation.fraction=0.25")
    assert plan.validation is not None
    trained = {plan.train.origin(i) for i in range(len(plan.train))}
    held_out = {plan.validation.origin(i) for i in range(len(plan.validation))}
    assert (len(trained), len(held_out), len(trained | held_out)) == (24, 8, 32)
    assert plan.report["items"] == 32


def test_every_item_is_used_once_an_epoch_and_the_last_step_takes_what_is_left() -> None:
    from llama_acc.core.train.trainer import Trainer

    plan = plan_of("train.global_batch_size=5", "train.epochs=3")
    trainer = Trainer(plan, CPU, None, Parallel())
    orders = []
    for epoch in range(3):
        steps = [trainer.items(epoch * 7 + step) for step in range(7)]
        assert [len(items) for items in steps] == [5, 5, 5, 5, 5, 5, 2]
        orders.append(np.concatenate(steps).tolist())
        assert sorted(orders[-1]) == list(range(32))
    assert orders[0] != orders[1] != orders[2]


def test_without_shuffling_items_come_in_the_order_of_the_file() -> None:
    from llama_acc.core.train.trainer import Trainer

    trainer = Trainer(plan_of("train.shuffle=false"), CPU, None, Parallel())
    assert np.concatenate([trainer.items(step) for step in (4, 5, 6, 7)]).tolist() == list(range(32))


@pytest.mark.parametrize(
    "override",
    ["train.batch_size=1", "train.batch_size=3", "train.micro_batch_tokens=40", "parallel.data_parallel=fsdp"],
)
def test_which_items_a_step_sees_does_not_depend_on_how_they_are_dealt(override: str) -> None:
    from llama_acc.core.train.trainer import Trainer

    plain, dealt = Trainer(plan_of(), CPU, None, Parallel()), Trainer(plan_of(override), CPU, None, Parallel())
    for step in range(8):
        items = plain.items(step)
        assert (dealt.items(step) == items).all()
        groups, imbalance = dealt.split_into_micro_batches(dealt.plan.train, items)
        assert imbalance == 0.0
        assert sorted(item for group in groups for item in group) == sorted(items.tolist())
        batches = [build(dealt.plan.train, group) for group in groups]
        if override == "train.micro_batch_tokens=40":
            assert all(sum(batch.lengths) <= 40 or len(batch.lengths) == 1 for batch in batches)
        elif "batch_size" in override:
            assert all(len(batch.lengths) <= int(override[-1]) for batch in batches)


def test_saved_weights_have_the_training_precision_unless_told_otherwise() -> None:
    import torch

    assert plan_of("train.precision=fp32").save_dtype == torch.float32
    assert plan_of("train.precision=bf16").save_dtype == torch.bfloat16
    assert plan_of("train.precision=bf16", "checkpoint.dtype=fp32").save_dtype == torch.float32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_tokens=1000", r"data\.max_tokens \(1000\) is more than the model's max_seq_len \(256\)"),
        ("model.params=null", "the model's shape is not known"),
        ("model.tokenizer=null", "there is no tokenizer"),
        ("model.tokenizer=nowhere/tokenizer.model", "nowhere/tokenizer.model"),
        ("model.params.vocab_size=32000", "tokenizer and model do not fit"),
        ("model.params.dims=3", "unknown key 'dims': did you mean 'dim'"),
        ("model.pretrained=nowhere", "there is no checkpoint folder nowhere"),
        ("data.sources.0.path=nowhere.json", "there is no data 'nowhere.json'"),
        ("parallel.model_parallel_size=4", r"n_kv_heads \(2\) is not divisible by the model-parallel size \(4\)"),
    ],
)
def test_what_is_wrong_with_the_input_is_found_while_planning(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(override)


def test_paths_beside_the_recipe_are_found_from_any_folder(tmp_path: Path) -> None:
    import shutil

    from llama_acc.core.recipe import RECIPES_FOLDER
    from llama_acc.core.train.callback import Callback
    from llama_acc.core.train.plan import make_plan
    from tests.core.train.runs import quickstart

    for name in ("instructions.json", "tokenizer.model"):
        shutil.copy(RECIPES_FOLDER / "quickstart" / name, tmp_path / name)
    recipe = quickstart("model.tokenizer=tokenizer.model", "data.sources.0.path=instructions.json")
    plan = make_plan(recipe, Callback(), recipe_folder=tmp_path)
    assert plan.tokenizer.path.parent == tmp_path
    assert plan.recipe.model.tokenizer == str(tmp_path / "tokenizer.model")
    assert len(plan.train) == 32


def test_the_plan_says_what_will_be_done() -> None:
    plan = plan_of("data.validation.fraction=0.25", "checkpoint.keep=1", "checkpoint.every_epochs=1")
    lines = dict(describe_plan(plan))
    assert lines["model"] == "2 layers, width 32, 4 heads (2 for keys and values), vocabulary 640"
    assert lines["weights"] == "random (seed 0)"
    assert lines["parameters"].startswith(f"{parameter_count(plan.config):,}, of which")
    assert lines["data"].startswith("24 items, ")
    assert lines["validation"] == "8 items"
    assert lines["steps"] == "6 of 8 examples; 3 in an epoch, 2 epochs, fp32"
    assert lines["checkpoints"].endswith(", the newest 1 kept")


def test_a_checkpoint_takes_the_disk_space_that_was_foretold(tmp_path: Path) -> None:
    from llama_acc.core.train.trainer import Trainer

    for precision in ("fp32", "bf16"):
        plan = plan_of(f"train.precision={precision}", "model.params.dim=64")
        plan = replace(plan, recipe=plan.recipe.model_copy(deep=True))
        trainer = Trainer(plan, CPU, None, Parallel())
        trainer.advance()
        folder = tmp_path / precision
        write_checkpoint(trainer.snapshot(), folder, keep=0)
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert 0.95 * plan.checkpoint_bytes() < written < plan.checkpoint_bytes()
