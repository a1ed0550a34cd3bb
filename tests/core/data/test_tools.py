"""Calls of tools, their results and reasoning, from the forms of data to tokens and labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llama_acc.core.data.chat_template import ChatTemplate, template_for
from llama_acc.core.data.dataset import Dataset, load_dataset
from llama_acc.core.data.items import Adapt, Dialogue, adapted, item_of
from llama_acc.core.data.preview import shown_document
from llama_acc.core.data.sources import Source
from llama_acc.core.data.tools import CallsInReply
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer
from tests.core.tokenizers import byte_level, llama3_style

FUNCTION = {
    "name": "get_weather",
    "description": 'The weather "now".',
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "São <|im_end|>"}}}
]
CALL_TEXT = '{"name": "get_weather", "arguments": {"city": "São <|im_end|>"}}'
MESSAGES = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "22 °C", "tool_call_id": "call_1", "name": "get_weather"},
    {"role": "assistant", "content": "It is 22."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "Bye."},
]
OURS = [
    {"from": "human", "value": "How is it?"},
    {"from": "gpt", "value": None, "tool_calls": json.dumps(CALLS)},
    {"from": "tool", "value": "22 °C", "tool_call_id": "call_1", "name": "get_weather"},
    {"from": "gpt", "value": "It is 22."},
    {"from": "human", "value": "Thanks!"},
    {"from": "gpt", "value": "Bye."},
]
# As LLaMA-Factory's data has them.
FACTORY = [
    OURS[0],
    {"from": "function_call", "value": CALL_TEXT},
    {"from": "observation", "value": "22 °C"},
    *OURS[3:],
]
REPLIES = [f"<tool_call>\n{CALL_TEXT}\n</tool_call><|im_end|>", "It is 22.<|im_end|>", "Bye.<|im_end|>"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(byte_level(tmp_path / "words", {"bos_token": None, "eos_token": "<|im_end|>"}))


def load(items: list[Any], tokenizer: Tokenizer, tmp_path: Path, **source: Any) -> Dataset:
    (tmp_path / "data.json").write_text(json.dumps(items))
    return load_dataset(
        [Source(str(tmp_path / "data.json"), **{"template": "qwen", **source})], tokenizer, 4096, seed=0
    )


def written(tokens: NDArray[np.int32], tokenizer: Tokenizer) -> str:
    """Their text, with the end of turns in it."""
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id))
    return "<|im_end|>".join(tokenizer.decode(part[part != tokenizer.eos_id]) for part in parts)


def labeled(dataset: Dataset, tokenizer: Tokenizer, i: int = 0) -> str:
    tokens, labels = dataset.document(i)
    runs = np.split(tokens, np.flatnonzero(np.diff(labels > 0)) + 1)
    return "|".join(written(run, tokenizer) for run in runs[int(not labels[0]) :: 2])


@pytest.mark.parametrize(
    "item",
    [
        {"conversations": OURS, "tools": TOOLS},
        {"conversations": FACTORY, "tools": json.dumps([FUNCTION])},
        {"conversations": [OURS[0], {"from": "gpt", "function_call": CALLS[0]["function"]}, *OURS[2:]],
         "functions": [FUNCTION]},
    ],
    ids=["openai", "llama-factory", "functions"],
)  # fmt: skip
def test_calls_are_written_as_transformers_writes_them_and_trained(
    item: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = template_for("qwen", "dialogue", tokenizer)
    assert isinstance(template, ChatTemplate)
    [expected], _ = render_jinja_template([MESSAGES], tools=TOOLS, chat_template=template.source)
    dataset = load([item], tokenizer, tmp_path)
    tokens, _ = dataset.document(0)
    assert written(tokens, tokenizer) == expected
    assert labeled(dataset, tokenizer) == "|".join(REPLIES)
    assert list(tokens).count(tokenizer.eos_id) == len(MESSAGES) + 1, "the data's own is text"
    assert dataset.report()["warnings"] == {}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("dialogue", "template 'dialogue' has no form for tools"),
        ("llama3", "it leaves out the tools"),
        ("one.jinja", "it leaves out what came of a call"),
        ("two.jinja", "it leaves out calls of a reply, or a part of them"),
        ("three.jinja", "it changes the text of a reply"),
    ],
)
def test_a_format_that_would_lose_a_part_is_refused_with_the_item(template: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "words"
    path = llama3_style(folder) if template == "llama3" else byte_level(folder, {"eos_token": "<|im_end|>"})
    qwen = template_for("qwen", "dialogue", load_tokenizer(byte_level(tmp_path, {"eos_token": "<|im_end|>"})))
    assert isinstance(qwen, ChatTemplate)
    for name, part in (
        ("one", "'\\n<tool_response>\\n' + message.content + '\\n</tool_response>'"),
        ("two", "call.function.arguments | tojson"),
        ("three", "'\\n' + message.content if message.content or not message.tool_calls"),
    ):
        other = "'\\n' + message.content if not message.tool_calls" if name == "three" else "''"
        assert part in qwen.source
        (tmp_path / f"{name}.jinja").write_text(qwen.source.replace(part, other))
    asked = {**OURS[0], "value": "get_weather in São?"}
    item = {"conversations": [asked, {**OURS[1], "value": "I look."}, *OURS[2:]], "tools": TOOLS}
    plain = {"conversations": OURS[4:]}
    source = {"template": str(tmp_path / template) if "." in template else template}
    with pytest.raises(UserError, match=f"item 1: .*{words}"):
        load([item, plain], load_tokenizer(path), tmp_path, **source)
    (tmp_path / "data.json").write_text(json.dumps([item, plain]))
    kept = load_dataset([Source(str(tmp_path / "data.json"), **source)], load_tokenizer(path), 4096, 0, on_error="skip")
    assert (len(kept), kept.report()["skipped"]) == (1, 1)
    assert kept.report()["files"][0]["skipped_kinds"] == {"template": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": "get_weather"}, "'tools' should be JSON"),
        ({"tools": {"a": 1}}, "'tools' should be a list of functions, but is an object"),
        ({"tools": [{"type": "function"}]}, "a tool should have a function with a name"),
        ({"calls": [{"function": {"name": "f", "arguments": "x"}}]}, "'arguments' should be JSON, but is \"x\""),
        ({"calls": [{"function": {"name": "f", "arguments": [1]}}]}, "arguments of 'f' should be an object"),
        ({"calls": [{"name": 7}]}, "a call should have a function with a name"),
        ({"calls": 7}, "'tool_calls' should be a list of calls, but is a number"),
        ({"calls": CALLS, "reasoning": 7}, "'reasoning' should be text, but is a number"),
        ({"calls": [{"name": "\ud800"}]}, "a lone surrogate (U+D800)"),
    ],
)
def test_calls_that_are_none_are_refused_by_name(change: dict[str, Any], reason: str) -> None:
    turn = {"from": "gpt", "value": "b", "tool_calls": change.pop("calls", None)}
    turn |= {"reasoning": change.pop("reasoning")} if "reasoning" in change else {}
    item, found = item_of({"conversations": [{"from": "human", "value": "a"}, turn], **change}, "dialogue")
    assert item is None
    assert reason in str(found[0])


THINKING = [
    {"from": "human", "value": "a"},
    {"from": "gpt", "value": "b", "reasoning_content": "hm"},
    {"from": "human", "value": "c"},
    {"from": "gpt", "value": "<think>\nso\n</think>\n\nd", "weight": 0.5},
]
KNOWS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ '[' + m.reasoning_content + ']' if m.reasoning_content }}{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


@pytest.mark.parametrize(
    ("source", "expected", "unused"),
    [
        ({}, "<think>\nhm\n</think>\n\nb<|im_end|>|<think>\nso\n</think>\n\nd<|im_end|>", {}),
        ({"template": "knows.jinja"}, "[hm]b<|im_end|>|<think>\nso\n</think>\n\nd<|im_end|>", {}),
        ({"template": "dialogue"}, " <think>\nhm\n</think>\n\nb\n###| <think>\nso\n</think>\n\nd\n###", {}),
        ({"reasoning": "drop"}, "b<|im_end|>|d<|im_end|>", {"reasoning": 1}),
        ({"reasoning": "drop", "train_on": "last"}, "d<|im_end|>", {"reasoning": 1, "replies before the last": 1}),
    ],
)
def test_reasoning_is_kept_where_the_template_has_it_or_dropped_and_counted(
    source: dict[str, Any], expected: str, unused: dict[str, int], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "knows.jinja").write_text(KNOWS)
    if "." in source.get("template", ""):
        source = {"template": str(tmp_path / source["template"])}
    dataset = load([{"conversations": THINKING}], tokenizer, tmp_path, **source)
    assert labeled(dataset, tokenizer) == expected
    assert dataset.report()["files"][0]["unused_keys"] == unused
    assert ("hm" in tokenizer.decode(dataset.document(0)[0])) == ("reasoning" not in source)


def test_a_template_that_drops_the_reasoning_of_a_reply_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "drops.jinja").write_text(KNOWS.replace("if m.reasoning_content", "if false"))
    with pytest.raises(UserError, match="leaves out the reasoning of a reply"):
        load([{"conversations": THINKING}], tokenizer, tmp_path, template=str(tmp_path / "drops.jinja"))


@pytest.mark.parametrize("template", ["qwen", "dialogue"])
def test_a_turns_weight_is_that_of_its_tokens(template: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Also behind a reply with weight 1, in a file of which other dialogues have none."""
    plain = {"conversations": [{key: turn[key] for key in ("from", "value")} for turn in THINKING]}
    dataset = load([{"conversations": THINKING}, plain], tokenizer, tmp_path, template=template)
    (tokens, weights), (_, whole) = dataset.document(0), dataset.document(1)
    assert (weights.dtype, whole.dtype) == (np.float32, np.bool_)
    [first, second] = np.split(weights[weights > 0], [int((weights == 1).sum())])
    assert (set(first), set(second)) == ({1.0}, {0.5})
    assert tokenizer.decode(tokens[weights == 0.5]).strip(" ").startswith("<think>\nso")
    assert dataset.label_counts.tolist() == [len(first) + len(second), whole.sum()]
    assert dataset.label_weights.tolist() == [len(first) + len(second) / 2, whole.sum()]
    assert dataset.report()["label_tokens"] == dataset.label_tokens == sum(dataset.label_counts)
    shown = shown_document("", tokens, weights, tokenizer)
    assert [piece.trained for piece in shown.pieces if not piece.special and piece.trained] == [True, True]
    alone = load([plain], tokenizer, tmp_path, template=template)
    assert alone.label_weights is alone.label_counts, "nothing is stored where all count in full"
    assert load([{"conversations": THINKING}], tokenizer, tmp_path, template=template).fingerprint() not in (
        load([plain], tokenizer, tmp_path, template=template).fingerprint(),
        load([{"conversations": [*THINKING[:3], {**THINKING[3], "weight": 0.25}]}], tokenizer, tmp_path,
             template=template).fingerprint(),
    )  # fmt: skip


