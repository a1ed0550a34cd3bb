"""Whole runs through `finetune`: what they leave, and that what they learn does not depend on how."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from llama_acc.cli.run_console import describe_plan
from llama_acc.core.atomic import check_manifest
from llama_acc.core.finetune import finetune
from llama_acc.core.model.transformer import shapes_of
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.runs import Callback
from tests.core.tiny import document_logits, loaded_model
from tests.core.train.runs import TIMED, losses, metrics, names, plan_of, run, saved_state, saved_weights

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
SAVING = ("checkpoint.every_epochs=1", "checkpoint.every_steps=3", "checkpoint.keep=0")
ONE_STEP = ("train.max_steps=1", "train.warmup_epochs=0")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two epochs, four steps each, with all its checkpoints."""
    output = tmp_path_factory.mktemp("plain") / "runs" / "first"
    finished = run(output, *SAVING, drawn=True)
    assert (finished.output, finished.checkpoint, finished.loss) == (output, output / "epoch1", losses(output)[-1])
    return output


def test_a_run_leaves_the_folder_that_was_promised(plain: Path) -> None:
    checkpoints = {"epoch0-iter3", "epoch0", "epoch1-iter3", "epoch1"}
    assert names(plain) == RUN_FILES | checkpoints
    for checkpoint in checkpoints:
        assert names(plain / checkpoint) == CHECKPOINT_FILES
        check_manifest(plain / checkpoint, verify=True)
    assert (plain / "latest").read_text() == "epoch1\n"
    assert (plain / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (plain / "report.md").read_text()
    assert report.startswith("# quickstart\n\nThe run is complete.\n")
    assert "| steps done | 8 of 8 |" in report
    config = plan_of().config
    shapes = {f"llma.{name}": shape for name, shape in shapes_of(config).items()}
    assert {name: tuple(tensor.shape) for name, tensor in saved_weights(plain / "epoch1").items()} == shapes
    assert json.loads((plain / "epoch1" / "config.json").read_text()) == config.to_params()
    assert json.loads((plain / "epoch1" / "meta.json").read_text()) == {"llama_type": "llama"}


def test_metrics_and_the_data_report_hold_what_was_promised(tmp_path: Path) -> None:
    run(tmp_path, "train.global_batch_size=5", "data.max_tokens=40")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = {"step", "epoch", "loss", "lr", "grad_norm", "label_tokens", "tokens", *TIMED}
    assert all(set(line) == expected for line in lines)
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert [line["epoch"] for line in lines] == [step / 7 for step in range(1, 15)]
    assert lines[0]["lr"] == 0.0
    data = json.loads((tmp_path / "data.json").read_text())
    assert {"items", "tokens", "label_tokens", "truncated", "dropped", "lengths", "files"} <= set(data)
    for epoch in (lines[:7], lines[7:]):
        assert sum(line["tokens"] for line in epoch) == data["tokens"]
        assert sum(line["label_tokens"] for line in epoch) == data["label_tokens"]
    assert (data["items"], data["lengths"]["max"], data["truncated"] > 0) == (32, 40, True)
    assert data["files"][0]["path"].endswith("instructions.json")


def test_a_recipe_that_was_kept_gives_the_same_bytes_again_and_another_seed_another_run(
    plain: Path, tmp_path: Path
) -> None:
    kept = plain / "recipe.yaml"
    assert (plain / "epoch1" / "recipe.yaml").read_text() == kept.read_text()
    # What is shipped keeps its name: the package may lie elsewhere when the run is continued.
    assert yaml.safe_load(kept.read_text())["model"]["tokenizer"] == "shipped:quickstart/tokenizer.model"
    torch.rand(1)  # what else this process drew is of no account
    finetune(Recipe.load(kept), tmp_path / "again", device="cpu")
    assert metrics(tmp_path / "again") == metrics(plain)
    first, again = (
        {path.name: path.read_bytes() for path in (folder / "epoch1").rglob("*") if path.is_file()}
        for folder in (plain, tmp_path / "again")
    )
    assert first == again
    run(tmp_path / "other", "train.seed=2")
    assert losses(tmp_path / "other") != losses(plain)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_is_the_loss_over_the_held_out_items_and_in_the_curves(precision: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = ["data.validation.fraction=0.25", f"train.precision={precision}", "train.max_steps=5"]
    run(tmp_path, *overrides, "checkpoint.dtype=fp32")
    lines = [line for line in metrics(tmp_path) if "validation_loss" in line]
    assert [line["step"] for line in lines] == [0, 3, 5]
    assert all(set(line) == {"step", "validation_loss"} for line in lines)
    held_out = plan_of(*overrides).validation
    assert held_out is not None
    model = loaded_model(tmp_path / "epoch1-iter2", dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    total = 0.0
    for tokens, labelled in map(held_out.document, range(len(held_out))):
        (logits,) = document_logits(model, [torch.from_numpy(tokens).long()])
        targets = torch.from_numpy(tokens).long().masked_fill(~torch.from_numpy(labelled), -100)
        total += F.cross_entropy(logits[:-1], targets[1:], reduction="sum").item()
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert lines[-1]["validation_loss"] == pytest.approx(total / int(held_out.label_counts.sum()), rel=tolerance)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for key in ("loss", "lr", "grad_norm", "validation_loss"):
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        logged = [(line["step"], line[key]) for line in metrics(tmp_path) if key in line]
        assert shown == [(step, pytest.approx(value)) for step, value in logged]


def test_validating_does_not_change_what_is_learned(plain: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.json"
    held_out.write_text(json.dumps([{"instruction": "What is LLaMA?", "output": "A model."}]))
    run(tmp_path / "run", f"data.validation.path={held_out}", "data.validation.every_steps=2")
    lines = metrics(tmp_path / "run")
    assert [line for line in lines if "loss" in line] == metrics(plain)
    assert len(lines) == 8 + 5  # one before the first step


def test_bf16_saves_rounded_weights_and_keeps_exact_masters(plain: Path, tmp_path: Path) -> None:
    run(tmp_path, "train.precision=bf16")
    weights, state = saved_weights(tmp_path / "epoch1"), saved_state(tmp_path / "epoch1")
    for name, tensor in weights.items():
        master = state[f"master.{name.removeprefix('llma.')}"]
        assert (tensor.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(master.bfloat16(), tensor)
    assert any(not torch.equal(state[f"master.{n.removeprefix('llma.')}"], t.float()) for n, t in weights.items())
    assert all(tensor.dtype == torch.float32 for tensor in saved_weights(plain / "epoch1").values())
    assert not any(name.startswith("master.") for name in saved_state(plain / "epoch1"))
    assert losses(tmp_path) == pytest.approx(losses(plain), rel=0.01)


def test_where_a_cpu_has_no_instructions_for_bf16_the_same_run_is_computed_in_float32(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_acc.core.finetune.multiplies_bf16", lambda: False)
    run(tmp_path / "full", "train.precision=bf16")
    assert losses(tmp_path / "full") == losses(plain)
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved_weights(tmp_path / "full" / "epoch1").values())
    for precision in ("bf16", "fp32"):
        run(tmp_path / precision, f"train.precision={precision}", "tuning.method=lora", *ONE_STEP)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")  # the base is rounded
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.001)
    steps = dict(describe_plan(plan_of("train.precision=bf16").without_bf16()))["steps"]
    assert steps.endswith("bf16, computed in float32: this CPU has no instructions for bf16")


def test_a_run_learns_and_another_goes_on_from_its_weights_and_its_shape(tmp_path: Path) -> None:
    run(tmp_path / "base", "train.epochs=8")
    learned = losses(tmp_path / "base")
    assert learned[-1] < 0.9 * learned[0]
    run(tmp_path / "tuned", f"model.pretrained={tmp_path / 'base'}", "model.params.n_layers=7", *ONE_STEP)
    assert losses(tmp_path / "tuned")[0] < learned[-1] * 1.1
    kept = yaml.safe_load((tmp_path / "tuned" / "recipe.yaml").read_text())
    assert kept["model"]["pretrained"] == [str(tmp_path / "base" / "epoch7")]
    assert json.loads((tmp_path / "tuned" / "epoch0-iter1" / "config.json").read_text())["n_layers"] == 2


def test_a_run_reports_everything_it_writes(tmp_path: Path) -> None:
    seen: list[tuple[str, object]] = []

    class Watcher(Callback):
        def plan(self, plan: object) -> list[tuple[str, str]]:
            seen.append(("plan", None))
            return [("subject", "what | was said")]

        def step(self, metrics: dict[str, object], plan: object) -> None:
            seen.append(("step", metrics["step"]))

        def validation(self, metrics: dict[str, object]) -> None:
            seen.append(("validation", metrics["step"]))

        def saved(self, checkpoint: Path) -> None:
            seen.append(("saved", checkpoint.name))

    overrides = ("data.validation.fraction=0.5", "checkpoint.every_epochs=1", "checkpoint.asynchronous=false")
    run(tmp_path, *overrides, callback=Watcher())
    first = [("step", 1), ("step", 2), ("validation", 2), ("saved", "epoch0")]
    second = [("step", 3), ("step", 4), ("validation", 4), ("saved", "epoch1")]
    assert seen == [("plan", None), ("validation", 0), *first, *second]
    assert "| subject | what &#124; was said |" in (tmp_path / "report.md").read_text()
