"""Whole runs through `finetune`: what they leave, and that what they learn does not depend on how."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from llama_acc.core.atomic import check_manifest
from llama_acc.core.model.transformer import parameter_count, shapes_of
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.callback import Callback
from tests.core.tiny import CPU, document_logits, loaded_model
from tests.core.train.runs import (
    TIMED,
    assert_bitwise_equal,
    losses,
    metrics,
    names,
    plan_of,
    quickstart,
    run,
    saved_state,
    saved_weights,
)

CHECKPOINT_FILES = {
    "consolidated.00-of-01.model.pth",
    "config.json",
    "meta.json",
    "tokenizer.model",
    "recipe.yaml",
    "template.json",
    "manifest.json",
    "state",
}
RUN_FILES = {"recipe.yaml", "metrics.jsonl", "data.json", "tensorboard", "latest", "report.md", "loss.png"}


def test_a_run_leaves_the_folder_that_was_promised(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "first"
    finished = run(output, "checkpoint.every_epochs=1", "checkpoint.every_steps=3", "checkpoint.keep=0")
    checkpoints = {"epoch0-iter3", "epoch0", "epoch1-iter3", "epoch1"}
    assert names(output) == RUN_FILES | checkpoints
    for checkpoint in checkpoints:
        assert names(output / checkpoint) == CHECKPOINT_FILES
        check_manifest(output / checkpoint, contents=True)
    assert (output / "latest").read_text() == "epoch1\n"
    assert finished.output == output
    assert finished.checkpoint == output / "epoch1"
    assert finished.loss == losses(output)[-1]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (output / "report.md").read_text()
    assert report.startswith("# quickstart\n\nThe run is complete.\n")
    assert "| steps done | 8 of 8 |" in report


def test_metrics_hold_what_was_promised_for_every_step(tmp_path: Path) -> None:
    run(tmp_path, "train.global_batch_size=5")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {"step", "epoch", "loss", "lr", "grad_norm", "label_tokens", "tokens", *TIMED}
    assert all(set(line) == expected for line in lines)
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert [line["epoch"] for line in lines] == [step / 7 for step in range(1, 15)]
    assert lines[0]["lr"] == 0.0
    data = json.loads((tmp_path / "data.json").read_text())
    for epoch in (lines[:7], lines[7:]):
        assert sum(line["tokens"] for line in epoch) == data["tokens"]
        assert sum(line["label_tokens"] for line in epoch) == data["label_tokens"]


def test_the_data_report_says_what_was_trained(tmp_path: Path) -> None:
    run(tmp_path, "train.max_steps=1", "train.warmup_epochs=0", "data.max_tokens=40")
    report = json.loads((tmp_path / "data.json").read_text())
    assert {"items", "tokens", "label_tokens", "truncated", "dropped", "lengths", "files"} <= set(report)
    assert report["items"] == 32
    assert report["truncated"] > 0
    assert report["lengths"]["max"] == 40
    assert report["files"][0]["path"].endswith("instructions.json")


def test_tensorboard_shows_the_same_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "data.validation.fraction=0.25")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for key in ("loss", "lr", "grad_norm", "validation_loss"):
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        logged = [(line["step"], line[key]) for line in metrics(tmp_path) if key in line]
        assert shown == [(step, pytest.approx(value)) for step, value in logged]


def test_the_recipe_that_was_kept_gives_the_same_run_again(tmp_path: Path) -> None:
    from llama_acc.core.finetune import finetune

    run(tmp_path / "a", "optimizer.weight_decay=0.1")
    kept = tmp_path / "a" / "recipe.yaml"
    assert (tmp_path / "a" / "epoch1" / "recipe.yaml").read_text() == kept.read_text()
    # What is shipped keeps its name: the package may lie elsewhere when the run is continued.
    assert yaml.safe_load(kept.read_text())["model"]["tokenizer"] == "shipped:quickstart/tokenizer.model"
    finetune(Recipe.load(kept), tmp_path / "b", device="cpu")
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    assert_bitwise_equal(saved_weights(tmp_path / "b" / "epoch1"), saved_weights(tmp_path / "a" / "epoch1"))


def test_a_seed_decides_a_run_and_every_byte_of_its_checkpoints(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(1)  # what else this process drew is of no account
        run(tmp_path / name, f"train.seed={seed}")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    kept = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name / "epoch1").rglob("*") if path.is_file()}
        for name in ("a", "b")
    }
    assert kept["a"] == kept["b"]
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_a_run_is_the_same_however_its_examples_are_dealt_and_recomputed(tmp_path: Path) -> None:
    run(tmp_path / "whole", "train.epochs=5", "train.batch_size=8")
    expected = metrics(tmp_path / "whole")
    for name, *overrides in (
        ("4x2", "train.batch_size=4"),
        ("3+3+2", "train.batch_size=3"),
        ("tokens", "train.micro_batch_tokens=70"),
        ("recomputed", "train.activation_checkpointing=true"),
    ):
        run(tmp_path / name, "train.epochs=5", *overrides)
        actual = metrics(tmp_path / name)
        assert len(actual) == len(expected) == 20
        for key in ("loss", "grad_norm"):
            assert actual[0][key] == pytest.approx(expected[0][key], rel=1e-5), name
            assert [line[key] for line in actual] == pytest.approx([line[key] for line in expected], rel=1e-4), name
        assert [line["lr"] for line in actual] == [line["lr"] for line in expected]


def test_a_run_learns(tmp_path: Path) -> None:
    run(tmp_path, "train.epochs=8")
    assert losses(tmp_path)[-1] < 0.9 * losses(tmp_path)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_is_the_loss_over_the_held_out_items(precision: str, tmp_path: Path) -> None:
    overrides = ["data.validation.fraction=0.25", f"train.precision={precision}", "train.max_steps=5"]
    run(tmp_path, *overrides, "checkpoint.dtype=fp32")
    lines = [line for line in metrics(tmp_path) if "validation_loss" in line]
    assert [line["step"] for line in lines] == [0, 3, 5]
    assert all(set(line) == {"step", "validation_loss"} for line in lines)
    held_out = plan_of(*overrides).validation
    assert held_out is not None
    model = loaded_model(tmp_path / "epoch1-iter2", torch.float32 if precision == "fp32" else torch.bfloat16)
    total = 0.0
    for tokens, labelled in map(held_out.document, range(len(held_out))):
        (logits,) = document_logits(model, [torch.from_numpy(tokens).long()])
        targets = torch.from_numpy(tokens).long().masked_fill(~torch.from_numpy(labelled), -100)
        total += F.cross_entropy(logits[:-1], targets[1:], reduction="sum").item()
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert lines[-1]["validation_loss"] == pytest.approx(total / int(held_out.label_counts.sum()), rel=tolerance)


def test_validating_does_not_change_what_is_learned(tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.json"
    held_out.write_text(json.dumps([{"instruction": "What is LLaMA?", "output": "A model."}]))
    run(tmp_path / "plain")
    run(tmp_path / "validated", f"data.validation.path={held_out}", "data.validation.every_steps=2")
    steps = [line for line in metrics(tmp_path / "validated") if "loss" in line]
    assert steps == metrics(tmp_path / "plain")
    assert len(metrics(tmp_path / "validated")) == len(steps) + 5  # one before the first step


def test_bf16_saves_rounded_weights_and_keeps_exact_masters(tmp_path: Path) -> None:
    run(tmp_path / "bf16", "train.precision=bf16")
    run(tmp_path / "fp32", "train.precision=fp32")
    weights, state = saved_weights(tmp_path / "bf16" / "epoch1"), saved_state(tmp_path / "bf16" / "epoch1")
    for name, tensor in weights.items():
        master = state[f"master.{name.removeprefix('llma.')}"]
        assert (tensor.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(master.bfloat16(), tensor)
    assert any(not torch.equal(state[f"master.{n.removeprefix('llma.')}"], t.float()) for n, t in weights.items())
    exact = saved_weights(tmp_path / "fp32" / "epoch1")
    assert all(tensor.dtype == torch.float32 for tensor in exact.values())
    assert not any(name.startswith("master.") for name in saved_state(tmp_path / "fp32" / "epoch1"))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.01)


def test_saved_weights_have_metas_names_behind_llma(tmp_path: Path) -> None:
    run(tmp_path, "train.max_steps=1", "train.warmup_epochs=0")
    config = plan_of().config
    shapes = {f"llma.{name}": shape for name, shape in shapes_of(config).items()}
    assert {name: tuple(tensor.shape) for name, tensor in saved_weights(tmp_path / "epoch0-iter1").items()} == shapes
    assert json.loads((tmp_path / "epoch0-iter1" / "config.json").read_text()) == config.to_params()
    assert json.loads((tmp_path / "epoch0-iter1" / "meta.json").read_text()) == {"llama_type": "llama"}


@pytest.mark.parametrize(
    ("keep", "expected"), [(1, {"epoch3"}), (2, {"epoch2", "epoch3"}), (0, {"epoch0", "epoch1", "epoch2", "epoch3"})]
)
def test_the_newest_checkpoints_are_kept(keep: int, expected: set[str], tmp_path: Path) -> None:
    run(tmp_path, "train.epochs=4", "checkpoint.every_epochs=1", f"checkpoint.keep={keep}")
    assert {name for name in names(tmp_path) if name.startswith((".", "epoch"))} == expected


def test_a_run_goes_on_from_another_runs_weights(tmp_path: Path) -> None:
    run(tmp_path / "base", "train.epochs=8")
    run(
        tmp_path / "tuned",
        f"model.pretrained={tmp_path / 'base'}",
        "model.params=null",
        "train.max_steps=1",
        "train.warmup_epochs=0",
    )
    assert losses(tmp_path / "tuned")[0] < losses(tmp_path / "base")[-1] * 1.1
    kept = yaml.safe_load((tmp_path / "tuned" / "recipe.yaml").read_text())
    assert kept["model"]["pretrained"] == [str(tmp_path / "base" / "epoch7")]


def test_a_checkpoints_own_shape_wins_over_the_recipes(tmp_path: Path) -> None:
    run(tmp_path / "base", "train.max_steps=1", "train.warmup_epochs=0")
    run(
        tmp_path / "tuned",
        f"model.pretrained={tmp_path / 'base'}",
        "model.params.n_layers=7",
        "train.max_steps=1",
        "train.warmup_epochs=0",
    )
    assert json.loads((tmp_path / "tuned" / "epoch0-iter1" / "config.json").read_text())["n_layers"] == 2


def test_a_dry_run_writes_two_files_and_the_real_run_may_follow(tmp_path: Path) -> None:
    from llama_acc.core.finetune import dry_run
    from llama_acc.core.memory.guard import setup_of_run
    from llama_acc.core.memory.measure import estimate_time
    from llama_acc.core.memory.predict import predict, rank_share

    plan = dry_run(quickstart(), tmp_path, callback=Callback())
    assert names(tmp_path) == {"recipe.yaml", "data.json"}
    assert plan.total_steps == 8
    assert rank_share(plan.recipe, plan.config, 1).parameters == parameter_count(plan.config)
    seconds, how = estimate_time(plan, 1, CPU, predict(setup_of_run(plan, 1, "cpu")).training)
    assert seconds > 0
    assert "timed step" in how
    planned = (tmp_path / "recipe.yaml").read_text(), (tmp_path / "data.json").read_text()
    run(tmp_path)
    assert ((tmp_path / "recipe.yaml").read_text(), (tmp_path / "data.json").read_text()) == planned


def test_a_run_tells_its_watcher_everything_it_writes(tmp_path: Path) -> None:
    told: list[tuple[str, object]] = []

    class Watcher(Callback):
        def plan(self, plan: object) -> None:
            told.append(("plan", None))

        def step(self, metrics: dict[str, object], plan: object) -> None:
            told.append(("step", metrics["step"]))

        def validation(self, metrics: dict[str, object]) -> None:
            told.append(("validation", metrics["step"]))

        def saved(self, checkpoint: Path) -> None:
            told.append(("saved", checkpoint.name))

    run(
        tmp_path,
        "data.validation.fraction=0.5",
        "checkpoint.every_epochs=1",
        "checkpoint.asynchronous=false",
        callback=Watcher(),
    )
    epoch = [("step", 1), ("step", 2), ("validation", 2), ("saved", "epoch0")]
    assert told == [
        ("plan", None),
        ("validation", 0),
        *epoch,
        ("step", 3),
        ("step", 4),
        ("validation", 4),
        ("saved", "epoch1"),
    ]
