"""Replies that come, run and go together, as they happen to: each is the one it would be alone."""

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from llama_acc.core.data.templates import get_template
from llama_acc.core.errors import UserError
from llama_acc.core.generate.decode_graph import DecodeGraph
from llama_acc.core.generate.engine import Engine, Prompt, Reply
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.model.tuning.adapter import Adapter
from llama_acc.core.model.tuning.lora import LoRABiasNorm
from llama_acc.core.tokenizer import load_tokenizer
from tests.core.generate.decoding import uncached_greedy
from tests.core.ranks import run_ranks
from tests.core.tiny import CPU, SMALL, random_model, save_model

MOST = 12
FAMILIES: dict[str, ModelConfig] = {
    "llama": SMALL,
    "no groups": replace(SMALL, n_kv_heads=4),
    "window": replace(SMALL, sliding_window=7),
    "window on some, biases": replace(SMALL, sliding_window=20, window_layers=(1,), qkv_bias=True),
    "no positions on some": replace(SMALL, nope_layers=(1,), tie_word_embeddings=True),
    "norms of heads": replace(SMALL, qk_norm=True, head_dim=16),
    "adapter": replace(SMALL, tuning=Adapter(0, 1, 5)),
    "lora": replace(SMALL, tuning=LoRABiasNorm(4)),
}


class Request(NamedTuple):
    """A prompt, how it is sampled, and the tokens that follow where nothing else runs."""

    prompt: list[int]
    sampling: Sampling
    alone: list[int]


def load(config: ModelConfig, tokenizer_path: Path) -> LoadedModel:
    model = random_model(config, seed=5).requires_grad_(False)
    if isinstance(config.tuning, Adapter):
        torch.nn.init.ones_(model.prefix_gate)
    return LoadedModel(model, load_tokenizer(tokenizer_path), get_template("none"), "asked for", CPU)


def run(engine: Engine, reply: Reply) -> list[int]:
    while not reply.ended:
        engine.step()
    return reply.tokens


def decode_on_cpu(model: Transformer, tokens: Tensor, positions: Tensor, slots: Tensor, cache: KVCache) -> Tensor:
    """`Transformer.decode` by a CPU's ways."""
    count = len(slots.unique())  # behind them, the last one is repeated
    caches = [cache.beside(slot) for slot in slots[:count].tolist()]
    for past, length in zip(caches, positions.tolist(), strict=False):
        past.length = length
    logits = model.logits(model(tokens[:count], positions[:count], [1] * count, caches=caches))
    return logits[torch.arange(len(slots)).clamp(max=count - 1)]


@contextmanager
def ahead_as_on_gpu() -> Iterator[list[Tensor]]:
    """Lets passes begin before the tokens of those before are read; gives the tokens that such passes were fed."""
    fed, call = list[Tensor](), DecodeGraph.__call__

    def recorded(self: DecodeGraph, tokens: Sequence[int], caches: Any, numbers: Any, before: Any = None) -> Any:
        fed.extend([] if before is None else before[list(tokens)])
        return call(self, tokens, caches, numbers, before)

    ways = patch.multiple(DecodeGraph, takes=lambda _: True, __call__=recorded)
    with ways, patch.object(Transformer, "decode", decode_on_cpu):
        yield fed


