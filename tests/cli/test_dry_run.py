"""`finetune --dry-run`: everything is checked and shown, nothing is trained, no weights are needed."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from llama_acc.core.recipe import Recipe, recipe_names
from tests.cli.commands import QUICKSTART, TINY, invoke

# As TINY, but with room for every recipe's data.max_tokens.
TINY_LONG = TINY.replace("256}", "4096}")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def shown(stdout: str) -> dict[str, str]:
    """The plan's lines: what stands behind each subject."""
    plan = stdout.partition("\n\n")[0]
    return {subject.strip(): text.strip() for subject, _, text in (line.partition("  ") for line in plan.splitlines())}


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_dry_runs_on_a_tiny_model(
    name: str, tmp_path: Path, single_turn: Path, dialogues: Path, tokenizer_path: Path
) -> None:
    recipe = Recipe.load(name)
    data = {"single_turn": single_turn, "dialogue": dialogues}[recipe.data.sources[0].format]
    flags = ["--data", data, "--tokenizer", tokenizer_path, "--output", tmp_path / "run", "--device", "cpu"]
    result = invoke("finetune", "--recipe", name, "--dry-run", *flags, TINY_LONG, "model.max_seq_len=4096")
    assert result.exit_code == 0, result.stderr
    assert shown(result.stdout)["recipe"] == f"{name}: {recipe.description}"
    assert shown(result.stdout)["data"].startswith("10 items, ")
    assert result.stdout.count("⟦") == result.stdout.count("⟧") >= 2
    assert files(tmp_path) == {"run", "run/recipe.yaml", "run/data.json"}
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (report["items"], report["truncated"], report["dropped"]) == (10, 0, 0)
    resolved = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert resolved.optimizer == recipe.optimizer
    assert resolved.train == recipe.train


def test_it_shows_plan_data_time_disk_and_two_examples(tmp_path: Path) -> None:
    result = invoke(*QUICKSTART, "--dry-run")
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = shown(result.stdout)
    assert lines["model"] == "2 layers, width 32, 4 heads (2 for keys and values), vocabulary 640"
    assert lines["weights"] == "random (seed 0)"
    assert lines["parameters"] == "65,696, of which 65,696 train (method full)"
    assert lines["data"] == "32 items, 1,129 tokens, 556 of them trained"
    assert lines["steps"] == "240 of 8 examples; 4 in an epoch, 60 epochs, fp32"
    assert lines["checkpoints"] == "1 of 1.8 MiB, the newest 1 kept"
    assert lines["lengths"].startswith("min 22, ")
    assert lines["truncated"] == "0 items are longer than 256 tokens"
    assert lines["label tokens"] == "556 of 1,129"
    assert lines["time"].endswith("for the steps (from one timed step on cpu)")
    assert lines["disk"].endswith("GiB for the checkpoints that stay")
    assert "example 1: instructions.json item 1 (trained tokens between ⟦ and ⟧)" in result.stdout
    assert "example 2: instructions.json item 2 (trained tokens between ⟦ and ⟧)" in result.stdout
    assert "### Response:⟦LLaMA is a family of language models made by Meta.</s>⟧" in result.stdout


def test_without_an_output_it_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(*QUICKSTART, "--dry-run").exit_code == 0
    assert files(tmp_path) == set()


def test_it_may_be_repeated_and_the_real_run_follows_into_its_folder(tmp_path: Path) -> None:
    output = tmp_path / "run"
    for _ in range(2):
        assert invoke(*QUICKSTART, "--dry-run", "--output", output, "train.epochs=1").exit_code == 0
        assert files(output) == {"recipe.yaml", "data.json"}
    planned = [(output / name).read_bytes() for name in ("recipe.yaml", "data.json")]
    result = invoke(*QUICKSTART, "--output", output, "train.epochs=1")
    assert result.exit_code == 0, result.stderr
    assert (output / "latest").read_text() == "epoch0\n"
    assert [(output / name).read_bytes() for name in ("recipe.yaml", "data.json")] == planned


def test_the_recipe_it_writes_runs_from_any_folder(
    tmp_path: Path, single_turn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(single_turn, "towns.json")
    written = invoke(*QUICKSTART, "--dry-run", "--data", "towns.json", "--output", "run")
    monkeypatch.chdir(tmp_path / "there")
    again = invoke("finetune", "--recipe", "../here/run/recipe.yaml", "--device", "cpu", "--dry-run")
    assert (written.exit_code, again.exit_code) == (0, 0), written.stderr + again.stderr
    assert shown(again.stdout)["data"] == shown(written.stdout)["data"]


def test_data_on_the_command_line_is_that_of_the_current_folder_not_the_recipes(
    tmp_path: Path, single_turn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("recipes", "here"):
        (tmp_path / folder).mkdir()
    assert invoke("recipes", "copy", "quickstart", tmp_path / "recipes" / "my.yaml").exit_code == 0
    (tmp_path / "recipes" / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    shutil.copy(single_turn, tmp_path / "here" / "data.json")
    monkeypatch.chdir(tmp_path / "here")
    result = invoke("finetune", "--recipe", "../recipes/my.yaml", "--device", "cpu", "--data", "data.json", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert shown(result.stdout)["data"].startswith("10 items")


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
    result = invoke("finetune", "--recipe", "lima", "--dry-run", *flags)
    assert result.exit_code == 0, result.stderr
    lines = shown(result.stdout)
    assert lines["weights"] == "from llama2-7b, which is not there"
    assert lines["parameters"].startswith("6,738,415,616, of which 6,738,415,616 train")
    assert "floating-point operations" in lines["time"]
    assert lines["time"].endswith("at best)")
    assert files(tmp_path / "run") == {"recipe.yaml", "data.json"}


def test_a_checkpoint_that_is_there_is_checked(base: Path) -> None:
    (base / "config.json").write_text('{"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 640}')
    result = invoke("finetune", "--recipe", "quickstart", "--pretrained", base, "--dry-run", "data.max_tokens=256")
    assert result.exit_code == 2
    assert "do not fit the model" in result.stderr


def test_the_tokenizer_beside_the_checkpoint_is_taken_not_the_recipes(talker: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = invoke("finetune", "--recipe", "quickstart", "--pretrained", talker, "--dry-run", "--output", output)
    assert result.exit_code == 0, result.stderr
    assert yaml.safe_load((output / "recipe.yaml").read_text())["model"]["tokenizer"] == str(talker / "tokenizer.model")


def test_what_is_cut_is_counted_in_the_plan_and_in_the_report(tmp_path: Path) -> None:
    result = invoke(*QUICKSTART, "--dry-run", "data.max_tokens=30", "--output", tmp_path / "run")
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert report["truncated"] > 0
    assert shown(result.stdout)["truncated"] == f"{report['truncated']} items are longer than 30 tokens"
    assert f", {report['truncated']} cut" in shown(result.stdout)["data"]
    assert {"items", "tokens", "label_tokens", "truncated", "dropped", "lengths", "files"} <= report.keys()
    assert report["files"][0]["tokens"] == report["tokens"]


def test_a_plan_of_very_many_steps_is_made_at_once() -> None:
    result = invoke(*QUICKSTART, "--dry-run", "train.epochs=1e9", "checkpoint.every_epochs=7", "checkpoint.keep=2")
    assert result.exit_code == 0
    assert shown(result.stdout)["checkpoints"] == "142857143 of 1.8 MiB, the newest 2 kept"
