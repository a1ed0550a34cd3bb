"""`finetune --dry-run`: everything is checked and shown, nothing is trained, no weights are needed."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from llama_acc.core.memory import measure
from llama_acc.core.memory.guard import setup_of_run
from llama_acc.core.memory.predict import predict
from llama_acc.core.model.transformer import parameter_count
from llama_acc.core.recipe import Recipe, recipe_names
from llama_acc.core.text import size_text
from llama_acc.core.train.plan import Plan, make_plan
from llama_acc.core.train.runs import Callback
from tests.cli.commands import QUICKSTART, complete, invoke
from tests.cli.conftest import DIALOGUE
from tests.core.tokenizers import llama3_style

# With room for every recipe's data.max_tokens, and heads for every recipe's model-parallel size.
SHAPE = "dim: 64, n_layers: 1, n_heads: 8, n_kv_heads: 8, multiple_of: 16, vocab_size: -1, max_seq_len: 4096"
TINY_LONG = f"model.params={{{SHAPE}}}"
TOWN = {"instruction": "name the town", "output": "the answer"}


def plan_of_quickstart() -> Plan:
    recipe = Recipe.load("quickstart", QUICKSTART[5:])
    return make_plan(recipe, Callback(), dry_run=True)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def shown(stdout: str) -> dict[str, str]:
    """The lines before and behind the examples: what stands behind each subject."""
    first, *_, last = stdout.split("\n\n")
    plan = f"{first}\n{last}"
    return {subject.strip(): text.strip() for subject, _, text in (line.partition("  ") for line in plan.splitlines())}


def kinds() -> list[str]:
    """A shipped recipe of each kind: others of it differ in names and numbers only, which test_recipe.py compares."""
    found: dict[object, str] = {}
    for name in recipe_names():
        recipe = Recipe.load(name)
        source, tuning, parallel = recipe.data.sources[0], recipe.tuning, recipe.parallel
        of_training = (tuning.method, tuning.quantize, recipe.train.precision, recipe.train.activation_checkpointing)
        of_ranks = (parallel.model_parallel_size, parallel.data_parallel)
        found.setdefault((source.format, source.template, recipe.vision.encoder, *of_training, *of_ranks), name)
    return list(found.values())


@pytest.mark.parametrize("name", kinds())
def test_a_shipped_recipe_of_every_kind_dry_runs_on_a_tiny_model(
    name: str, tmp_path: Path, tokenizer_path: Path
) -> None:
    recipe = Recipe.load(name)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([TOWN if recipe.data.sources[0].format == "single_turn" else DIALOGUE] * 2))
    words = llama3_style(tmp_path) if recipe.data.sources[0].template == "llama3" else tokenizer_path
    flags = ["--data", data, "--tokenizer", words, "--output", tmp_path / "run", "--device", "cpu"]
    # Its tokenizer has 300 pieces, which eight ranks cannot split.
    shape = TINY_LONG.replace("-1", "304") if recipe.parallel.model_parallel_size == 8 else TINY_LONG
    tiny = [shape, "model.max_seq_len=4096", "train.warmup_epochs=0"]
    if recipe.tuning.prefix_layers:
        tiny.append("tuning.prefix_layers=1")
    result = complete("finetune", "--recipe", name, "--dry-run", "--no-timing", *flags, *tiny)
    assert shown(result.stdout)["recipe"] == name
    assert shown(result.stdout)["data"].startswith("2 items, ")
    assert result.stdout.count("⟦") == result.stdout.count("⟧") >= 2
    assert files(tmp_path / "run") == {"recipe.yaml", "data.json"}
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (report["items"], report["truncated"], report["dropped"]) == (2, 0, 0)
    resolved = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert resolved.optimizer == recipe.optimizer
    assert resolved.train == recipe.train.without_auto().model_copy(update={"warmup_epochs": 0})
    assert not resolved.train.has_auto
    assert ("micro-batches" in shown(result.stdout)) is recipe.train.has_auto


def test_it_shows_plan_data_time_disk_and_two_examples(tmp_path: Path) -> None:
    result = complete(*QUICKSTART, "--dry-run")
    assert result.stderr == ""
    lines = shown(result.stdout)
    assert lines["model"] == "2 layers, width 32, 4 heads (2 for keys and values), vocabulary 640"
    assert lines["weights"] == "random (seed 0)"
    assert lines["parameters"] == "65,696, of which 65,696 train (method full)"
    assert lines["data"].startswith("32 items, 1,129 tokens, 556 of them trained; from ")
    assert lines["steps"] == "240 of 8 examples; 4 in an epoch, 60 epochs, fp32"
    assert lines["checkpoints"] == "1 of 832.8 KiB, the newest 1 kept"
    assert lines["lengths"].startswith("min 22, ")
    assert lines["truncated"] == "0 items longer than 256 tokens"
    assert lines["label tokens"] == "556 of 1,129"
    usage = predict(setup_of_run(plan_of_quickstart(), 1, "cpu"))
    said = f"{size_text(usage.allocated)} on cpu at its fullest, predicted: {usage.moment}, "
    assert lines["memory"] == said + "with the largest micro-batch of the data"
    assert lines["time"].endswith("for the steps (from one timed step on cpu)")
    assert lines["disk"].endswith("B for the checkpoints that stay")
    assert "example 1: instructions.json item 1 (trained tokens between ⟦ and ⟧)" in result.stdout
    assert "example 2: instructions.json item 2 (trained tokens between ⟦ and ⟧)" in result.stdout
    assert "### Response:⟦LLaMA is a family of language models made by Meta.</s>⟧" in result.stdout
    found = [result.stdout.index(f"\n{first}") for first in ("disk", "example 1", "example 2", "memory", "time")]
    assert found == sorted(found), "what takes longest comes last"
    assert "\ntime" not in invoke(*QUICKSTART, "--dry-run", "--no-timing").stdout


def test_work_is_counted_in_the_programs_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_memory", lambda device: 0)
    told = shown(invoke(*QUICKSTART, "--dry-run").stdout)["time"]
    operations = float(told.partition("(from ")[2].partition(" floating")[0])
    plan = plan_of_quickstart()
    head = plan.config.vocab_size * plan.config.dim
    blocks = parameter_count(plan.config) - 2 * head  # norms are too small to count
    recomputed = 2 if plan.recipe.train.activation_checkpointing else 0
    least = plan.train.tokens * (6 + recomputed) * blocks + 6 * head * plan.train.label_tokens
    assert operations == pytest.approx(least * plan.total_steps / plan.steps_per_epoch, rel=0.15)  # and attention


def test_it_says_what_each_of_many_processes_keeps(tmp_path: Path) -> None:
    result = complete(*QUICKSTART, "--dry-run", "--nproc", "4", "--nnodes", "2", "parallel.model_parallel_size=2")
    lines = shown(result.stdout)
    assert lines["processes"] == "8: 4 data parallel (sdp) x 2 model parallel, 8,232 parameters on each"
    assert lines["of which"].startswith(f"trainable masters {8232 * 4 / 2**10:.1f} KiB, optimizer ")
    assert lines["time"].endswith("8 processes as fast as this one, at best)")
    alone = shown(invoke(*QUICKSTART, "--dry-run").stdout)
    assert alone["processes"].startswith("1: ")
    assert alone["processes"].endswith(" 65,696 parameters on each")
    wrong = invoke(*QUICKSTART, "--dry-run", "--nproc", "3", "parallel.model_parallel_size=2")
    assert wrong.exit_code == 2
    assert "does not divide the number of processes (3)" in wrong.stderr


def test_it_may_be_repeated_and_the_real_run_follows_into_its_folder(tmp_path: Path) -> None:
    output = tmp_path / "run"
    for _ in range(2):
        assert invoke(*QUICKSTART, "--dry-run", "--no-timing", "--output", output, "train.epochs=1").exit_code == 0
        assert files(output) == {"recipe.yaml", "data.json"}
    planned = [(output / name).read_bytes() for name in ("recipe.yaml", "data.json")]
    complete(*QUICKSTART, "--output", output, "train.epochs=1")
    assert (output / "latest").read_text() == "epoch0\n"
    assert [(output / name).read_bytes() for name in ("recipe.yaml", "data.json")] == planned


def test_data_is_found_from_any_folder(tmp_path: Path, single_turn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line it is that of the current folder, not the recipe's; the recipe that is written knows it."""
    for folder in ("recipes", "here", "there"):
        (tmp_path / folder).mkdir()
    assert invoke("recipes", "copy", "quickstart", tmp_path / "recipes" / "my.yaml").exit_code == 0
    (tmp_path / "recipes" / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    shutil.copy(single_turn, tmp_path / "here" / "data.json")
    dry = ("finetune", "--device", "cpu", "--dry-run", "--no-timing", "--recipe")
    monkeypatch.chdir(tmp_path / "here")
    written = complete(*dry, "../recipes/my.yaml", "--data", "data.json", "--output", "run")
    monkeypatch.chdir(tmp_path / "there")
    again = complete(*dry, "../here/run/recipe.yaml")
    assert shown(again.stdout)["data"] == shown(written.stdout)["data"]
    assert shown(again.stdout)["data"].startswith("10 items")
    assert files(tmp_path / "there") == set()
    beside = invoke(*dry, "../recipes/my.yaml", "data.sources=[{path: data.json}]")
    assert shown(beside.stdout)["data"].startswith("1 item,"), "what the recipe says is beside it"


def test_only_the_shape_of_a_model_that_is_not_there_is_needed(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1 << 50, 0, 1 << 50))
    tokenizer = shared / "assets" / "tokenizer" / "tokenizer.model"
    data = shared / "assets" / "data" / "sharegpt_example.json"
    flags = ["--tokenizer", tokenizer, "--data", data, "--output", tmp_path / "run", "--device", "cpu"]
    result = complete("finetune", "--recipe", "lima", "--dry-run", *flags)
    lines = shown(result.stdout)
    assert lines["weights"] == "from llama2-7b (not found)"
    assert lines["parameters"].startswith("6,738,415,616, of which 6,738,415,616 train")
    assert "floating-point operations" in lines["time"]
    assert lines["time"].endswith("at best)")
    assert files(tmp_path / "run") == {"recipe.yaml", "data.json"}


