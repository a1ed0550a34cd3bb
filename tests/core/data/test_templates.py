import json
from pathlib import Path

import pytest

from llama_acc.core.data.templates import TEMPLATES, ChatTemplate, Template, Turn, get_template, template_of_folder
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import load_tokenizer

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
EXCHANGE = [Turn("human", "Hi"), Turn("assistant", "Hello!"), Turn("human", "Bye")]


def test_alpaca_without_input() -> None:
    assert get_template("alpaca").single_turn_prompt("Say {input}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {input}.\n\n### Response:"
    )


def test_alpaca_with_input() -> None:
    assert get_template("alpaca").single_turn_prompt("Use {input}.", " a {instruction} ") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nUse {input}.\n\n### Input:\n a {instruction} \n\n### Response:"
    )


@pytest.mark.parametrize("blank", [None, "", " ", "\n\t"])
def test_a_blank_input_counts_as_none(blank: str | None) -> None:
    alpaca = get_template("alpaca")
    assert alpaca.single_turn_prompt("Go.", blank) == alpaca.single_turn_prompt("Go.")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "shortqa",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request "
            "using a single word or phrase.\n\n### Instruction:\nWho?\n\n### Response:",
        ),
        ("qg", "Generate a question whose answer is:\nWho?\n\nQuestion:\n"),
        ("caption", ""),
        ("none", "Who?"),
    ],
)
def test_other_single_turn_prompts(name: str, prompt: str) -> None:
    assert get_template(name).single_turn_prompt("Who?", "unused") == prompt


def test_dialogue_text_and_what_of_it_is_trained() -> None:
    text, trained = get_template("dialogue").dialogue_text(
        [Turn("human", " Hi <image>\n"), Turn("assistant", "Hello! ")]
    )
    assert text == SYSTEM + "\n\n### Human: Hi\n### Assistant: Hello!\n###"
    assert [text[begin:end] for begin, end in trained] == [" Hello!\n###"]


def test_dialogue_keeps_any_order_of_roles() -> None:
    turns = [Turn("assistant", "a"), Turn("assistant", "b"), Turn("human", "c"), Turn("human", "d")]
    text, trained = get_template("dialogue").dialogue_text(turns, system="S")
    assert text == "S\n\n### Assistant: a\n### Assistant: b\n### Human: c\n### Human: d\n###"
    assert [text[begin:end] for begin, end in trained] == [" a\n###", " b\n###"]


def test_chatml_text_and_what_of_it_is_trained() -> None:
    chatml = get_template("chatml")
    text, trained = chatml.dialogue_text([Turn("human", " Hi"), Turn("assistant", "Hello!")])
    assert text == "<|im_start|>user\n Hi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    assert [text[begin:end] for begin, end in trained] == ["Hello!<|im_end|>"]
    assert chatml.dialogue_text([], system="Be kind.")[0] == "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert (chatml.bos, chatml.eos, chatml.stop) == (False, False, ("<|im_end|>",))


@pytest.mark.parametrize("name", ["dialogue", "chatml"])
def test_a_prompt_is_the_beginning_of_the_training_text(name: str) -> None:
    template = get_template(name)
    prompt = template.prompt_text(EXCHANGE)
    text, trained = template.dialogue_text([*EXCHANGE, Turn("assistant", "See you.")])
    assert text[: trained[-1][0]] == prompt
    assert text[trained[-1][0] : trained[-1][1]].lstrip(" ") == "See you." + template.trained_end


def test_a_dialogues_prompt_ends_where_the_assistant_speaks() -> None:
    prompt = get_template("dialogue").prompt_text([Turn("human", "Hi")])
    assert prompt == SYSTEM + "\n\n### Human: Hi\n### Assistant:"


def test_a_single_turn_prompt_sees_the_last_human_turn() -> None:
    alpaca = get_template("alpaca")
    assert alpaca.prompt_text(EXCHANGE) == alpaca.single_turn_prompt("Bye")


def test_prompt_tokens_have_bos_where_the_format_has_it(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    for name in ("alpaca", "dialogue", "chatml"):
        template = get_template(name)
        ids = template.prompt_ids(tokenizer, EXCHANGE)
        assert ids == tokenizer.encode(template.prompt_text(EXCHANGE), bos=name != "chatml")


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        get_template("alpacca")
    with pytest.raises(UserError, match="dialogue"):
        get_template("xyzzy")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_saved_whole(name: str, tmp_path: Path) -> None:
    get_template(name).save(tmp_path / "template.json")
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
        ("[]", r"not a prompt template:\n  should be a mapping, not \[\]"),
        ("{", "not JSON"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text(content)
    with pytest.raises(UserError, match=words):
        Template.load(tmp_path / "template.json")


def test_a_folders_template_comes_from_the_best_place(tmp_path: Path, tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    template, where = template_of_folder(tmp_path, tokenizer)
    assert template == get_template("none")
    assert "no chat template" in where
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "{{ bos_token }}d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template, where = template_of_folder(tmp_path, tokenizer)
    assert (template.prompt_text([Turn("human", "x")]), where) == (
        "<s>d",
        "the chat template, from tokenizer_config.json",
    )
    (tmp_path / "chat_template.jinja").write_text("j{{ eos_token }}")
    template, where = template_of_folder(tmp_path, tokenizer)
    assert (template.prompt_text([Turn("human", "x")]), where) == (
        "j</s>",
        "the chat template, from chat_template.jinja",
    )
    get_template("dialogue").save(tmp_path / "template.json")
    template, where = template_of_folder(tmp_path, tokenizer)
    assert (template, where) == (get_template("dialogue"), "dialogue, from template.json")


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


def test_a_chat_template_asks_like_our_own(tokenizer_path: Path) -> None:
    template = chat_template(CHATML_JINJA, tokenizer_path)
    assert template.prompt_text(EXCHANGE, "Be kind.") == get_template("chatml").prompt_text(EXCHANGE, "Be kind.")
    assert template.stop == ("<|im_end|>",)


def test_a_chat_templates_bos_and_eos_become_tokens(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    source = "{% for m in messages %}{{ bos_token }}[{{ m.content }}]{{ eos_token }}{% endfor %}"
    ids = chat_template(source, tokenizer_path).prompt_ids(tokenizer, [Turn("human", "a"), Turn("assistant", "b")])
    assert ids == [*tokenizer.encode("[a]", bos=True, eos=True), *tokenizer.encode("[b]", bos=True, eos=True)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content + 1 }}", "fails on these turns"),
        ("{{ ''.__class__.__mro__ }}", "fails on these turns"),
        ("{{ messages.append(1) }}", "fails on these turns"),
        ("{% for x in range(999999999) %}{% endfor %}", "fails on these turns"),
    ],
)
def test_a_chat_template_can_refuse_but_not_escape(source: str, words: str, tokenizer_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        chat_template(source, tokenizer_path).prompt_text(EXCHANGE)


def test_a_broken_chat_template_is_an_error(tokenizer_path: Path) -> None:
    with pytest.raises(UserError, match="is not a chat template"):
        chat_template("{% if %}", tokenizer_path)
