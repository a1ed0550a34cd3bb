"""Tokens are the training's everywhere: what a run trains on is what chat and an exported folder feed the model."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llama_acc.core.checkpoint.tokenizer_files import write_tokenizer
from llama_acc.core.data.chat_template import ChatTemplate
from llama_acc.core.data.checks import format_findings
from llama_acc.core.data.encode import documents
from llama_acc.core.data.items import Dialogue, Item, SingleTurn
from llama_acc.core.data.templates import Template, Turn, as_dialogue, get_template, special_texts
from llama_acc.core.generate.engine import Prompt, Reply
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer
from tests.core.data.reading import read_items
from tests.core.tokenizers import byte_level, chatml, llama3_style

_GENERATED = 20
_REAL = [5, pytest.param(125, marks=pytest.mark.soak)]
"""Items for every pair of a tokenizer and a format of our own: 2,000 real ones in all."""
_WITH_JINJA = 2
"""Items for a chat template, of which every prompt is rendered by a process."""
_JINJA = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Says nothing of what is trained, and writes an empty thought in front of the last reply only.
_THINKING = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_FORMATS = ("alpaca", "none", "dialogue", "chatml", "chat_template")
_WORDS = (
    "the answer", "is", "10 + 32", "Review:", "- one\n- two", '"Be', "  ", " ", "\n", "\n\n", "\t", "é", "日本",
    "👩‍👩‍👧", "### Step 1", "\n### Step 2\n", "\n###", "<|im_end|>", "<|im_start|>user\n", "<|endoftext|>", "<s>",
    "</s>", "<unk>", "<|eot_id|>", "<|begin_of_text|>", "def f(x):\n    return x", ":", "(", "//", "{instruction}",
    "{{ x }}",
)  # fmt: skip


def _llama(folder: Path, sentencepiece: Path) -> Path:
    return sentencepiece


def _llama_chatml(folder: Path, sentencepiece: Path) -> Path:
    return chatml(folder, sentencepiece, "added_tokens.json") / "tokenizer.model"


def _gpt2(folder: Path, sentencepiece: Path) -> Path:
    return byte_level(folder, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})


def _llama3(folder: Path, sentencepiece: Path) -> Path:
    return llama3_style(folder)


_TOKENIZERS: list[Callable[[Path, Path], Path]] = [_llama, _llama_chatml, _gpt2, _llama3]


@pytest.fixture(scope="module", params=_TOKENIZERS, ids=lambda make: make.__name__.strip("_"))
def tokenizer(
    request: pytest.FixtureRequest, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return load_tokenizer(request.param(tmp_path_factory.mktemp("tokenizer"), tokenizer_path))


def _generated(kind: str, seed: str, without: Sequence[str] = ()) -> list[Item]:
    draw = random.Random(seed)
    words = [word for word in _WORDS if not any(text in word for text in without)]

    def text() -> str:
        return "".join(draw.choices(words, k=draw.randint(1, 6)))

    def dialogue() -> Dialogue:
        turns = [Turn(("human", "assistant")[i % 2], text()) for i in range(draw.choice((2, 4, 6)))]
        return Dialogue(turns, (), draw.choice((None, "", text())))

    def single() -> SingleTurn:
        return SingleTurn(text(), None, text(), (), draw.choice((None, text())))

    return [single() if kind == "single_turn" else dialogue() for _ in range(_GENERATED)]


def _real(kind: str, seed: str, data: Path, count: int) -> list[Item]:
    items = read_items(data / ("alpaca_5000.json" if kind == "single_turn" else "lima_vicuna_format.json"))
    without_input = [item for item in items if isinstance(item, Dialogue) or not item.input]
    return random.Random(seed).sample(without_input, count)


def _format(name: str, tokenizer: Tokenizer) -> Template:
    if name == "chat_template":
        return ChatTemplate(_JINJA, tokenizer, tokenizer.path)
    return get_template(name)


def _check(items: list[Item], template: Template, tokenizer: Tokenizer) -> None:
    if isinstance(template, ChatTemplate):
        items = items[:_WITH_JINJA]
        stops, marks = [], template.text_stops(tokenizer)
    else:
        stops, marks = template.text_stops(tokenizer), template.marks(tokenizer)
    found = [[finding.kind for finding in format_findings(item, "", stops, marks)] for item in items]
    encoded = list(documents(items, template, tokenizer))
    if not isinstance(template, ChatTemplate) and any("stop_in_reply" in kinds for kinds in found):
        template = template.with_strict_stops()  # as a run with such an item saves it
    for item, of_item, kinds in zip(items, encoded, found, strict=True):
        turns = item.turns if isinstance(item, Dialogue) else as_dialogue(*item[:3])
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            tokens, labelled, merged = of_item[-1 if len(of_item) == 1 else number // 2]
            ids = tokens.tolist()
            prompt = template.prompt_ids(tokenizer, turns[:number], item.system)
            same = ids[: len(prompt)] == prompt
            assert same or merged, (turns[number - 1], turn)
            if not same or "format_mark" in kinds:
                continue  # counted in the report: prompt and answer merge, or a text is written like a turn
            assert labelled[len(prompt)], "the first token that the model has to write is trained"
            assert not labelled[len(prompt) - 1] or number > 1
            answer = ids[len(prompt) :]
            end = next((i for i, token in enumerate(answer) if token in tokenizer.end_ids), len(answer))
            prompt_ = Prompt(prompt, spaces=template.spaces_left(turns[:number]), strip=template.kind == "dialogue")
            reply = Reply(prompt_, template, tokenizer, len(answer))
            for token in answer[: end + 1]:
                if not reply.ended:
                    reply.push(token)
            shown = reply.text
            expected = turn.text.strip() if template.kind == "dialogue" else turn.text.lstrip(" ")
            assert (shown.strip() if template.kind == "dialogue" else shown.lstrip(" ")) == expected


@pytest.mark.parametrize("name", _FORMATS)
def test_chat_feeds_what_was_trained_and_shows_what_was_learned(name: str, tokenizer: Tokenizer) -> None:
    template = _format(name, tokenizer)
    _check(_generated(template.kind, f"{name} {tokenizer.path.name}"), template, tokenizer)


@pytest.mark.parametrize("count", _REAL)
@pytest.mark.parametrize("name", _FORMATS)
def test_real_items_too(name: str, count: int, tokenizer: Tokenizer, shared: Path) -> None:
    template = _format(name, tokenizer)
    seed = f"{name} {tokenizer.vocab_size}"
    _check(_real(template.kind, seed, shared / "assets/data", count), template, tokenizer)


@pytest.mark.parametrize("name", ["alpaca", "none", "dialogue", "chatml"])
def test_an_exported_folder_gives_the_trainings_tokens(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = get_template(name)
    for file, content in tokenizer.files().items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "template.json").write_text(template.to_json())
    assert (
        write_tokenizer(tokenizer, tmp_path, {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}) == []
    )
    exported = AutoTokenizer.from_pretrained(tmp_path)
    # transformers takes special tokens in a text for tokens.
    items = _generated(template.kind, name, without=special_texts(tokenizer))
    for item, [(tokens, _, _)] in zip(items, documents(items, template, tokenizer), strict=True):
        turns = item.turns if isinstance(item, Dialogue) else as_dialogue(*item[:3])
        messages = [{"role": {"human": "user"}.get(turn.role, turn.role), "content": turn.text} for turn in turns]
        if item.system is not None:
            messages.insert(0, {"role": "system", "content": item.system})
        asked = exported.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == template.prompt_ids(tokenizer, turns[:-1], item.system)
        assert exported.apply_chat_template(messages, return_dict=False) == tokens.tolist()


def test_a_template_that_writes_earlier_turns_otherwise_gives_an_example_for_each_reply(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_gpt2(tmp_path, tmp_path))
    template = ChatTemplate(_THINKING, tokenizer, tokenizer.path)
    items = [item for item in _generated("dialogue", "thinking", without=["  ", " ", "\n", "\t"]) if len(item[0]) == 4][
        :2
    ]
    assert [len(found) for found in documents(items, template, tokenizer)] == [2, 2]
    for item in items:
        assert isinstance(item, Dialogue)
        for found, end in zip(next(documents([item], template, tokenizer)), (2, 4), strict=True):
            prompt = template.prompt_ids(tokenizer, item.turns[: end - 1], item.system)
            assert found.tokens[: len(prompt)].tolist() == prompt
            assert found.labeled.tolist() == [i >= len(prompt) for i in range(len(found.tokens))]
            assert tokenizer.decode(found.tokens[len(prompt) :]).endswith(item.turns[end - 1].text)
