import json
import os
from pathlib import Path

import pytest

from llama_acc.core.data import chat_rendering
from llama_acc.core.data.chat_rendering import Chat, Limits, render
from llama_acc.core.data.chat_template import ChatTemplate, Talk, template_for, template_of_folder
from llama_acc.core.data.dataset import load_dataset
from llama_acc.core.data.sources import Source
from llama_acc.core.data.templates import TEMPLATES, Template, Turn, get_template
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import load_tokenizer
from tests.core.tokenizers import byte_level, llama3_style

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
EXCHANGE = [Turn("human", "Hi"), Turn("assistant", "Hello!"), Turn("human", "Bye")]


@pytest.mark.parametrize("blank", [None, "", " ", "\n\t"])
def test_values_are_no_placeholders_and_a_blank_input_counts_as_none(blank: str | None) -> None:
    """The wording of all formats stands in docs/data.md, which is compared with them."""
    alpaca = get_template("alpaca")
    text = alpaca.single_turn_text("Use {input}.", " a {instruction} ", "O", "S")
    assert text.text.startswith("S\n\nBelow is")
    assert text.text.endswith("### Instruction:\nUse {input}.\n\n### Input:\n a {instruction} \n\n### Response:O")
    assert [text.text[begin:end] for begin, end in text.own] == ["S", "Use {input}.", " a {instruction} ", "O"]
    assert alpaca.single_turn_text("Go.", blank, "O") == alpaca.single_turn_text("Go.", None, "O")
    assert get_template("none").single_turn_text("Who?", "unused", "O").text == "Who?O"


@pytest.mark.parametrize(
    ("name", "turns", "system", "text", "trained"),
    [
        ("dialogue", [("human", " Hi <image>\n"), ("assistant", "Hello! ")], None,
         SYSTEM + "\n\n### Human: Hi\n### Assistant: Hello!\n###", [" Hello!\n###"]),
        ("dialogue", [("assistant", "a"), ("assistant", "b"), ("human", "c"), ("human", "d")], "S",
         "S\n\n### Assistant: a\n### Assistant: b\n### Human: c\n### Human: d\n###", [" a\n###", " b\n###"]),
        ("chatml", [("human", " Hi"), ("assistant", "Hello!")], "Be kind.",
         "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Hi<|im_end|>\n"
         "<|im_start|>assistant\nHello!<|im_end|>\n", ["Hello!<|im_end|>"]),
    ],
)  # fmt: skip
def test_the_text_of_a_dialogue_and_what_of_it_is_trained(
    name: str, turns: list[tuple[str, str]], system: str | None, text: str, trained: list[str]
) -> None:
    rendered = get_template(name).dialogue_text([Turn(*turn) for turn in turns], system)
    assert rendered.text == text
    assert [text[begin:end] for begin, end in rendered.trained] == trained


def test_a_prompt_ends_where_the_model_answers() -> None:
    """That its tokens are those of the training: tests/equivalence/test_tokens.py."""
    alpaca, dialogue = get_template("alpaca"), get_template("dialogue")
    assert alpaca.prompt_text(EXCHANGE) == alpaca.single_turn_text("Bye", None, "").text
    assert dialogue.prompt_text(EXCHANGE[:1]) == SYSTEM + "\n\n### Human: Hi\n### Assistant:"
    several = dialogue.dialogue_text(EXCHANGE, "S")
    assert [several.text[begin:end] for begin, end in several.own] == ["S", "Hi", "Hello!", "Bye"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_saved_whole(name: str, tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text(get_template(name).to_json())
    assert Template.load(tmp_path / "template.json") == get_template(name)
    saved = json.loads((tmp_path / "template.json").read_text())
    assert saved["format_version"] == 1
    assert set(saved) == set(Template.model_fields)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"format_version": 2, "name": "x", "new": 1}', "format_version 2"),
        ('{"name": "x"}', "kind"),
        ('{"name": "x", "kind": "dialogue", "sepp": 1}', "sepp"),
        ("[]", "must hold a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text(content)
    with pytest.raises(UserError, match=words):
        Template.load(tmp_path / "template.json")


def test_a_folders_template_comes_from_the_best_place(tmp_path: Path, tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "{{ bos_token }}d"}]
    for file, content, prompt, origin in (
        ("", "", "x", "none, as the folder has no template.json and no chat template"),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": named}),
            "<s>d",
            "the chat template, from tokenizer_conf",
        ),
        ("chat_template.jinja", "j{{ eos_token }}", "j</s>", "the chat template, from chat_template.jinja"),
        ("template.json", get_template("caption").to_json(), "", "caption, from template.json"),
    ):
        if file:
            (tmp_path / file).write_text(content)
        template, where = template_of_folder(tmp_path, tokenizer)
        assert (template.prompt_text([Turn("human", "x")]), where.startswith(origin)) == (prompt, True)