def requests_of(loaded: LoadedModel) -> list[Request]:
    """Greedy ones, compared with passes without a cache, and drawn ones; many begin alike."""
    draw = random.Random(0)
    words = range(3, loaded.model.config.vocab_size)
    system = [1, *draw.choices(words, k=60)]
    prompts = [system + draw.choices(words, k=k) for k in (1, 5, 30)]
    prompts += [[1, *draw.choices(words, k=k)] for k in (0, 1, 17, 150)]
    greedy = Sampling(temperature=0, max_new_tokens=MOST)

    def alone(prompt: list[int]) -> list[int]:
        return uncached_greedy(loaded.model, prompt, MOST, loaded.tokenizer.end_ids)

    made = [Request(prompt, greedy, alone(prompt)) for prompt in prompts]
    # A conversation goes on, once from before its end.
    for known in (made[1], made[4]):
        for said in (known.alone, known.alone[:3]):
            prompt = [*known.prompt, *said, *draw.choices(words, k=4)]
            made.append(Request(prompt, greedy, alone(prompt)))
    for seed, known in enumerate(made[:4]):
        sampling = Sampling(1.5, 0.9, seed, MOST, top_k=50, repetition_penalty=1.1, frequency_penalty=0.2)
        for one in (sampling, replace(sampling, repetition_penalty=1.0, frequency_penalty=0.0)):
            drawn = run(engine := Engine(loaded), engine.add(Prompt(known.prompt), Sampler(one)))
            made.append(Request(known.prompt, one, drawn))
    return made


@pytest.mark.parametrize(("name", "is_ahead"), [*((name, False) for name in FAMILIES), ("llama", True)])
def test_each_reply_of_a_random_schedule_is_the_one_it_would_be_alone(
    name: str, is_ahead: bool, tokenizer_path: Path
) -> None:
    """Eight schedules for each of eight families: joining and cancelled at random steps, of random lengths."""
    loaded = load(FAMILIES[name], tokenizer_path)
    requests = requests_of(loaded)
    with ahead_as_on_gpu() if is_ahead else nullcontext([]) as fed:
        run_schedules(name, loaded, requests)
    assert len(fed) > 200 or not is_ahead


def run_schedules(name: str, loaded: LoadedModel, requests: Sequence[Request]) -> None:
    cancelled = waited = 0
    for seed in range(8):
        draw = random.Random(f"{name} {seed}")
        engine = Engine(loaded, draw.choice([1, 2, 3, 5, 16]), chunk=draw.choice([7, 16, 64, 512]))
        joins = sorted((draw.randrange(40), number, draw.choice(requests)) for number in range(16))
        under_way: dict[int, tuple[Reply, Request, int]] = {}
        done: list[tuple[Reply, Request, int]] = []
        step = 0
        while joins or under_way:
            while joins and joins[0][0] <= step:
                _, number, request = joins.pop(0)
                most = draw.randrange(1, MOST + 1)
                sampler = Sampler(replace(request.sampling, max_new_tokens=most))
                under_way[number] = engine.add(Prompt(request.prompt), sampler), request, most
            if under_way and draw.random() < 0.05:
                engine.cancel(under_way[draw.choice(list(under_way))][0])
            engine.step()
            waited += len(engine.waiting)
            assert len(engine.running) <= engine.slots
            done += [one for one in under_way.values() if one[0].ended]
            under_way = {number: one for number, one in under_way.items() if not one[0].ended}
            step += 1
        for reply, request, most in done:
            expected = request.alone[:most]
            assert reply.tokens == expected[: len(reply.tokens)], seed
            assert reply.finish_reason == "cancelled" or reply.tokens == expected, seed
            cancelled += reply.finish_reason == "cancelled"
    assert cancelled > 3
    assert waited > 20


def test_what_was_begun_for_a_reply_that_has_ended_is_left_out(tokenizer_path: Path) -> None:
    loaded, greedy = load(SMALL, tokenizer_path), Sampling(temperature=0, max_new_tokens=MOST)
    with ahead_as_on_gpu() as fed:
        engine = Engine(loaded)
        known = run(engine, engine.add(Prompt([1, 40]), Sampler(greedy)))
        assert known == uncached_greedy(loaded.model, [1, 40], MOST, loaded.tokenizer.end_ids)
        assert len(fed) == MOST - 1, "none is begun behind the last token"
        by_id = engine.add(Prompt([1, 40]), Sampler(replace(greedy, stop_ids=[known[5]])))
        assert run(engine, by_id) == known[: known.index(known[5])]
        assert (by_id.finish_reason, fed[-1]) == ("stop", known[5]), "it was noticed a pass later"
        cancelled, longer = engine.add(Prompt([1, 40]), Sampler(greedy)), [1, 40, *known[:5], 50, 51]
        engine.step()
        engine.cancel(cancelled)
        reply = engine.add(Prompt(longer), Sampler(greedy))
        assert [one for one, _ in engine.step()] == [reply], "its slot is free at once"
        assert run(engine, reply) == uncached_greedy(loaded.model, longer, MOST, loaded.tokenizer.end_ids)


