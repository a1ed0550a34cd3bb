"""Answers of a batch: they are those of one prompt at a time, whatever else is in the batch."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_acc.core.batch_generation import Answer, encode_question, generate_batch
from llama_acc.core.conversation import Conversation
from llama_acc.core.data.templates import Template, get_template
from llama_acc.core.errors import UserError
from llama_acc.core.generation import Generator, Sampling
from llama_acc.core.inference import LoadedModel, load_model
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.tuning import Tuning
from llama_acc.core.tokenizer import load_tokenizer
from tests.cli.chains import write_chain
from tests.core.tiny import CPU, SMALL, random_model

NEW_TOKENS = 24
# From nothing but BOS to nearly the whole context.
PROMPTS = [[1], list(range(3, 230)), [1, 40, 41], list(range(60, 120)), [1, 7], list(range(20, 190)), [1, 99, 98, 97]]


def loaded(tokenizer_path: Path, config: ModelConfig = SMALL, template: Template | None = None) -> LoadedModel:
    """A model of random weights."""
    model = random_model(config, seed=5).requires_grad_(False)
    return LoadedModel(model, load_tokenizer(tokenizer_path), template or get_template("none"), "asked for", CPU)


def one_at_a_time(model: LoadedModel, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    sampling = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    return [list(Generator(model, sampling).tokens(prompt)) for prompt in prompts]


def in_order(answers: list[Answer]) -> list[Answer]:
    assert sorted(answer.place for answer in answers) == list(range(len(answers)))
    return sorted(answers)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_a_batch_generates_token_for_token_what_each_prompt_does_alone(batch_size: int, tokenizer_path: Path) -> None:
    model = loaded(tokenizer_path)
    together = in_order(list(generate_batch(model, PROMPTS, NEW_TOKENS, batch_size)))
    assert [answer.tokens for answer in together] == one_at_a_time(model, PROMPTS, NEW_TOKENS)
    assert all(answer.text == model.tokenizer.decode(answer.tokens) for answer in together)


@pytest.mark.parametrize("tuning", [Tuning("lora_bias_norm", 4), Tuning("adapter", 0, 2, 5)], ids=lambda t: t.method)
def test_so_it_does_with_what_tuning_adds_to_a_model(tuning: Tuning, tokenizer_path: Path) -> None:
    model = loaded(tokenizer_path, replace(SMALL, tuning=tuning))
    if tuning.what.prefix:
        torch.nn.init.ones_(model.model.prefix_gate)
    together = in_order(list(generate_batch(model, PROMPTS, NEW_TOKENS, 3)))
    assert [answer.tokens for answer in together] == one_at_a_time(model, PROMPTS, NEW_TOKENS)


def test_answers_end_at_the_end_of_the_context(tokenizer_path: Path) -> None:
    model = loaded(tokenizer_path, replace(SMALL, max_seq_len=64))
    prompts = [[1] * 63, [1] * 60, [1, 50, 51]]
    together = in_order(list(generate_batch(model, prompts, 1000, 2)))
    assert [len(answer.tokens) for answer in together] == [1, 4, 61]
    assert [answer.tokens for answer in together] == one_at_a_time(model, prompts, 1000)


@pytest.mark.parametrize("kind", ["single_turn", "dialogue"])
def test_answers_end_before_a_stop_string_as_in_a_conversation(kind: str, tokenizer_path: Path) -> None:
    questions = ["once upon", "what is the name of the town? " * 3, "a", "the answer is in the question", "who"]
    sampling = Sampling(temperature=0, max_new_tokens=NEW_TOKENS)
    template = get_template("dialogue" if kind == "dialogue" else "none")
    whole = ["".join(Conversation(loaded(tokenizer_path, template=template), sampling).ask(q)) for q in questions]
    # Taken from the middle of what the model says, they begin and end within tokens.
    stops = tuple(answer[len(answer) // 2 :][1:3] for answer in whole[:3])
    model = loaded(tokenizer_path, template=template.model_copy(update={"stop": stops}))
    expected = []
    for question in questions:
        conversation = Conversation(model, sampling)
        for _ in conversation.ask(question):
            pass
        expected.append(conversation.turns[-1][1])
    assert sum(len(said) < len(answer) for said, answer in zip(expected, whole, strict=True)) >= 3
    prompts = [encode_question(model, question) for question in questions]
    together = in_order(list(generate_batch(model, prompts, NEW_TOKENS, 2)))
    assert [answer.text for answer in together] == expected


@pytest.fixture(scope="module")
def talker(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """After ":" it says "a town" and ends, after "?" it says "the the the ..." for ever."""
    folder = tmp_path_factory.mktemp("talker")
    shutil.copy(tokenizer_path, folder / "tokenizer.model")
    write_chain(folder, answer=" a town", after=":", endless=" the", endless_after="?", max_seq_len=512)
    return load_model(folder, device="cpu")


def test_an_answer_that_has_ended_gives_its_place_to_the_next_question(talker: LoadedModel) -> None:
    passes = []
    talker.model.register_forward_pre_hook(lambda _, arguments: passes.append(arguments[2]))
    questions = ["long?", "short:", "short:", "short:"]
    answers = list(generate_batch(talker, [encode_question(talker, q) for q in questions], 30, 2))
    assert [answer.place for answer in answers] == [1, 2, 3, 0], "each is given as soon as it has ended"
    assert [answer.text for answer in answers] == ["a town"] * 3 + [" ".join(["the"] * 30)]
    assert len(passes) == 30, "one pass a token, for all together"
    assert max(map(len, passes)) == 2


def test_no_prompts_have_no_answers(talker: LoadedModel) -> None:
    assert list(generate_batch(talker, [], 10, 4)) == []


def test_a_question_that_cannot_be_asked_is_refused(talker: LoadedModel) -> None:
    assert encode_question(talker, "") == [talker.tokenizer.bos_id]
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, the model's context is 512"):
        encode_question(talker, "word " * 600)
    with pytest.raises(UserError, match="not valid Unicode at character 3"):
        encode_question(talker, "ab\ud800")
