"""The command line answers before torch is imported, and a script that imports the package pays for what it uses."""

import os
import subprocess
import sys

import pytest

_HEAVY = ("torch", "transformers", "fairscale", "bitsandbytes", "tensorboard", "matplotlib")


def heavy_after(code: str) -> list[str]:
    """Which heavy packages a new Python has imported after running `code`."""
    ending = f"import sys; print('heavy:', *[name for name in {_HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{ending}"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("heavy:")[2].split()


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert heavy_after("import llama_acc") == []


def test_downloading_imports_nothing_heavy() -> None:
    assert heavy_after("import llama_acc.core.hub, llama_acc.core.downloads") == []


def test_a_recipe_is_read_without_anything_heavy() -> None:
    assert heavy_after("import llama_acc; llama_acc.Recipe.load('lima')") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["finetune", "--help"],
        ["chat", "--help"],
        ["caption", "--help"],
        ["caption", "no.png"],
        ["evaluate", "--help"],
        ["evaluate", "gorilla", "--help"],
        ["evaluate", "gorilla", "--hub", "torchhub", "--api", "x", "--questions", "y", "--responses", "z"],
        ["convert-checkpoint", "--help"],
        ["recipes", "--help"],
        ["recipes", "list"],
        ["recipes", "show", "lima"],
        ["download", "--help"],
        ["download", "--list"],
        ["download", "lma"],
        ["finetune", "--recipe", "lma"],
        ["finetune", "--recipe", "lima", "train.epohs=1"],
        ["chat"],
    ],
    ids=" ".join,
)
def test_the_command_line_answers_without_anything_heavy(arguments: list[str]) -> None:
    code = f"from llama_acc.cli.app import app\ntry:\n    app({arguments!r})\nexcept SystemExit:\n    pass"
    assert heavy_after(code) == []