def test_a_long_prompt_comes_in_pieces_and_the_others_get_a_token_in_each_pass(tokenizer_path: Path) -> None:
    loaded = load(SMALL, tokenizer_path)
    fed: list[list[int]] = []
    loaded.model.register_forward_pre_hook(lambda _, given: fed.append(given[2]))
    engine, greedy = Engine(loaded, 3, chunk=64), Sampling(temperature=0, max_new_tokens=20)
    short = [engine.add(Prompt([1, word]), Sampler(greedy)) for word in (7, 40)]
    engine.step()
    long = engine.add(Prompt([1, *range(3, 203)]), Sampler(greedy))
    late = engine.add(Prompt([1, 50]), Sampler(greedy))
    for _ in range(4):
        assert {reply for reply, _ in engine.step()} >= set(short)
    assert fed == [[2, 2], *[[1, 1, 64]] * 3, [1, 1, 9]]
    assert len(long.tokens) == 1
    engine.cancel(short[0])
    assert late in {reply for reply, _ in engine.step()}, "a slot that is left is taken in the next pass"


def test_what_prompts_share_is_computed_once_and_a_past_that_may_go_on_is_kept(tokenizer_path: Path) -> None:
    loaded = load(SMALL, tokenizer_path)
    fed: list[int] = []
    loaded.model.register_forward_pre_hook(lambda _, given: fed.append(len(given[0])))
    engine, one = Engine(loaded, 3), Sampling(temperature=0, max_new_tokens=1)
    system = [1, *range(50, 150)]
    questions = [[30 + number] * 20 for number in range(4)]
    replies = [engine.add(Prompt([*system, *question]), Sampler(one)) for question in questions[:3]]
    while not all(reply.ended for reply in replies):
        engine.step()
    assert fed == [121, 40], "the others wait for the system text of the first"
    fed.clear()
    turns = [*system, *questions[0], *replies[0].tokens, 41, 42]
    run(engine, engine.add(Prompt(turns), Sampler(one)))
    run(engine, engine.add(Prompt([*system, *questions[3]]), Sampler(one)))
    run(engine, engine.add(Prompt([*turns, 43, 44]), Sampler(one)))
    assert fed == [3, 20, 2]


def test_ranks_that_share_a_model_copy_and_feed_the_same(tokenizer_path: Path, tmp_path: Path) -> None:
    loaded = load(SMALL, tokenizer_path)
    save_model(loaded.model, tmp_path, torch.float32)
    shutil.copy(tokenizer_path, tmp_path / "tokenizer.model")
    system = [1, *range(50, 100)]
    prompts = [[*system, 30], [1, 7], [*system, 31, *range(3, 40)], [*system, 30, 32], [1, 8]]
    expected = [uncached_greedy(loaded.model, prompt, MOST, loaded.tokenizer.end_ids) for prompt in prompts]
    work = "tests.core.generate.schedules_work:split_replies"
    assert run_ranks(2, work, folder=str(tmp_path), prompts=prompts, most=MOST) == [expected, []]


