"""The command line answers before torch is imported, and a script that imports the package pays for what it uses."""

import json
import os
import subprocess
import sys

import pytest

_HEAVY = ("torch", "transformers", "fairscale", "bitsandbytes", "tensorboard", "matplotlib")
_COMMANDS = [
    ["--help"],
    ["--version"],
    ["finetune", "--help"],
    ["chat", "--help"],
    ["caption", "--help"],
    ["evaluate", "--help"],
    ["evaluate", "gorilla", "--help"],
    ["convert-checkpoint", "--help"],
    ["recipes", "--help"],
    ["download", "--help"],
    ["recipes", "list"],
    ["runs", ".", "--json"],
    ["recipes", "show", "lima"],
    ["download", "--list"],
    # What is wrong is said before anything large is loaded.
    ["chat"],
    ["caption", "no.png"],
    ["download", "lma"],
    ["evaluate", "gorilla", "--hub", "torchhub", "--api", "x", "--questions", "y", "--responses", "z"],
    ["finetune", "--recipe", "lma"],
    ["finetune", "--recipe", "lima", "train.epohs=1"],
    ["finetune", "--recipe", "quickstart", "data.sources.0.template=alpacca"],
    ["finetune", "--recipe", "quickstart", "--data", "nowhere.json"],
    ["chat", "--ckpt", "somewhere", "--template", "alpacca"],
]


def heavy_after(code: str) -> list[str]:
    """What a new Python prints, and the heavy packages it has imported, after each `look()` in `code`."""
    program = f"import sys\ndef look(*words):\n    print('look:', *words, *[n for n in {_HEAVY} if n in sys.modules])\n"
    done = subprocess.run(
        [sys.executable, "-c", program + code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("look:").strip() for line in done.stdout.splitlines() if line.startswith("look:")]


@pytest.mark.parametrize(
    "code",
    [
        "import llama_acc; look()",
        "import llama_acc.core.hub, llama_acc.core.catalogue; look()",
        "import llama_acc; llama_acc.Recipe.load('lima'); look()",
    ],
)
def test_importing_what_needs_nothing_heavy_imports_nothing_heavy(code: str) -> None:
    assert heavy_after(code) == [""]


def test_help_imports_no_more_than_it_prints_with() -> None:
    code = """
sys.argv = ['llama-acc', *WORDS]
from llama_acc.__main__ import main
try:
    main()
except SystemExit:
    look(*[name for name in sys.modules if name.split('.')[0] in (
        'pydantic', 'yaml', 'numpy', 'httpx', 'huggingface_hub', 'markdown_it', 'pygments')])
    look(*[name for name in sys.modules if name.startswith('llama_acc.cli.')])
"""
    assert heavy_after(code.replace("WORDS", "['--help']")) == ["", "llama_acc.cli.stopping llama_acc.cli.app"]
    assert heavy_after(code.replace("WORDS", "['recipes', '-h']"))[0] == ""


def test_the_command_line_answers_without_anything_heavy() -> None:
    code = f"""
import json
from llama_acc.cli.app import app
for words in json.loads({json.dumps(json.dumps(_COMMANDS))}):
    try:
        app(words)
    except SystemExit as ended:
        look(ended.code, *words)
"""
    expected = [f"{0 if place < 14 else 2} {' '.join(words)}" for place, words in enumerate(_COMMANDS)]
    assert heavy_after(code) == expected
