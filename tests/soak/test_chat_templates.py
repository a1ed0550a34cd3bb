"""Every chat template that trl ships, rendered as transformers renders it; pip gets trl's files alone."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data.chat_rendering import REASONING_FIELDS, Chat, RenderedChat, Replies, render
from llama_acc.core.data.templates import CHAT_TEMPLATES

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
            assert render(source, [Chat(conversation)], _VARIABLES, None, path)[0][0][0] == prompt, path.name
            asked += 1
            replies = _replies(conversation)
            # In training, a template that writes the date is told another one.
            if spans and len(spans) == len(replies) and "strftime_now" not in source:
                [found] = render(source, [Chat(conversation)], _VARIABLES, Replies([replies], [], []), path)
                if isinstance(found, str):  # what it leaves out of a reply
                    assert "leaves out the reasoning" in found or "changes the text" in found, (path.name, found)
                elif len(found) == 1:
                    assert [span[:2] for span in found[0][1]] == [tuple(span) for span in spans], path.name
                    assert found[0][0] == text, path.name
                    trained += 1
    assert asked >= 400
    assert trained >= 60


TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": 'The weather "now".',
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "which"}},
                   "required": ["city"]},
}}]  # fmt: skip
_CALL = {"name": "get_weather", "arguments": {"city": 'São "P"'}}
_PLAIN = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello!"},
          {"role": "user", "content": "And?"}, {"role": "assistant", "content": "See you."}]  # fmt: skip
_WITH_CALLS = [
    _PLAIN[0],
    {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefgh1", "type": "function", "function": _CALL}]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefgh1", "content": "22 °C"},
    *_PLAIN[1:],
]
_MARK = re.compile(r"<\|[a-zA-Z_]+\|?>|<[a-z_]+\|>|<end_of_turn>|<｜[^<>]*?｜>|</?s>")
_WRITE_CALLS = {"qwen2_5", "qwen3", "qwen3_6", "llama3_1", "llama3_2", "gptoss", "gemma4_v5", "glm4moe_training",
                "lfm2_2_5", "nemotron_3_nano_training", "qwen3_training"}  # fmt: skip
_WRITE_REASONING = {"qwen3", "qwen3_5_think", "gptoss_training", "gemma4_v5", "glm4moe_training", "nemotron_3_nano"}


def _with_reasoning(messages: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    field = next((field for field in REASONING_FIELDS if field in source), None)
    return [
        message if message["role"] != "assistant"
        else {**message, field: f"thought {number}"} if field
        else {**message, "content": f"<think>\nthought {number}\n</think>\n\n{message['content']}"}
        for number, message in enumerate(messages)
    ]  # fmt: skip


def _trained_of(source: str, chat: Chat, path: Path) -> tuple[list[RenderedChat], dict[int, str]] | str:
    """The texts, and of each reply what is trained."""
    special = sorted({*_MARK.findall(source), "<s>", "</s>"}, key=len, reverse=True)
    replies = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
    wanted = Replies([replies], special, [["</s>"], special])
    [texts] = render(source, [chat], _VARIABLES, wanted, path)
    if isinstance(texts, str):
        return texts
    spoken = dict.fromkeys(replies, "")
    for text, spans in texts:
        for begin, end, number in spans:
            spoken[number] += text[begin:end]
    return texts, spoken


@pytest.mark.soak
def test_the_trained_spans_joined_are_the_replies_their_calls_and_their_reasoning(templates: list[Path]) -> None:
    written: dict[str, set[str]] = {"plain": set(), "calls": set(), "reasoning": set(), "split": set()}
    for path in [*templates, *CHAT_TEMPLATES.values()]:
        source = path.read_text(encoding="utf-8")
        for kind, chat in (
            ("plain", Chat(_PLAIN)),
            ("calls", Chat(_WITH_CALLS, TOOLS)),
            ("reasoning", Chat(_with_reasoning(_PLAIN, source))),
            ("reasoning", Chat(_with_reasoning(_WITH_CALLS, source), TOOLS)),
        ):
            if isinstance(found := _trained_of(source, chat, path), str):
                continue
            texts, spoken = found
            written[kind].add(path.stem)
            written["split"] |= {path.stem} if len(texts) > 1 else set()
            for number, text in spoken.items():
                message = chat.messages[number]
                assert message["content"].rpartition("</think>")[2].strip() in text, path.name
                assert kind != "reasoning" or f"thought {number}" in text, path.name
                assert ("get_weather" in text) == ("tool_calls" in message), path.name
                assert "tool_calls" not in message or "São" in text, path.name
                others = ("22 °C", "And?", "which", "Hi ")
                assert not any(other in text for other in others), (path.name, text)
                if "endgeneration" not in source:
                    prompt = render(source, [chat._replace(messages=chat.messages[:number])], _VARIABLES, None, path)
                    assert text.rstrip().endswith(tuple(_MARK.findall(text))), path.name
                    if "strftime_now" not in source:
                        assert any(whole.startswith(prompt[0][0][0] + text) for whole, _ in texts), path.name
    assert {"llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "gemma", "phi3", "lfm2", "cohere"} <= written["plain"]
    assert "qwen3" in written["split"], "it writes no thought in earlier turns"
    assert written["calls"] >= {*_WRITE_CALLS, "qwen"}
    assert "deepseekv3_training" not in written["calls"], "it writes calls, and leaves out the tools"
    assert written["reasoning"] >= _WRITE_REASONING
    least = {"plain": 50, "calls": 35, "reasoning": 40, "split": 10}
    assert {kind: len(names) >= least[kind] for kind, names in written.items()} == dict.fromkeys(least, True)


@pytest.mark.soak
def test_the_shipped_qwen_is_qwen2_5_with_tools(templates: list[Path]) -> None:
    [theirs] = [path for path in templates if path.stem == "qwen2_5"]
    for chat in (
        Chat(_WITH_CALLS, TOOLS),
        Chat([{"role": "system", "content": "S"}, *_WITH_CALLS], TOOLS),
        Chat(_PLAIN),
    ):
        found = [
            _trained_of(path.read_text(encoding="utf-8"), chat, theirs) for path in (CHAT_TEMPLATES["qwen"], theirs)
        ]
        assert found[0] == found[1]
