"""Conversations: the history in view, and what is kept of it."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_acc.core.data.templates import Turn, get_template
from llama_acc.core.errors import UserError
from llama_acc.core.generate.chat import Conversation, generate
from llama_acc.core.generate.engine import Engine
from llama_acc.core.generate.load import LoadedModel, load_model
from llama_acc.core.generate.sampling import Sampling
from llama_acc.core.generate.service import Service
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
    pieces.close()
    assert fresh.turns == [Turn("human", "once upon"), Turn("assistant", heard.rstrip())]


def test_another_answer_has_a_seed_of_its_own_and_takes_the_place_of_the_first(dialogue: LoadedModel) -> None:
    drawn = Conversation(dialogue, Sampling(temperature=1.5, seed=3, max_new_tokens=24))
    "".join(drawn.ask("hello"))
    answers = {"".join(drawn.ask("once upon")), "".join(drawn.retry()), last := "".join(drawn.retry())}
    assert len(answers) == 3
    assert [turn.role for turn in drawn.turns] == ["human", "assistant"] * 2
    assert drawn.turns[-1].text == last.rstrip()
    assert drawn.tokens_per_second is not None
    assert drawn.tokens_per_second > 0


def test_a_question_in_place_of_the_last_one_is_answered_as_if_that_had_not_been(dialogue: LoadedModel) -> None:
    """One that is refused replaces nothing."""
    conversation, fresh = Conversation(dialogue, GREEDY), Conversation(dialogue, GREEDY)
    for question in ("hello", "once upon"):
        "".join(conversation.ask(question))
    before = list(conversation.turns)
    with pytest.raises(UserError, match="context"):
        conversation.ask("x" * CONTEXT, replace_last=True)
    assert conversation.turns == before
    assert conversation.last_question == "once upon"
    "".join(fresh.ask("hello"))
    expected = "".join(fresh.ask("what is it?"))
    assert "".join(conversation.ask("what is it?", replace_last=True)) == expected
    assert conversation.turns == fresh.turns
    conversation.reset()
    for refused in (conversation.retry, lambda: conversation.ask("x", replace_last=True)):
        with pytest.raises(UserError, match="no question yet"):
            refused()


def test_a_second_model_answers_the_same_question_behind_the_same_history(
    dialogue: LoadedModel, tmp_path: Path
) -> None:
    save_model(random_model(replace(SMALL, max_seq_len=CONTEXT), seed=6), tmp_path, torch.float32)
    shutil.copy(dialogue.tokenizer.path, tmp_path)
    loaded = load_model(tmp_path, device="cpu", template="dialogue")
    first, second = Conversation(dialogue, GREEDY), Conversation(loaded, GREEDY)
    first.system = "Be brief."
    "".join(first.ask("hello"))
    pieces = first.ask("once upon")
    answer = "".join(second.answer_last_of(first))  # while the first is still at it, or after it
    own = "".join(pieces)
    assert answer == "".join(second.answer_last_of(first)) != own
    alone = Conversation(loaded, GREEDY)
    alone.turns, alone.system = first.turns[:2], "Be brief."
    assert "".join(alone.ask("once upon")) == answer


def test_the_tokens_of_an_answer_are_shown_with_what_came_before_and_how_likely_they_were(
    dialogue: LoadedModel,
) -> None:
    conversation = Conversation(dialogue, replace(GREEDY, logprobs=2))
    assert conversation.token_view() == []
    answer = "".join(conversation.ask("once upon a time 🦙"))
    shown, reply = conversation.token_view(), conversation.reply
    assert reply is not None
    end = [] if reply.end_token is None else [reply.end_token]
    assert [one.token for one in shown] == [*reply.prompt.tokens, *reply.tokens, *end]
    fed = [one for one in shown if not one.is_reply]
    assert "".join(one.text for one in fed) == dialogue.template.prompt_text([Turn("human", "once upon a time 🦙")])
    assert [(one.piece, one.text) for one in fed if one.special] == [("<s>", "")]
    whole_characters = answer.strip().rstrip("\ufffd")  # what its last tokens begin has no text yet
    assert "".join(one.text for one in shown[len(fed) :]).strip() == whole_characters
    documents, tokens = [one.token for one in shown], len(shown) - len(fed)
    [(score, _)] = Engine(dialogue).score([documents[:-1]], [(0, documents[-tokens:])])
    assert score == pytest.approx(sum(one.logprobs.own for one in shown if one.logprobs), abs=1e-3)


def test_conversations_of_several_threads_share_a_service_and_hear_what_they_would_alone(dialogue: LoadedModel) -> None:
    questions = ["once upon", "what is it?", "hello"]
    alone = [["".join(Conversation(dialogue, GREEDY).ask(question))] for question in questions]
    with Service(Engine(dialogue, slots=2)).running() as service, ThreadPoolExecutor() as threads:
        conversations = [Conversation(dialogue, GREEDY, service) for _ in questions]
        asked = threads.map(lambda pair: ["".join(pair[0].ask(pair[1]))], zip(conversations, questions, strict=True))
        assert list(asked) == alone
        pieces = conversations[0].ask("what is the answer?")
        heard = next(pieces)
        pieces.close()
        assert conversations[0].turns[-1].text == heard.rstrip()
        assert "".join(conversations[0].retry()), "the slot of the answer that was cut short is free"
        assert not service.engine.running


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
