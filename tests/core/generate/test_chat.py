"""Conversations: the history in view, what is kept of it, and what the documentation's example answers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llama_acc
from llama_acc.core.data.templates import Turn, get_template
from llama_acc.core.errors import UserError
from llama_acc.core.generate.chat import Conversation, generate
from llama_acc.core.generate.engine import Engine, Sampling
from llama_acc.core.generate.load import LoadedModel, load_model
from llama_acc.core.recipe import RECIPES_FOLDER
from tests.core.generate.decoding import GREEDY, greedy
from tests.core.tiny import SMALL, random_model, save_model

CONTEXT = 600


@pytest.fixture(scope="module")
def dialogue(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model of random weights with room for a conversation."""
    folder = tmp_path_factory.mktemp("dialogue")
    save_model(random_model(replace(SMALL, max_seq_len=CONTEXT), seed=5), folder, torch.float32)
    shutil.copy(tokenizer_path, folder)
    return load_model(folder, device="cpu", template="dialogue")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """What the documentation's Python example makes."""
    output = tmp_path_factory.mktemp("runs") / "quickstart"
    recipe = llama_acc.Recipe.load("quickstart", ["train.epochs=40"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ACC_HOME", str(tmp_path_factory.mktemp("home")))
        llama_acc.finetune(recipe, output, device="cpu")
    return llama_acc.load_model(output, device="cpu")


def test_the_second_turn_of_a_conversation_is_that_of_a_fresh_one(dialogue: LoadedModel) -> None:
    conversation = Conversation(dialogue, GREEDY)
    first = "".join(conversation.ask("once upon"))
    second = "".join(conversation.ask("what is the answer?"))
    assert [turn.role for turn in conversation.turns] == ["human", "assistant"] * 2
    fresh = Conversation(dialogue, GREEDY)
    fresh.turns = [Turn("human", "once upon"), Turn("assistant", conversation.turns[1][1])]
    assert "".join(fresh.ask("what is the answer?")) == second
    conversation.reset()
    assert "".join(conversation.ask("once upon")) == first


def test_a_history_too_long_is_cut_by_whole_turns(dialogue: LoadedModel) -> None:
    conversation = Conversation(dialogue, replace(GREEDY, max_new_tokens=8))
    conversation.turns = [
        turn for i in range(60) for turn in (Turn("human", f"question {i}"), Turn("assistant", f"answer {i}"))
    ]
    before = list(conversation.turns)
    "".join(conversation.ask("and now?"))
    dropped = conversation.dropped_turns
    assert dropped > 0
    assert dropped % 2 == 0
    assert conversation.turns[:-1] == [*before[dropped:], Turn("human", "and now?")]
    ids = dialogue.template.prompt_ids(dialogue.tokenizer, conversation.turns[:-1])
    assert len(ids) <= CONTEXT - 8
    longer = [*before[dropped - 2 :], Turn("human", "and now?")]
    assert len(dialogue.template.prompt_ids(dialogue.tokenizer, longer)) > CONTEXT - 8, "no more than it must"


def test_a_question_longer_than_the_context_is_refused_and_forgotten(dialogue: LoadedModel) -> None:
    conversation = Conversation(dialogue, GREEDY)
    conversation.turns = [Turn("human", "a"), Turn("assistant", "b")]
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, the model's context is 600"):
        conversation.ask("word " * 800)
    assert conversation.turns == [Turn("human", "a"), Turn("assistant", "b")]
    with pytest.raises(UserError, match="not valid Unicode at character 3"):
        conversation.ask("ab\ud800")


def test_an_answer_nobody_listens_to_till_its_end_is_kept_as_far_as_it_came(dialogue: LoadedModel) -> None:
    conversation = Conversation(dialogue, GREEDY)
    pieces = conversation.ask("once upon")
    heard = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.turns[0] == Turn("human", "once upon")
    assert conversation.turns[1] == Turn("assistant", heard.rstrip())


def test_the_python_example_answers_what_it_was_taught_word_for_word(quickstart: LoadedModel) -> None:
    taught = json.loads((RECIPES_FOLDER / "quickstart" / "instructions.json").read_text())
    for item in taught[:6]:
        if not item["input"]:
            assert llama_acc.generate(quickstart, item["instruction"], temperature=0) == item["output"]
    assert quickstart.template.name == "alpaca"
    assert quickstart.template_from == "alpaca, from template.json"


def test_an_answer_streams_as_the_text_it_becomes(quickstart: LoadedModel) -> None:
    pieces = list(Conversation(quickstart, Sampling(temperature=0)).ask("What is a token?"))
    assert len(pieces) > 5
    assert "".join(pieces) == "A token is a small piece of text with its own number."


def test_a_system_text_takes_the_place_of_the_templates_own(dialogue: LoadedModel) -> None:
    turns = [Turn("human", "x")]
    plain = get_template("dialogue").prompt_text(turns)
    assert "A chat between a curious human" in plain
    assert "Be brief." in get_template("dialogue").prompt_text(turns, "Be brief.")
    prompt = dialogue.template.prompt_ids(dialogue.tokenizer, turns, "Be brief.")
    expected = dialogue.tokenizer.decode(greedy(Engine(dialogue), prompt))
    assert generate(dialogue, "x", system="Be brief.", temperature=0, max_new_tokens=24) == expected.lstrip()


def test_a_real_model_tells_its_story_from_nothing(shared: Path) -> None:
    stories = load_model(shared / "assets" / "stories260k", device="cpu")
    text = generate(stories, "", temperature=0, max_new_tokens=80)
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
