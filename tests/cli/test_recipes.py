"""`llama-acc recipes`, `--version` and `--help`."""

import json
from pathlib import Path

import pytest

from llama_acc import __version__
from llama_acc.core.recipe import Recipe, recipe_names
from tests.cli.commands import complete, invoke, refused, run, words


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "list"]])
def test_recipes_lists_every_shipped_recipe_with_what_it_is(arguments: list[str]) -> None:
    result = complete(*arguments)
    assert result.stderr == ""
    listed = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert listed == {name: Recipe.load(name).description for name in recipe_names()}


def test_recipes_list_as_json() -> None:
    listed = json.loads(invoke("recipes", "list", "--json").stdout)
    assert [entry["name"] for entry in listed] == recipe_names()
    assert all(entry["description"] for entry in listed)


def test_show_prints_a_recipe_that_works_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(invoke("recipes", "show", "lima").stdout)
    assert Recipe.load(path).model_dump() == Recipe.load("lima").model_dump()
    assert invoke("recipes", "show", path).stdout == path.read_text()


def test_copy_writes_a_recipe_once_and_says_how_to_use_it(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    result = complete("recipes", "copy", "alpaca", path)
    assert f"llama-acc finetune --recipe {path}" in result.stderr
    assert Recipe.load(path).model_dump() == Recipe.load("alpaca").model_dump()
    path.write_text("mine")
    refused(invoke("recipes", "copy", "alpaca", path), f"{path} exists already")
    assert path.read_text() == "mine"
    refused(invoke("recipes", "copy", "alpaca", tmp_path / "no" / "my.yaml"), "cannot write", "No such file")


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"llama-acc {__version__}\n", "")


@pytest.mark.parametrize("command", ["", "finetune", "download", "chat", "recipes", "recipes list", "recipes show"])
def test_the_help_of_every_command_shows_examples(command: str) -> None:
    long, short = (invoke(*command.split(), flag) for flag in ("--help", "-h"))
    assert (long.exit_code, short.stdout) == (0, long.stdout)
    assert "Example" in long.stdout
    assert words(long.stdout).count(f"llama-acc {command}".strip()) >= 2  # the usage line, and an example


def test_without_a_command_the_help_is_shown() -> None:
    assert "Usage: llama-acc" in words(invoke().output)
