"""The decoding engine: what it says is what the model computes, whatever else is in the batch or in its past."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_acc.core.data.templates import Template, get_template
from llama_acc.core.errors import UserError
from llama_acc.core.generate.chat import Conversation, encode_question
from llama_acc.core.generate.engine import Engine, Prompt, Reply, slots_for
from llama_acc.core.generate.load import LoadedModel, load_model
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.tokenizer import Tokenizer, load_tokenizer
from tests.cli.chains import write_chain
from tests.core.generate.decoding import GREEDY, decode, greedy, uncached_greedy
from tests.core.tiny import CPU, SMALL, random_model


def loaded(tokenizer_path: Path, config: ModelConfig = SMALL, template: Template | None = None) -> LoadedModel:
    """A model of random weights."""
    model = random_model(config, seed=5).requires_grad_(False)
    return LoadedModel(model, load_tokenizer(tokenizer_path), template or get_template("none"), "asked for", CPU)


def test_an_engine_replies_from_its_past_as_from_scratch_and_computes_what_is_new(tokenizer_path: Path) -> None:
    model = loaded(tokenizer_path)
    engine, first = Engine(model), [1, 50, 60, 70]

    def expected(prompt: list[int]) -> list[int]:
        return uncached_greedy(model.model, prompt, GREEDY.max_new_tokens, model.tokenizer.end_ids)

    reply = greedy(engine, first)
    for prompt in (first, [*first, *reply, 80, 90], [1, 50, 61, 70], [1], [*first, *reply[:3], 99]):
        assert greedy(engine, prompt) == expected(prompt)
    next(engine.generate([Prompt([1, 50])], Sampler(GREEDY)))
    assert greedy(engine, [1, 50, 7]) == expected([1, 50, 7]), "one cut short before"
    fed: list[int] = []
    model.model.register_forward_pre_hook(lambda _, arguments: fed.append(len(arguments[0])))
    for tokens in ([1, 60, 60, 70], [1, 60, 60, 80, 90]):
        greedy(engine, tokens, replace(GREEDY, max_new_tokens=1))
    assert fed == [3, 2]


@pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() == 1, reason="counts threads of libgomp")
def test_an_engine_in_a_thread_of_its_own_has_the_cores_for_itself() -> None:
    program = """
import os, time, types, torch
from llama_acc.core.generate.service import Service
torch.ones(512, 512) @ torch.ones(512, 512)
before = len(os.listdir("/proc/self/task"))
with Service(types.SimpleNamespace(running=[], waiting=[])).running():
    pass
deadline = time.monotonic() + 10  # an ended thread is listed a moment longer
while len(os.listdir("/proc/self/task")) >= before and time.monotonic() < deadline:
    time.sleep(0.01)
assert len(os.listdir("/proc/self/task")) == before - 1, before
"""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", program], env=env, timeout=60, check=True)


def test_replies_end_at_the_end_of_the_context(tokenizer_path: Path) -> None:
    model = loaded(tokenizer_path, replace(SMALL, max_seq_len=64))
    prompts = [Prompt([1] * 63), Prompt([1] * 60), Prompt([1, 50, 51])]
    replies = decode(Engine(model), prompts, Sampling(temperature=0, max_new_tokens=1000), 2)
    assert {reply.index: len(reply.tokens) for reply in replies} == {0: 1, 1: 4, 2: 61}


@pytest.mark.parametrize("name", ["none", "dialogue"])
def test_replies_of_a_batch_end_before_a_stop_string_as_in_a_conversation(name: str, tokenizer_path: Path) -> None:
    questions = ["once upon", "what is the name of the town? " * 3, "a", "the answer is in the question", "who"]
    template = get_template(name)
    whole = ["".join(Conversation(loaded(tokenizer_path, template=template), GREEDY).ask(q)) for q in questions]
    # Taken from the middle of what the model says, they begin and end within tokens.
    stops = tuple(answer[len(answer) // 2 :][1:3] for answer in whole[:3])
    model = loaded(tokenizer_path, template=template.model_copy(update={"stop": stops}))
    expected = {}
    for place, question in enumerate(questions):
        conversation = Conversation(model, GREEDY)
        for _ in conversation.ask(question):
            pass
        expected[place] = conversation.turns[-1][1]
    assert sum(len(expected[place]) < len(answer) for place, answer in enumerate(whole)) >= 3
    replies = decode(Engine(model), [encode_question(model, question) for question in questions], GREEDY, 2)
    assert {reply.index: reply.text for reply in replies} == expected


def test_a_reply_that_has_ended_gives_its_place_to_the_next_prompt(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ":" the model says "a town" and ends, after "?" it says "the the the ..." for ever."""
    write_chain(
        tmp_path, tokenizer_path, answer=" a town", after=":", endless=" the", endless_after="?", max_seq_len=512
    )
    talker, passes, forward = load_model(tmp_path, device="cpu"), list[Any](), Engine._forward
    monkeypatch.setattr(Engine, "_forward", lambda engine, one: passes.append(one.fed) or forward(engine, one))
    prompts = [encode_question(talker, question) for question in ("long?", "short:", "short:", "short:")]
    replies = decode(Engine(talker), prompts, Sampling(temperature=0, max_new_tokens=30), 2)
    assert [reply.index for reply in replies] == [1, 2, 3, 0], "each is given as soon as it has ended"
    assert [reply.text for reply in replies] == ["a town"] * 3 + [" ".join(["the"] * 30)]
    assert len(passes) == 30, "one pass a token, for all together"
    assert max(map(len, passes)) == 2
    assert decode(Engine(talker), [], GREEDY, 4) == []