def test_settings_that_change_logits_are_those_of_transformers_and_their_definitions() -> None:
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, -0.5, -1.0, 0.9, 0.1])
    prompt = [1, 4, 1]
    kinds = {
        "top_k": (3, TopKLogitsWarper),
        "top_p": (0.7, TopPLogitsWarper),
        "min_p": (0.4, MinPLogitsWarper),
        "repetition_penalty": (1.8, RepetitionPenaltyLogitsProcessor),
    }
    for names in (["top_k"], ["top_p"], ["min_p"], ["repetition_penalty"], ["repetition_penalty", "top_k", "top_p"]):
        scores = logits.unsqueeze(0)
        processors = [TemperatureLogitsWarper(0.8), *(kinds[name][1](kinds[name][0]) for name in names)]
        if names[0] == "repetition_penalty":
            processors = [processors[1], processors[0], *processors[2:]]
        for processor in processors:
            scores = processor(torch.tensor([prompt]), scores)
        expected = scores.softmax(-1)[0]
        settings = {"top_p": 1.0, **{name: kinds[name][0] for name in names}}
        drawn = torch.zeros(8)
        for seed in range(1500):
            drawn[Sampler(Sampling(0.8, seed=seed, **settings))(logits, prompt)] += 1  # type: ignore[arg-type]
        assert ((drawn > 0) <= (expected > 0)).all(), names
        assert (drawn / drawn.sum() - expected).abs().max() < 0.05, names

    sampler = Sampler(Sampling(0, presence_penalty=0.3, frequency_penalty=0.25, logit_bias={3: 1.6, 0: -100.0}))
    counts, expected_tokens = [0] * 8, []
    for _ in range(12):
        changed = [value - 0.3 * (n > 0) - 0.25 * n for value, n in zip(logits.tolist(), counts, strict=True)]
        changed[3] += 1.6
        token = max(range(1, 8), key=changed.__getitem__)
        expected_tokens.append(token)
        counts[token] += 1
    assert [sampler(logits) for _ in range(12)] == expected_tokens
    assert len(set(expected_tokens)) > 3


def test_logprobs_are_the_models_and_stop_strings_and_ids_are_the_requests(tokenizer_path: Path) -> None:
    loaded = load(SMALL, tokenizer_path)
    engine, greedy = Engine(loaded, 4), Sampling(temperature=0, max_new_tokens=12)
    plain = engine.add(Prompt([1, 40]), Sampler(replace(greedy, logprobs=3)))
    run(engine, plain)
    with torch.no_grad():
        hidden = loaded.model(torch.tensor([1, 40, *plain.tokens]), torch.arange(14), [14])
    expected = loaded.model.logits(hidden).log_softmax(-1)[1:-1]
    assert len(plain.logprobs) == 12
    for row, token, found in zip(expected, plain.tokens, plain.logprobs, strict=True):
        assert found.own == pytest.approx(float(row[token]), abs=1e-4)
        assert [token for token, _ in found.top] == row.topk(3).indices.tolist()
    stop = plain.text[len(plain.text) // 2 :][:2]
    replies = [
        engine.add(Prompt([1, 40]), Sampler(replace(greedy, stop=[stop]))),
        engine.add(Prompt([1, 40]), Sampler(replace(greedy, stop_ids=[plain.tokens[5]]))),
        engine.add(Prompt([1, 40]), Sampler(greedy)),
    ]
    shown = dict.fromkeys(replies, "")
    while not all(reply.ended for reply in replies):
        for reply, text in engine.step():
            shown[reply] += text
    assert [reply.finish_reason for reply in replies] == ["stop", "stop", "length"]
    assert replies[0].text == plain.text[: plain.text.index(stop)]
    assert replies[1].tokens == plain.tokens[: plain.tokens.index(plain.tokens[5])]
    assert all(shown[reply] == reply.text for reply in replies)


def test_a_request_that_cannot_be_answered_is_refused(tokenizer_path: Path) -> None:
    engine = Engine(load(SMALL, tokenizer_path), context=64)
    with pytest.raises(UserError, match="the prompt has 64 tokens, the context is 64"):
        engine.add(Prompt([1] * 64), Sampler(Sampling()))
    with pytest.raises(UserError, match=f"0 to {SMALL.vocab_size - 1}, not {SMALL.vocab_size}"):
        engine.add(Prompt([1]), Sampler(Sampling(logit_bias={SMALL.vocab_size: 1.0})))
    for settings in ({"top_k": -1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"stop": [""]}):
        with pytest.raises(UserError):
            Sampling(**settings)  # type: ignore[arg-type]
    assert engine.step() == []
