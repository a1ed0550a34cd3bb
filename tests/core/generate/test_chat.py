"""Conversations: the history in view, what is kept of it, and what the documentation's example answers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llama_acc
from llama_acc.core.data.templates import Turn, get_template
from llama_acc.core.generate.chat import Conversation, generate
from llama_acc.core.generate.engine import Engine
from llama_acc.core.generate.load import LoadedModel, load_model
from llama_acc.core.generate.sampling import Sampling
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


def test_the_second_turn_of_a_conversation_is_that_of_a_fresh_one(dialogue: LoadedModel) -> None:
    """And an answer nobody listens to till its end is kept as far as it came."""
    conversation = Conversation(dialogue, GREEDY)
    first = "".join(conversation.ask("once upon"))
    second = "".join(conversation.ask("what is the answer?"))
    assert [turn.role for turn in conversation.turns] == ["human", "assistant"] * 2
    fresh = Conversation(dialogue, GREEDY)
    fresh.turns = [Turn("human", "once upon"), Turn("assistant", conversation.turns[1][1])]
    assert "".join(fresh.ask("what is the answer?")) == second
    conversation.reset()
    assert "".join(conversation.ask("once upon")) == first
    fresh.reset()
    pieces = fresh.ask("once upon")
    heard = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert fresh.turns == [Turn("human", "once upon"), Turn("assistant", heard.rstrip())]


def test_a_history_too_long_is_cut_by_whole_turns(dialogue: LoadedModel) -> None:
    conversation = Conversation(dialogue, replace(GREEDY, max_new_tokens=8))
    conversation.turns = [
        turn for i in range(60) for turn in (Turn("human", f"question {i}"), Turn("assistant", f"answer {i}"))
    ]
    before, asked = list(conversation.turns), Turn("human", "and now?")
    "".join(conversation.ask(asked.text))
    dropped = conversation.dropped_turns
    assert dropped > 0
    assert dropped % 2 == 0
    assert conversation.turns[:-1] == [*before[dropped:], asked]

    def length(turns: list[Turn]) -> int:
        return len(dialogue.template.prompt_ids(dialogue.tokenizer, [*turns, asked]))

    assert length(before[dropped:]) <= CONTEXT - 8
    assert length(before[dropped - 2 :]) > CONTEXT - 8, "no more than it must"


def test_the_python_example_answers_what_it_was_taught_word_for_word(tmp_path: Path) -> None:
    """That of the documentation; and the answer streams as the text it becomes."""
    llama_acc.finetune(llama_acc.Recipe.load("quickstart", ["train.epochs=40"]), tmp_path / "runs", device="cpu")
    quickstart = llama_acc.load_model(tmp_path / "runs", device="cpu")
    taught = json.loads((RECIPES_FOLDER / "quickstart" / "instructions.json").read_text())
    for item in taught[:6]:
        if not item["input"]:
            assert llama_acc.generate(quickstart, item["instruction"], temperature=0) == item["output"]
    assert (quickstart.template.name, quickstart.template_from) == ("alpaca", "alpaca, from template.json")
    pieces = list(Conversation(quickstart, Sampling(temperature=0)).ask("What is a token?"))
    assert len(pieces) > 5
    assert "".join(pieces) == "A token is a small piece of text with its own number."


def test_a_system_text_takes_the_place_of_the_templates_own(dialogue: LoadedModel) -> None:
    turns = [Turn("human", "x")]
    assert "A chat between a curious human" in get_template("dialogue").prompt_text(turns)
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
