"""Answers that are JSON of a schema, whatever the model would rather say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.errors import UserError
from llama_acc.core.generate.engine import Engine, Prompt
from llama_acc.core.generate.sampling import Sampler, Sampling
from tests.core.generate.test_schedules import load, run
from tests.core.tiny import SMALL

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "b\u00e9ige"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/properties/color"}]},
    },
    "required": ["color", "sizes", "next"],
    "additionalProperties": False,
}


def test_answers_of_a_random_model_are_json_of_the_schema_beside_others_that_are_not(tokenizer_path: Path) -> None:
    from llama_acc.core.generate.sampling import JsonGrammars

    loaded = load(replace(SMALL, max_seq_len=1024), tokenizer_path)
    grammars, engine = JsonGrammars(loaded), Engine(loaded, 4)
    greedy = Sampling(temperature=0, max_new_tokens=9)
    alone = run(other := Engine(loaded), other.add(Prompt([1, 40]), Sampler(greedy)))
    replies = [
        engine.add(Prompt([1, 40]), Sampler(Sampling(temperature, 1.0, seed, 800), grammars.of_schema(SCHEMA)))
        for seed, temperature in enumerate((0, 1, 1, 2, 2, 3))
    ]
    free = engine.add(Prompt([1, 40]), Sampler(greedy))
    while not all(reply.ended for reply in (*replies, free)):
        engine.step()
    for reply in replies:
        assert reply.finish_reason == "stop", reply.text
        answer = json.loads(reply.text)
        assert set(answer) == set(SCHEMA["required"])
        assert answer["color"] in SCHEMA["properties"]["color"]["enum"]
        assert all(0 <= size <= 99 for size in answer["sizes"])
        assert len(answer["sizes"]) <= 3
    assert len({reply.text for reply in replies}) > 1
    assert free.tokens == alone


def test_several_answers_of_one_grammar_are_each_at_a_place_of_their_own(tokenizer_path: Path) -> None:
    from llama_acc.core.generate.sampling import JsonGrammars

    loaded = load(replace(SMALL, max_seq_len=1024), tokenizer_path)
    engine = Engine(loaded, 3)
    first = Sampler(Sampling(1.0, 1.0, 3, 800), JsonGrammars(loaded).of_schema(SCHEMA))
    early = [engine.add(Prompt([1, 40]), first.spawn()) for _ in range(2)]
    for _ in range(10):
        engine.step()
    replies = [*early, engine.add(Prompt([1, 40]), first.spawn())]
    while not all(reply.ended for reply in replies):
        engine.step()
    assert all(set(json.loads(reply.text)) == set(SCHEMA["required"]) for reply in replies)
    assert len({reply.text for reply in replies}) > 1


def test_a_schema_that_cannot_be_used_is_refused(tokenizer_path: Path) -> None:
    from llama_acc.core.generate.sampling import JsonGrammars

    grammars = JsonGrammars(load(SMALL, tokenizer_path))
    for schema in ({"type": "nonsense"}, {"$ref": "#/nowhere"}):
        with pytest.raises(UserError, match="the JSON schema cannot be used"):
            grammars.of_schema(schema)
