"""A trained model to talk to: what it says is what the model computes, and nothing that should not be seen."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_acc
from llama_acc.core.conversation import Conversation, generate
from llama_acc.core.data.templates import Turn, get_template
from llama_acc.core.errors import UserError
from llama_acc.core.generation import Generator, Sampling, truncate_at_stop_strings
from llama_acc.core.inference import LoadedModel, load_model
from llama_acc.core.recipe import RECIPES_FOLDER
from tests.core.tiny import SMALL, difference, document_logits, loaded_model, random_model, save_model

CONTEXT = 600
GREEDY = Sampling(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def folder(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, in the layout a run leaves."""
    folder = tmp_path_factory.mktemp("random")
    save_model(random_model(seed=5), folder, torch.float32)
    shutil.copy(tokenizer_path, folder)
    return folder


@pytest.fixture(scope="module")
def dialogue(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model of random weights with room for a conversation."""
    folder = tmp_path_factory.mktemp("dialogue")
    save_model(random_model(replace(SMALL, max_seq_len=CONTEXT), seed=5), folder, torch.float32)
    shutil.copy(tokenizer_path, folder)
    return load_model(folder, device="cpu", template="dialogue")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """What the documentation's Python example makes."""
    output = tmp_path_factory.mktemp("runs") / "quickstart"
    recipe = llama_acc.Recipe.load("quickstart", ["train.epochs=40"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ACC_HOME", str(tmp_path_factory.mktemp("home")))
        llama_acc.finetune(recipe, output, device="cpu")
    return llama_acc.load_model(output, device="cpu")


def uncached_greedy(folder: Path, prompt: list[int], count: int, eos: int) -> list[int]:
    """The likeliest token of a full forward pass, again and again, by a model that was loaded otherwise."""
    model = loaded_model(folder)
    tokens = list(prompt)
    for _ in range(count):
        token = int(document_logits(model, [torch.tensor(tokens)])[0][-1].argmax())
        if token == eos:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def test_a_loaded_model_gives_the_logits_of_the_one_that_was_saved(folder: Path, loaded: LoadedModel) -> None:
    document = torch.arange(3, 40)
    assert (
        difference(document_logits(loaded.model, [document])[0], document_logits(random_model(seed=5), [document])[0])
        < 1e-5
    )
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_parameters_keep_their_names_however_they_are_laid_out(folder: Path, loaded: LoadedModel) -> None:
    saved = loaded_model(folder).state_dict()
    assert loaded.model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize("prompt", [[1], [1, 40, 41, 42], list(range(1, 60))], ids=len)
def test_greedy_generation_is_the_argmax_of_uncached_passes(
    prompt: list[int], folder: Path, loaded: LoadedModel
) -> None:
    generator = Generator(loaded, GREEDY)
    expected = uncached_greedy(folder, prompt, GREEDY.max_new_tokens, loaded.tokenizer.eos_id)
    assert list(generator.tokens(prompt)) == expected
    assert list(generator.tokens(prompt)) == expected, "a second time, from the cache"


def test_a_generator_answers_from_its_cache_as_from_scratch(folder: Path, loaded: LoadedModel) -> None:
    eos = loaded.tokenizer.eos_id
    generator = Generator(loaded, GREEDY)
    first = [1, 50, 60, 70]
    answer = list(generator.tokens(first))
    for prompt in ([*first, *answer, 80, 90], [1, 50, 61, 70], [1], [*first, *answer[:3], 99]):
        assert list(generator.tokens(prompt)) == uncached_greedy(folder, prompt, GREEDY.max_new_tokens, eos)


def test_an_answer_cut_short_by_its_listener_leaves_the_cache_usable(folder: Path, loaded: LoadedModel) -> None:
    generator = Generator(loaded, GREEDY)
    tokens = generator.tokens([1, 50])
    next(tokens)
    del tokens
    expected = uncached_greedy(folder, [1, 50, 7], GREEDY.max_new_tokens, loaded.tokenizer.eos_id)
    assert list(generator.tokens([1, 50, 7])) == expected


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


def test_generation_ends_at_the_end_of_the_context(loaded: LoadedModel) -> None:
    generator = Generator(loaded, Sampling(temperature=1.0, seed=0, max_new_tokens=10_000))
    assert 0 < len(list(generator.tokens([1] * (SMALL.max_seq_len - 3)))) <= 3
    assert 0 < len(list(Generator(loaded, replace(GREEDY, max_new_tokens=5)).tokens([1]))) <= 5


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


def oracle(text: str, stops: list[str]) -> str:
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


PIECES = st.lists(st.text(alphabet="\n#a ", max_size=5), max_size=12)
STOPS = st.lists(st.text(alphabet="\n#a", min_size=1, max_size=5), max_size=3)


@given(PIECES, STOPS)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_what_is_shown_is_the_text_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    shown = list(truncate_at_stop_strings(iter(pieces), stops))
    assert "".join(shown) == oracle("".join(pieces), stops)
    assert all(shown)


@given(PIECES, STOPS)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_nothing_is_held_back_that_cannot_be_the_start_of_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    given_so_far, shown = "", ""

    def source() -> Iterator[str]:
        nonlocal given_so_far
        for piece in pieces:
            if given_so_far:
                held = given_so_far[len(shown) :]
                assert given_so_far.startswith(shown)
                assert not held or any(stop.startswith(held) for stop in stops)
            given_so_far += piece
            yield piece

    for text in truncate_at_stop_strings(source(), stops):
        shown += text


def test_nothing_more_is_generated_once_a_stop_string_is_there() -> None:
    asked = []

    def source() -> Iterator[str]:
        for piece in ("Yes.", "\n#", "##", " Human"):
            asked.append(piece)
            yield piece

    assert list(truncate_at_stop_strings(source(), ["\n###"])) == ["Yes."]
    assert asked == ["Yes.", "\n#", "##"]


def test_a_seed_makes_an_answer_reproducible(loaded: LoadedModel) -> None:
    def answers(seed: int | None, **settings: float) -> str:
        return generate(loaded, "once", seed=seed, max_new_tokens=30, **settings)

    assert answers(1) == answers(1)
    assert len({answers(seed) for seed in range(5)}) > 1
    assert answers(1, temperature=0) == answers(2, temperature=0)


def test_a_tiny_top_p_or_temperature_is_greedy(loaded: LoadedModel) -> None:
    greedy = generate(loaded, "once", temperature=0, max_new_tokens=30)
    for settings_ in ({"top_p": 1e-9, "temperature": 5.0}, {"temperature": 1e-6}, {"temperature": 1e-40}):
        assert generate(loaded, "once", seed=3, max_new_tokens=30, **settings_) == greedy


@pytest.mark.parametrize(
    ("top_p", "possible"), [(0.4, {0}), (0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (1.0, {0, 1, 2})]
)
def test_top_p_draws_from_the_likeliest_tokens_that_reach_it(
    top_p: float, possible: set[int], loaded: LoadedModel
) -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    generator = Generator(loaded, Sampling(temperature=1.0, top_p=top_p, seed=0))
    drawn = [generator._choose(logits) for _ in range(400)]
    assert set(drawn) == possible
    if len(possible) == 3:
        assert drawn.count(0) / 400 == pytest.approx(0.5, abs=0.08)


def test_a_higher_temperature_flattens_what_is_drawn(loaded: LoadedModel) -> None:
    logits = torch.log(torch.tensor([0.9, 0.1]))
    share = {}
    for temperature in (0.5, 1.0, 4.0):
        generator = Generator(loaded, Sampling(temperature=temperature, top_p=1.0, seed=0))
        share[temperature] = sum(generator._choose(logits) for _ in range(500)) / 500
    assert share[0.5] < share[1.0] < share[4.0]


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


def test_the_python_example_answers_what_it_was_taught_word_for_word(quickstart: LoadedModel) -> None:
    taught = json.loads((RECIPES_FOLDER / "quickstart" / "instructions.json").read_text())
    for item in taught[:6]:
        if not item["input"]:
            assert llama_acc.generate(quickstart, item["instruction"], temperature=0) == item["output"]
    assert quickstart.template.name == "alpaca"
    assert quickstart.template_from == "alpaca, from template.json"


def test_a_trained_model_ends_its_answers_by_itself(quickstart: LoadedModel) -> None:
    generator = Generator(quickstart, Sampling(temperature=0, max_new_tokens=200))
    prompt = quickstart.template.prompt_ids(quickstart.tokenizer, [Turn("human", "What is LLaMA?")])
    tokens = list(generator.tokens(prompt))
    assert 0 < len(tokens) < 60
    assert quickstart.tokenizer.eos_id not in tokens


def test_an_answer_streams_as_the_text_it_becomes(quickstart: LoadedModel) -> None:
    pieces = list(Conversation(quickstart, Sampling(temperature=0)).ask("What is a token?"))
    assert len(pieces) > 5
    assert "".join(pieces) == "A token is a small piece of text with its own number."


def test_the_template_asked_for_wins(folder: Path) -> None:
    assert load_model(folder, device="cpu").template.name == "none"
    chosen = load_model(folder, device="cpu", template="chatml")
    assert (chosen.template.name, chosen.template_from) == ("chatml", "asked for")
    with pytest.raises(UserError, match="unknown template 'chatlm'"):
        load_model(folder, device="cpu", template="chatlm")


@pytest.mark.parametrize(
    ("saved", "dtype", "expected"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_a_model_computes_in_its_checkpoints_type_unless_told(
    saved: torch.dtype, dtype: torch.dtype | None, expected: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    save_model(random_model(), tmp_path, saved)
    shutil.copy(folder / "tokenizer.model", tmp_path)
    model = load_model(tmp_path, device="cpu", dtype=dtype).model
    assert model.dtype == expected
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_what_a_checkpoint_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    (whole / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="there is no tokenizer in"):
        load_model(whole, device="cpu")
    assert load_model(whole, device="cpu", tokenizer=folder / "tokenizer.model").tokenizer.vocab_size == 300
    (whole / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no params\.json or config\.json"):
        load_model(whole, device="cpu", tokenizer=folder / "tokenizer.model")


def test_verifying_finds_a_changed_byte(tmp_path: Path) -> None:
    from tests.core.train.runs import run

    checkpoint = run(tmp_path / "run", "train.max_steps=1", "train.warmup_epochs=0").checkpoint
    load_model(checkpoint, device="cpu", verify=True)
    damaged = checkpoint / "consolidated.00-of-01.model.pth"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(UserError, match=r"consolidated\.00-of-01\.model\.pth was changed"):
        load_model(checkpoint, device="cpu", verify=True)


def test_a_later_checkpoint_overrides_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    norm = {"llma.norm.weight": torch.full((SMALL.dim,), 3.0)}
    torch.save({"model": norm}, tmp_path / "consolidated.00-of-01.model.pth")
    shutil.copy(folder / "tokenizer.model", tmp_path)
    model = load_model(folder, tmp_path, device="cpu").model
    assert (model.norm.weight == 3).all()
    with pytest.raises(UserError, match="holds only what was trained, and not on top of which base"):
        (tmp_path / "config.json").write_text(json.dumps(SMALL.to_params()))
        load_model(tmp_path, device="cpu")


def test_a_system_text_takes_the_place_of_the_templates_own(dialogue: LoadedModel) -> None:
    turns = [Turn("human", "x")]
    plain = get_template("dialogue").prompt_text(turns)
    assert "A chat between a curious human" in plain
    assert "Be brief." in get_template("dialogue").prompt_text(turns, "Be brief.")
    prompt = dialogue.template.prompt_ids(dialogue.tokenizer, turns, "Be brief.")
    expected = dialogue.tokenizer.decode(list(Generator(dialogue, GREEDY).tokens(prompt)))
    assert generate(dialogue, "x", system="Be brief.", temperature=0, max_new_tokens=24) == expected.lstrip()


def test_a_real_model_tells_its_story_from_nothing(shared: Path) -> None:
    stories = load_model(shared / "assets" / "stories260k", device="cpu")
    text = generate(stories, "", temperature=0, max_new_tokens=80)
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