def test_the_last_reply_alone_keeps_its_own_weight() -> None:
    item, _ = item_of({"conversations": THINKING}, "dialogue")
    assert isinstance(item, Dialogue)
    last, unused = adapted(item, *Adapt(last_only=True))
    assert isinstance(last, Dialogue)
    assert [turn.weight for turn in last.turns if turn.role == "assistant"] == [0.0, 0.5]
    assert adapted(last, *Adapt(last_only=True)) == (last, [])
    assert unused == ["replies before the last"]


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("It is 22.", "It is 22.", []),
        (
            'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
            "Let me see.",
            [("f", {"a": 1})],
        ),
        ('<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}', "", [("f", {}), ("g", {})]),
        ('{"name": "f", "parameters": {"a": "<b>"}}', "", [("f", {"a": "<b>"})]),
        ('{"temperature": 22}', '{"temperature": 22}', []),
        ('{"name": "f", "parameters"', '{"name": "f", "parameters"', []),
        ('See: {"name": "f", "parameters": {}}', 'See: {"name": "f", "parameters": {}}', []),
        ("<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
        ("a < b, <tool", "a < b, <tool", []),
    ],
)
def test_calls_are_found_in_a_reply_however_it_comes(text: str, said: str, calls: list[tuple[str, Any]]) -> None:
    for size in (1, 3, len(text)):
        found, parts = CallsInReply(), [text[at : at + size] for at in range(0, len(text), size)]
        pushed = [found.push(part, False) for part in parts] + [found.push("", True)]
        assert not any(calls for _, calls in pushed[:-1])
        assert "".join(part for part, _ in pushed).rstrip() == said
        assert [(call["function"]["name"], call["function"]["arguments"]) for call in pushed[-1][1]] == calls
