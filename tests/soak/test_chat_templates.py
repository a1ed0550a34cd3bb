"""Every chat template that trl ships, rendered as transformers renders it; pip gets trl's files alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data.chat_rendering import Replies, render
from llama_acc.core.errors import UserError

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


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("trl")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check")
    done = subprocess.run([*pip, "--target", folder, "trl==1.16"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot get it: {done.stderr.strip().splitlines()[-1]}")
    paths = sorted(folder.glob("trl/chat_templates/*.jinja"))
    assert len(paths) >= 70
    return paths


def _replies(conversation: list[dict[str, str]]) -> list[int]:
    return [number for number, message in enumerate(conversation) if message["role"] == "assistant"]


@pytest.mark.soak
def test_every_template_of_trl_renders_as_in_transformers(templates: list[Path]) -> None:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    asked = trained = 0
    for path in templates:
        source = path.read_text(encoding="utf-8")
        for conversation in _conversations():
            known: dict[str, Any] = {**_VARIABLES, "chat_template": source}
            try:
                [prompt], _ = render_jinja_template([conversation], add_generation_prompt=True, **known)
                [text], [spans] = render_jinja_template([conversation], return_assistant_tokens_mask=True, **known)
            except TemplateError:  # it refuses these turns in transformers, too
                continue
            assert render(source, [conversation], _VARIABLES, None, path)[0][0][0] == prompt, path.name
            asked += 1
            replies = _replies(conversation)
            # In training, a template that writes the date is told another one.
            if spans and len(spans) == len(replies) and "strftime_now" not in source:
                found = render(source, [conversation], _VARIABLES, Replies([replies], [], []), path)
                assert found == [[(text, spans)]], path.name
                trained += 1
    assert asked >= 400
    assert trained >= 60


@pytest.mark.soak
def test_what_is_trained_is_what_follows_the_prompt_and_holds_the_reply(templates: list[Path]) -> None:
    conversation = _conversations()[2] + [{"role": "assistant", "content": "See you."}]
    special = ["</s>", "<s>", "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>", "<end_of_turn>", "<turn|>", "<|return|>"]
    special += ["<|end|>", "<|im_end|>", "<|eot_id|>", "<|eot|>"]
    written, split = [], []
    for path in templates:
        source = path.read_text(encoding="utf-8")
        if "endgeneration" in source:
            continue
        try:
            [texts] = render(source, [conversation], _VARIABLES, Replies([[1, 3]], special, special), path)
        except UserError:
            continue
        found = [text[begin:end] for text, spans in texts for begin, end in spans]
        for number, reply in zip((1, 3), found, strict=True):
            assert conversation[number]["content"] in reply, path.name
            assert reply.endswith(tuple(special)), path.name
            prompt = render(source, [conversation[:number]], _VARIABLES, None, path)[0][0][0]
            if "strftime_now" not in source:
                text = texts[0 if len(texts) == 1 else number // 2][0]
                assert text.startswith(prompt + reply), path.name
        written.append(path.stem)
        split += [path.stem] * (len(texts) > 1)
    assert {"llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "gemma", "phi3", "lfm2", "cohere"} <= set(written)
    assert "qwen3" in split, "it writes no thought in earlier turns"
    assert len(written) >= 25