def test_data_on_the_command_line_is_taken_whole(single_turn: Path) -> None:
    result = invoke(*QUICKSTART, "--dry-run", "--no-timing", "--data", single_turn, "data.sources.0.ratio=0.5")
    assert shown(result.stdout)["data"].startswith("10 items, "), result.stderr


def test_the_tokenizer_beside_the_checkpoint_is_taken_not_the_recipes(talker: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    complete(
        "finetune", "--recipe", "quickstart", "--pretrained", talker, "--dry-run", "--no-timing", "--output", output
    )
    assert yaml.safe_load((output / "recipe.yaml").read_text())["model"]["tokenizer"] == str(talker / "tokenizer.model")


def test_what_is_cut_or_not_used_is_counted_in_the_plan_and_in_the_report(tmp_path: Path) -> None:
    rows = [{"instruction": f"go {i}", "output": "ok " * 9, "source": "x", "id": i} for i in range(9)]
    rows[0].pop("id")
    data: list[object] = []
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(rows), encoding="utf-8")
        data += ["--data", tmp_path / name]
    result = complete(
        *QUICKSTART, "--dry-run", "--no-timing", "data.max_tokens=30", "--output", tmp_path / "run", *data
    )
    report, lines = json.loads((tmp_path / "run" / "data.json").read_text()), shown(result.stdout)
    assert report["truncated"] > 0
    assert lines["truncated"] == f"{report['truncated']} items longer than 30 tokens"
    assert f", {report['truncated']} cut" in lines["data"]
    assert {"items", "tokens", "label_tokens", "truncated", "dropped", "lengths", "files"} <= report.keys()
    assert report["files"][0]["tokens"] * 2 == report["tokens"]
    assert lines["not used"] == "source (18 items), id (16 items)"
    assert [file["unused_keys"] for file in report["files"]] == [{"source": 9, "id": 8}] * 2


def test_a_plan_of_very_many_steps_is_made_at_once() -> None:
    result = complete(
        *QUICKSTART, "--dry-run", "--no-timing", "train.epochs=1e6", "checkpoint.every_epochs=7", "checkpoint.keep=2"
    )
    assert shown(result.stdout)["checkpoints"] == "142858 of 832.8 KiB, the newest 2 kept"