def test_slots_are_as_many_as_the_free_memory_holds_and_the_cache_takes_what_was_reckoned(
    tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tokenizer_path)
    heads, layers = SMALL.n_kv_heads or 0, SMALL.n_layers
    slot = 2 * layers * heads * SMALL.head_size * 200 * 4
    weights = sum(parameter.nbytes for parameter in model.model.parameters())
    for room, slots in ((0, 1), (5.5, 5), (1000, 64)):
        free = int(2 * weights + room * slot / 0.8)
        monkeypatch.setattr("llama_acc.core.generate.engine.free_memory", lambda _, free=free: free)
        assert slots_for(model, 200) == Engine(model, None, 200).slots == slots
    engine = Engine(model, 5, context=200)
    sizes = []
    for seed in range(4):
        prompts = [Prompt([1, *range(3 + seed + number, 150 + 9 * number)]) for number in range(6)]
        decode(engine, prompts, Sampling(temperature=0, max_new_tokens=100), 5)
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in engine._caches[0].layers))
    assert sizes == [5 * slot] * 4


PIECES = st.lists(st.text(alphabet="\n#a ", max_size=5), max_size=12)
STOPS = st.lists(st.text(alphabet="\n#a", min_size=1, max_size=5), max_size=3)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@given(PIECES, STOPS)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_reply_shows_at_once_all_before_the_first_stop_string(
    tokenizer: Tokenizer, pieces: list[str], stops: list[str]
) -> None:
    tokens = [token for piece in pieces for token in tokenizer.encode(piece)]
    reply = Reply(Prompt([1]), get_template("none").model_copy(update={"stop": tuple(stops)}), tokenizer, 1000)
    pushed = 0
    for token in [*tokens, tokenizer.eos_id]:
        if reply.ended:
            break
        shown = reply.push(token)
        assert reply.text.endswith(shown)
        pushed += token in tokens
        text = tokenizer.decode(tokens[:pushed])
        first = min([text.find(stop) for stop in stops if stop in text], default=len(text))
        assert text[:first].startswith(reply.text)
        held = text[len(reply.text) : first]
        assert not held or (any(stop.startswith(held) for stop in stops) and not reply.ended), "no need to hold it back"
    assert reply.ended, "at a stop string, or at the end"


def test_an_end_mark_that_is_only_the_beginning_of_a_stop_string_is_left_out(tokenizer: Tokenizer) -> None:
    template = get_template("dialogue").with_strict_stops()
    assert all(stop.startswith("\n###") and stop != "\n###" for stop in template.stop)
    reply = Reply(Prompt([1], strip=True), template, tokenizer, 1000)
    for token in [*tokenizer.encode("  a ### b\n###"), tokenizer.eos_id]:
        reply.push(token)
    assert reply.text == "a ### b"


def test_the_beginning_a_reply_is_given_is_shown_with_it_and_spaces_of_the_prompt_are_not(tokenizer: Tokenizer) -> None:
    given, more = tokenizer.encode("the answer"), tokenizer.encode(" is  a")
    reply = Reply(Prompt([1, *given], prefill=given), get_template("none"), tokenizer, len(more))
    assert "".join(reply.push(token) for token in more) == reply.text == tokenizer.decode(given + more)
    assert reply.tokens == more
    tokens = tokenizer.encode("   a")
    whole = tokenizer.decode(tokens)
    leading = len(whole) - len(whole.lstrip())
    assert leading >= 2
    for spaces in (0, 1, leading, leading + 1):
        reply = Reply(Prompt([1], spaces=spaces), get_template("none"), tokenizer, len(tokens))
        assert "".join(reply.push(token) for token in tokens) == reply.text == whole[min(spaces, leading) :]


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 1e-300}, {"logit_bias": {3: 1e300}}, {"repetition_penalty": 1e-300}, {"frequency_penalty": -1e300}],
)
def test_what_float32_does_not_hold_is_drawn_from_all_the_same(settings: dict[str, Any]) -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=0, **settings))
    logits = torch.tensor([0.5, 1.0, -3.0, 0.0])
    assert len({sampler(logits, [1]) for _ in range(5)}) == 1


def test_a_temperature_flattens_a_seed_repeats_and_a_tiny_top_p_or_temperature_is_greedy(tokenizer_path: Path) -> None:
    share = []
    for temperature in (0.5, 1.0, 4.0):
        sampler = Sampler(Sampling(temperature=temperature, top_p=1.0, seed=0))
        share.append(sum(sampler(torch.log(torch.tensor([0.9, 0.1]))) for _ in range(500)))
    assert share[0] < share[1] < share[2]
    engine = Engine(loaded(tokenizer_path))

    def reply(**settings_: float) -> list[int]:
        return greedy(engine, [1, 40], Sampling(max_new_tokens=24, **settings_))  # type: ignore[arg-type]

    assert reply(seed=1) == reply(seed=1)
    assert len({tuple(reply(seed=seed)) for seed in range(5)}) > 1
    for settings_ in ({"top_p": 1e-9, "temperature": 5.0}, {"temperature": 1e-6}, {"temperature": 1e-40}):
        assert reply(seed=3, **settings_) == reply(temperature=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, r"the temperature must be .* not -0\.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, r"top-p must be above 0 and at most 1, not 0\.0"),
        ({"top_p": 1.1}, "top-p must be above 0"),
        ({"max_new_tokens": 0}, "at least 1 new token must be allowed, not 0"),
    ],
)
def test_impossible_sampling_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**arguments)  # type: ignore[arg-type]