CHATML_JINJA = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant' }}
{% endif %}
"""


def chat_template(source: str, tokenizer_path: Path) -> ChatTemplate:
    return ChatTemplate(source, load_tokenizer(tokenizer_path), Path("chat_template.jinja"))


def test_a_chat_template_asks_like_our_own_and_its_bos_and_eos_become_tokens(tokenizer_path: Path) -> None:
    template = chat_template(CHATML_JINJA, tokenizer_path)
    assert template.prompt_text(EXCHANGE, "Be kind.") == get_template("chatml").prompt_text(EXCHANGE, "Be kind.")
    assert template.stop == ("<|im_end|>",)
    tokenizer = load_tokenizer(tokenizer_path)
    assert template.marks(tokenizer) == ["<|im_end|>"]
    source = "{% for m in messages %}{{ bos_token }}[{{ m.content }}]{{ eos_token }}{% endfor %}"
    ids = chat_template(source, tokenizer_path).prompt_ids(tokenizer, [Turn("human", "a"), Turn("assistant", "b")])
    assert ids == [*tokenizer.encode("[a]", bos=True, eos=True), *tokenizer.encode("[b]", bos=True, eos=True)]


@pytest.mark.parametrize(
    ("source", "limits", "words"),
    [
        ("{% if %}", None, "is not a chat template"),
        ("{{ raise_exception('roles must alternate') }}", None, "roles must alternate"),
        ("{{ messages[7].content + 1 }}", None, "fails on these turns"),
        ("{{ ''.__class__.__mro__ }}", None, "fails on these turns"),
        ("{{ messages.append(1) }}", None, "fails on these turns"),
        ("{% for x in range(999999999) %}{% endfor %}", None, "fails on these turns"),
        ("{% for _ in range(9) %}0123456789{% endfor %}", Limits(characters=50), "more than 50 characters"),
        ("{% for _ in range(900) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}", Limits(1), "more than 1 s"),
        ("{{ 'x' * 300000000 }}", Limits(memory=256 << 20), "more than 256 MiB"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", None, "fails on these turns.*recursion"),
    ],
)
def test_a_chat_template_can_refuse_but_not_escape_and_has_limits(
    source: str, limits: Limits | None, words: str, tokenizer_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        ChatTemplate(source, load_tokenizer(tokenizer_path), Path("chat_template.jinja"), limits).prompt_text(EXCHANGE)


GENERATION_JINJA = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SOURCES = {
    "variables": "{{ tools is not none }}|{{ documents is none }}|{{ bos_token }}|{{ eos_token is defined }}|"
    "{{ pad_token }}|{{ unk_token }}|{{ sep_token }}|{{ enable_thinking is defined }}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
    "{{ messages[0] | tojson(true, none, (',', ':'), true) }}",
    "tools": "{% if tools is not none and tools|length > 0 %}tools{% endif %}{{ messages[0].content }}",
    "namespace": "{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}",
    "blocks": "{% for m in messages %}\n  {% if loop.first %}\n    {% continue %}\n"
    "  {% endif %}\n {{ m.role }} \n{% endfor %}",
    "generation": GENERATION_JINJA,
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_chat_template_renders_as_in_transformers(name: str, tokenizer_path: Path, tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": {"content": "</s>"}}
    config |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    template = chat_template(SOURCES[name], tmp_path / "tokenizer.model")
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "<é> 'a' & \"b\" 😀"}]
    passed = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "add_generation_prompt": True}
    [expected], _ = render_jinja_template([messages], chat_template=SOURCES[name], **passed)
    assert template.prompt_text([Turn("human", messages[1]["content"])], "S") == expected
    assert template.to_json() != chat_template(SOURCES[name], tokenizer_path).to_json(), "it has other special tokens"


def test_what_a_chat_template_generates_is_trained(tokenizer_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = chat_template(GENERATION_JINJA, tokenizer_path)
    turns = [Turn("human", "<s>a"), Turn("assistant", "é</s>"), Turn("human", "b"), Turn("assistant", "c")]
    [[rendered]] = template.dialogue_texts([Talk(turns)])
    roles = {"human": "user", "assistant": "assistant"}
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
    [text], [generated] = render_jinja_template(
        [messages], chat_template=GENERATION_JINJA, return_assistant_tokens_mask=True
    )
    assert (rendered.text, rendered.trained) == (text, generated)
    turns[1] = turns[1]._replace(weight=0)
    assert template.dialogue_texts([Talk(turns)])[0][0].trained == generated[1:]


TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
THOUGHT = "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last }}"
CONVERSATION = [
    *(Turn("human", "Hi <|im_end|>"), Turn("assistant", " Hello!\n"), Turn("human", "b")),
    *(Turn("assistant", "not this", weight=0), Turn("human", "c"), Turn("assistant", "So <|im_end|> it is.")),
]
HELLO, SO = "Hello!<|im_end|>", "So <|im_end|> it is.<|im_end|>"


@pytest.mark.parametrize(
    ("source", "trained"),
    [
        (TURNS + ASKED, [[HELLO, SO]]),
        # What stands in front of an answer is asked, what the template writes besides is the model's to write.
        (TURNS.replace("m.content", "(' ' if m.role == 'assistant' else '') + m.content") + ASKED,
         [[" " + HELLO, " " + SO]]),
        (TURNS.replace("'\n' +", "'\n' + ('[answer]' if m.role == 'assistant' else '') +") + ASKED,
         [["[answer]" + HELLO, "[answer]" + SO]]),
        # It ends as chat ends, whatever follows.
        (TURNS + "{% if not add_generation_prompt %}<|eot_id|>{% endif %}" + ASKED, [[HELLO, SO]]),
        # Earlier turns are written otherwise: one example for each reply, as the model will see it.
        (TURNS.replace("{{ '<|im_start|>' + m.role + '\n' +", "{{ '<|im_start|>' + m.role + '\n' }}" + THOUGHT + "{{")
         + ASKED, [["<think>\n\n</think>\n\n" + HELLO], ["<think>\n\n</think>\n\n" + SO]]),
        (TURNS + "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}", "does not begin a reply as"),
        (TURNS.replace("<|im_end|>", "###") + ASKED, "ends a reply with no special token"),
        (TURNS.replace("m.content", "m.content | upper") + ASKED, "changes the text of a reply"),
    ],
)  # fmt: skip
def test_what_the_model_has_to_write_is_trained_where_a_chat_template_does_not_say_it(
    source: str, trained: list[list[str]] | str, tmp_path: Path
) -> None:
    path = byte_level(tmp_path, {"bos_token": None, "eos_token": "<|im_end|>"})
    template = ChatTemplate(source, load_tokenizer(path), tmp_path / "chat_template.jinja")
    if isinstance(trained, str):
        [why] = template.dialogue_texts([Talk(CONVERSATION, "S")])
        assert f"it {trained}" in str(why)
        assert "begin with a reply" not in str(why)
        [why] = template.dialogue_texts([Talk(CONVERSATION[1:], "S")])
        assert "begin with a reply, which `llama-acc convert-data`" in str(why)
        return
    [found] = template.dialogue_texts([Talk(CONVERSATION, "S")])
    assert [[text.text[begin:end] for begin, end in text.trained] for text in found] == trained
    for turns in (CONVERSATION[:1], CONVERSATION[:5]):
        asked = template.prompt_text(turns, "S")
        assert any(text.text.startswith(asked) and len(asked) in dict(text.trained) for text in found)


TWO = [Turn("human", "Hi "), Turn("assistant", "Hello!"), Turn("human", "Bye"), Turn("assistant", " See you.")]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
)
VICUNA += "and polite answers to the user's questions."
# As their model cards and the code published with them write two exchanges; between the brackets is what is trained.
PUBLISHED = {
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST]⟦ Hello! </s>⟧<s>[INST] Bye [/INST]⟦ See you. </s>⟧",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "⟦Hello!<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦See you.<|eot_id|>⟧",
    "mistral": "<s>[INST] S\n\nHi [/INST]⟦ Hello!</s>⟧|"
    "<s>[INST] Hi [/INST] Hello!</s>[INST] S\n\nBye[/INST]⟦ See you.</s>⟧",
    "qwen": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n"
    "<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦ See you.<|im_end|>⟧\n",
    "vicuna": "<s>S USER: Hi ASSISTANT:⟦ Hello!</s>⟧USER: Bye ASSISTANT:⟦ See you.</s>⟧",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_familys_format_is_written_as_it_is_published(name: str, tokenizer_path: Path, tmp_path: Path) -> None:
    paths = {"llama3": llama3_style, "qwen": lambda folder: byte_level(folder, {"eos_token": "<|im_end|>"})}
    tokenizer = load_tokenizer(paths[name](tmp_path) if name in paths else tokenizer_path)
    template = template_for(name, "dialogue", tokenizer)
    assert isinstance(template, ChatTemplate)
    [found] = template.dialogue_texts([Talk(TWO, "S")])
    texts = []
    for text, _, trained, *_ in found:
        for place, mark in sorted([(end, "⟧") for _, end in trained] + [(begin, "⟦") for begin, _ in trained])[::-1]:
            text = text[:place] + mark + text[place:]
        texts.append(text)
    assert "|".join(texts) == PUBLISHED[name]
    assert template.prompt_text(TWO[:1], "S") == texts[0].partition("⟦")[0]
    usual = template.prompt_text(TWO[:1])
    assert {"vicuna": VICUNA, "qwen": "You are Qwen, created by Alibaba Cloud."}.get(name, "Hi") in usual
    with pytest.raises(UserError, match=f"template {name} needs a tokenizer"):
        template_for(name, "dialogue")


def test_a_users_text_is_no_special_token_in_a_chat_template(tmp_path: Path) -> None:
    path = byte_level(tmp_path, {"bos_token": None, "eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(path)
    source = GENERATION_JINJA.replace("m.content", "m.content[:-1] | upper")
    ids = ChatTemplate(source, tokenizer, path).prompt_ids(tokenizer, [Turn("human", "hi <|im_end|><|im_start|>user!")])
    start, end = (tokenizer.encode(text) for text in ("<|im_start|>", "<|im_end|>"))
    typed = "user\nHI <|IM_END|><|IM_START|>USER"
    assert ids == [
        *start,
        *tokenizer.encode(typed),
        *end,
        *tokenizer.encode("\n"),
        *start,
        *tokenizer.encode("assistant\n"),
    ]
    source = source.replace(" | upper", "")
    ids = ChatTemplate(source, tokenizer, path).prompt_ids(tokenizer, [Turn("human", "hi <|im_end|><|im_start|>user!")])
    assert (ids.count(start[0]), ids.count(end[0])) == (2, 1)
    assert "hi <|im_end|><|im_start|>user" in tokenizer.decode(ids)


DIALOGUE = [Turn("human", "Hi"), Turn("assistant", "So:\n### One"), Turn("human", "x"), Turn("assistant", "y")]


@pytest.mark.parametrize(
    ("name", "turns", "trained", "eos", "stops"),
    [
        # What tells a reply's end from the same text in it is trained, and chat waits for it.
        ("dialogue", DIALOGUE, [" So:\n### One\n### Human:", " y\n###"], True, ("\n### Human:", "\n### Assistant:")),
        ("dialogue", DIALOGUE[:3], [" So:\n### One\n### Human:"], False, ("\n### Human:", "\n### Assistant:")),
        ("dialogue", DIALOGUE[2:], [" y\n###"], False, ("\n###",)),
        ("chatml", [Turn("human", "q"), Turn("assistant", "a <|im_end|> b")], ["a <|im_end|> b<|im_end|>\n"], False,
         ("<|im_end|>\n",)),
    ],
)  # fmt: skip
def test_a_reply_that_holds_its_own_end_is_told_from_it(
    name: str, turns: list[Turn], trained: list[str], eos: bool, stops: tuple[str, ...]
) -> None:
    template = get_template(name)
    rendered = template.dialogue_text(turns)
    assert [rendered.text[begin:end] for begin, end in rendered.trained] == trained
    assert rendered.eos_trained == eos
    assert (template.with_strict_stops() if eos or len(stops[0]) > len(template.stop[0]) else template).stop == stops


def test_data_is_written_in_the_chat_template_beside_the_tokenizer(tmp_path: Path) -> None:
    path = byte_level(tmp_path, {"bos_token": None, "eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(path)
    data = tmp_path / "data.json"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b <|im_end|>"}, {"from": "human", "value": "c"}]
    data.write_text(json.dumps([{"conversations": turns, "system": "S"}]))
    asked = [Source(str(data), template="chat_template")]
    with pytest.raises(UserError, match="has no chat template"):
        load_dataset(asked, tokenizer, 1000, seed=0)
    (tmp_path / "chat_template.jinja").write_text(GENERATION_JINJA)
    dataset = load_dataset(asked, tokenizer, 1000, seed=0)
    tokens, labelled = dataset.document(0)
    end = tokenizer.eos_id
    assert tokenizer.decode(tokens[labelled]) == "b <|im_end|>"
    assert tokens[labelled][-1] == end
    assert list(tokens).count(end) == 4
    assert dataset.report()["template"] == "chat_template"
    own = load_dataset([Source(str(data))], tokenizer, 1000, seed=0)
    assert own.fingerprint() == dataset.fingerprint(), "auto: the checkpoint's own"
    (tmp_path / "chat_template.jinja").rename(tmp_path / "other.jinja")
    for name, folder in (("other.jinja", tmp_path), (str(tmp_path / "other.jinja"), None)):
        given = load_dataset([Source(str(data), template=name, folder=folder)], tokenizer, 1000, seed=0)
        assert given.fingerprint() == dataset.fingerprint()
    assert load_dataset([Source(str(data))], tokenizer, 1000, seed=0).report()["template"] == "dialogue"
    with pytest.raises(UserError, match=r"there is no template 'othr.jinja'; looked for:"):
        load_dataset([Source(str(data), template="othr.jinja", folder=tmp_path)], tokenizer, 1000, seed=0)
    (tmp_path / "template.json").write_text(get_template("chatml").to_json())
    trained_before = load_dataset([Source(str(data))], tokenizer, 1000, seed=0)
    assert trained_before.report()["template"] == "chatml", "what the checkpoint was trained in before"


@pytest.mark.parametrize(
    ("template", "items", "found", "stop"),
    [
        ("dialogue", [("x", "a\n### b"), ("y", "z")], {"stop_in_reply": "item 1"}, "\n### Human:"),
        ("dialogue", [("a\n### Assistant: b", "c")], {"format_mark": "item 1"}, "\n###"),
        ("chatml", [("x", "y"), ("a <|im_end|>", "b <|im_end|> c")], {"stop_in_reply": "item 2"}, "<|im_end|>\n"),
        ("alpaca", [("x", "y"), ("a\n\n### Response: b", "c")], {"format_mark": "item 2"}, None),
        ("alpaca", [("x", "\u0301y")], {}, None),
    ],
)
def test_texts_that_look_like_the_format_are_counted_with_their_places(
    template: str,
    items: list[tuple[str, str]],
    found: dict[str, str],
    stop: str | None,
    tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": question, "output": answer} for question, answer in items]))
    asked = [Source(str(data), template=template)]
    dataset = load_dataset(asked, load_tokenizer(tokenizer_path), 10_000, seed=0)
    assert dataset.report()["warnings"] == dict.fromkeys(found, 1)
    places = dataset.report()["files"][0]["warning_places"]
    assert {kind: place[0]["where"] for kind, place in places.items()} == found
    assert next(iter(dataset.template.stop), None) == stop
    # Where the format's marks are special tokens, no text can hold them.
    path = byte_level(tmp_path / "bytes", {"bos_token": None, "eos_token": "<|im_end|>"})
    if template == "chatml":
        assert load_dataset(asked, load_tokenizer(path), 10_000, seed=0).report()["warnings"] == {}


def test_an_answer_that_merges_with_the_prompt_is_counted_and_in_none_trained(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(llama3_style(tmp_path))
    data = tmp_path / "data.json"
    data.write_text(
        json.dumps([{"instruction": "is it:", "output": ":\n\nyes"}, {"instruction": "a ", "output": "the"}])
    )
    # LLaMA2-Accessory's rule, which its formats keep, leaves out the token that begins in the prompt.
    for template, trained in (("none", "::\n\nyes"), ("shortqa", "yes")):
        dataset = load_dataset([Source(str(data), template=template)], tokenizer, 1000, seed=0)
        tokens, labelled = dataset.document(0)
        assert tokenizer.decode(tokens[labelled]) == trained
        assert [place["where"] for place in dataset.report()["files"][0]["warning_places"]["merged"]] == ["item 1"]
    # A space at a prompt's end is the model's to write, with the word behind it.
    dataset = load_dataset([Source(str(data), template="none")], tokenizer, 1000, seed=0)
    tokens, labelled = dataset.document(1)
    assert tokenizer.decode(tokens[labelled]) == " the"
    assert get_template("none").prompt_ids(tokenizer, [Turn("human", "a ")]) == tokens[~labelled].tolist()


def test_the_limit_is_that_of_each_text_as_a_long_dialogue_is_written_for_every_reply(tmp_path: Path) -> None:
    path = byte_level(tmp_path, {"bos_token": None, "eos_token": "<|im_end|>"})
    template = ChatTemplate(TURNS + ASKED, load_tokenizer(path), path, Limits(characters=2000))
    [[found]] = template.dialogue_texts([Talk(TWO * 10)])
    assert (len(found.trained), len(found.text) * 10 > 2000) == (20, True)


def test_a_child_renders_again_and_again_and_one_that_was_ended_is_replaced(tmp_path: Path) -> None:
    chat = [Chat([{"role": "user", "content": "hello"}])]
    source = "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    source += "{% endfor %}{% endif %}{{ messages[0].content }}"
    loops = [Chat([{"role": "user", "content": "loop"}])]
    path, limits = tmp_path / "chat_template.jinja", Limits(seconds=1)

    def child() -> int:
        process = chat_rendering._child(os.getpid(), source)._process
        assert process is not None
        return process.pid

    assert render(source, chat, {}, None, path, limits) == [[("hello", [])]]
    first = child()
    assert render(source, chat, {}, None, path, limits) == [[("hello", [])]]
    assert child() == first
    with pytest.raises(UserError, match="takes more than 1 s of processor time"):
        render(source, loops, {}, None, path, limits)
    assert render(source, chat, {}, None, path, limits) == [[("hello", [])]]
    assert child() != first
