"""Every chat template that trl ships, rendered as transformers renders it; pip gets trl's files alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data.chat_rendering import render

_MESSAGES = (
    ("user:Hi",),
    ("system:Be kind.", "user:Hi"),
    ("user: Hi \n", "assistant:Hello!", "user:Bye"),
    ("user:Hi", "assistant:a<b> & 'c' \"d\" é 😀"),
    ("system:s", "user:q", "assistant:<think>\nhm\n</think>\n\nfine", "user:q2", "assistant:r2"),
    ("user:", "assistant:"),
)
_VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def _conversations() -> list[list[dict[str, str]]]:
    pairs = [[message.split(":", 1) for message in messages] for messages in _MESSAGES]
    return [[{"role": role, "content": content} for role, content in conversation] for conversation in pairs]


@pytest.mark.soak
def test_every_template_of_trl_renders_as_in_transformers(tmp_path: Path) -> None:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check")
    done = subprocess.run([*pip, "--target", tmp_path, "trl==1.16"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot get it: {done.stderr.strip().splitlines()[-1]}")
    paths = sorted(tmp_path.glob("trl/chat_templates/*.jinja"))
    assert len(paths) >= 70
    compared = 0
    for path in paths:
        source = path.read_text(encoding="utf-8")
        for prompt in (True, False):
            taken, expected = [], []
            for conversation in _conversations():
                asked: dict[str, Any] = {**_VARIABLES, "chat_template": source, "add_generation_prompt": prompt}
                try:
                    [text], spans = render_jinja_template([conversation], return_assistant_tokens_mask=True, **asked)
                except TemplateError:  # it refuses these turns in transformers, too
                    continue
                taken.append(conversation)
                expected.append((text, spans[0]))
            assert render(source, taken, _VARIABLES, prompt, path) == expected, path.name
            compared += len(expected)
    assert compared >= 800
