"""What OpenAI's own client gets from the server: each answer is the one that the model gives alone."""

import base64
import functools
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import httpx2
import numpy as np
import openai
import pytest
import schemathesis
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from PIL import Image
from pydantic import BaseModel
from tokenizers.pre_tokenizers import ByteLevel

from llama_acc.core.data.chat_template import ChatTemplate
from llama_acc.core.data.templates import Turn, get_template
from llama_acc.core.data.tools import calls_of
from llama_acc.core.errors import RunError
from llama_acc.core.generate.chat import encode_prompt
from llama_acc.core.generate.engine import Engine, Prompt
from llama_acc.core.generate.load import LoadedModel, load_model, load_models
from llama_acc.core.generate.sampling import JsonGrammar, Sampling
from llama_acc.core.generate.service import Service
from llama_acc.core.model.tuning.bias_norm import BiasNorm
from llama_acc.core.model.tuning.lora import LoRA
from llama_acc.core.serve.app import make_app
from llama_acc.core.serve.guard import Access
from llama_acc.core.serve.protocol import part_bytes
from llama_acc.core.tokenizer import load_tokenizer
from tests.core.generate.decoding import decode
from tests.core.generate.images_work import GREEDY, pictures
from tests.core.generate.test_multi_adapter import CONFIG, write_adapter
from tests.core.seeing import seeing_model
from tests.core.tiny import CPU, SMALL, random_model, save_model

QUESTION = "what is the name of the capital?"
ASK: dict[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 12,
}


PATIENCE = 60.0  # seconds; only a test that has failed waits so long


@dataclass
class Running:
    """A server that answers."""

    url: str
    service: Service


@contextmanager
def serving(
    models: dict[str, LoadedModel],
    slots: int = 4,
    queue: int = 64,
    access: Access | None = None,
) -> Iterator[Running]:
    """Serves models on a free port of loopback."""
    service = Service(Engine(next(iter(models.values())), slots), queue)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(make_app(models, service, access or Access()), log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, args=([listener],))
    with service.running():
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
        finally:
            server.should_exit = True
            thread.join()


def until(condition: Callable[[], bool]) -> None:
    """Waits for something."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def small(tokenizer_path: Path) -> LoadedModel:
    """A model of random weights that was trained in dialogues."""
    model = random_model(SMALL, seed=5).requires_grad_(False)
    return LoadedModel(model, load_tokenizer(tokenizer_path), get_template("dialogue"), "asked for", CPU)


@pytest.fixture(scope="module")
def server(small: LoadedModel) -> Iterator[Running]:
    with serving({"small": small}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(loaded: LoadedModel, prompt: Prompt, **settings: Any) -> Any:
    """The reply by itself."""
    sampling = Sampling(**{"temperature": 0, "max_new_tokens": 12, **settings})
    return decode(Engine(loaded), [prompt], sampling)[0]


def question(loaded: LoadedModel, text: str = QUESTION, system: str | None = None) -> Prompt:
    return encode_prompt(loaded, [Turn("human", text)], system=system)


def test_a_chat_is_answered_as_alone(small: LoadedModel, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASK)
    expected = alone(small, question(small))
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(question(small).tokens), 12)
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        answer.choices[0].message,
        {"role": "user", "content": "two"},
    ]
    turns = [Turn("human", "one"), Turn("assistant", expected.text), Turn("human", "two")]
    longer = client.chat.completions.create(**{**ASK, "messages": messages})
    assert longer.choices[0].message.content == alone(small, encode_prompt(small, turns, 0, "be short")).text


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASK, n=2)
    chunks = list(client.chat.completions.create(**ASK, n=2, stream=True, stream_options={"include_usage": True}))
    for number in range(2):
        of_choice = [c for chunk in chunks for c in chunk.choices if c.index == number]
        assert of_choice[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in of_choice) == whole.choices[number].message.content
        assert [c.finish_reason for c in of_choice if c.finish_reason] == ["length"]
        assert len(of_choice) > 5
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_texts_and_tokens_are_continued_in_no_format(small: LoadedModel, client: openai.OpenAI) -> None:
    ids = [small.tokenizer.encode(text, bos=True) for text in ("once upon", "the answer")]
    expected = [alone(small, Prompt(tokens, raw=True)).text for tokens in ids]
    common: dict[str, Any] = {"model": "small", "temperature": 0, "max_tokens": 12}
    assert client.completions.create(prompt="once upon", **common).choices[0].text == expected[0]
    for prompts in (["once upon", "the answer"], ids):
        found = client.completions.create(prompt=prompts, n=2, **common)
        assert [choice.text for choice in found.choices] == [expected[0]] * 2 + [expected[1]] * 2
        assert found.usage is not None
        assert found.usage.prompt_tokens == sum(map(len, ids))
    streamed = client.completions.create(prompt=ids[0], stream=True, **common)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected[0]
    assert client.completions.create(model="small", prompt="a", temperature=0).usage.completion_tokens <= 16  # type: ignore[union-attr]


def test_sampling_follows_from_the_seed_and_choices_differ(client: openai.OpenAI) -> None:
    drawn = {**ASK, "temperature": 1.5, "seed": 7, "n": 3}
    first, again = (client.chat.completions.create(**drawn) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3


def test_stop_strings_and_biases(small: LoadedModel, client: openai.OpenAI) -> None:
    text = alone(small, question(small)).text
    stopped = client.chat.completions.create(**ASK, stop=[text[5:8]])
    assert stopped.choices[0].message.content == text[: text.index(text[5:8])].rstrip()
    assert stopped.choices[0].finish_reason == "stop"
    token = small.tokenizer.encode("name")[-1]
    biased = client.chat.completions.create(**ASK, logit_bias={str(token): 10_000})
    assert biased.choices[0].message.content == small.tokenizer.decode([token] * 12)
    extra = client.chat.completions.create(**ASK, extra_body={"stop_token_ids": [token]}, logit_bias={str(token): 9999})
    assert (extra.choices[0].message.content, extra.choices[0].finish_reason) == ("", "stop")


def test_probabilities_of_tokens(small: LoadedModel, client: openai.OpenAI) -> None:
    expected = alone(small, question(small), logprobs=2)
    answer = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    chunks = list(client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2, stream=True))
    assert answer.choices[0].logprobs is not None
    told = answer.choices[0].logprobs.content
    assert told is not None
    assert [round(entry.logprob, 4) for entry in told] == [round(value.own, 4) for value in expected.logprobs]
    assert [len(entry.top_logprobs) for entry in told] == [2] * 12
    assert all(entry.token == entry.top_logprobs[0].token for entry in told)
    assert "".join(entry.token for entry in told).strip() == expected.text
    streamed = [e for chunk in chunks if (logs := chunk.choices[0].logprobs) for e in logs.content or []]
    assert [entry.token for entry in streamed] == [entry.token for entry in told]
    tokens = question(small).tokens
    texts = client.completions.create(model="small", prompt=list(tokens), temperature=0, max_tokens=4, logprobs=1)
    logprobs = texts.choices[0].logprobs
    assert logprobs is not None
    assert [len(logprobs.tokens or []), len(logprobs.token_logprobs or []), len(logprobs.top_logprobs or [])] == [4] * 3
    assert logprobs.text_offset == [0, *(len("".join((logprobs.tokens or [])[:n])) for n in (1, 2, 3))]


def test_parts_of_a_character_have_their_bytes(small: LoadedModel, client: openai.OpenAI) -> None:
    byte = small.tokenizer.token_id("<0xF0>")
    answer = client.chat.completions.create(**ASK, logprobs=True, logit_bias={str(byte): 10_000})
    assert answer.choices[0].logprobs is not None
    assert [entry.bytes for entry in answer.choices[0].logprobs.content or []] == [[0xF0]] * 12
    every = bytes(range(256)).decode("latin-1").encode()
    [(piece, _)] = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(every.decode())
    assert part_bytes(piece) == list(every)
    assert part_bytes("\ufffd") is None


def test_structured_answers_are_parsed(client: openai.OpenAI) -> None:
    class Color(BaseModel):
        name: Literal["red", "green"]
        bright: bool

    ask = {**ASK, "max_tokens": 200, "temperature": 1, "n": 2, "seed": 1}
    parsed = client.chat.completions.parse(**ask, response_format=Color)
    assert all(isinstance(choice.message.parsed, Color) for choice in parsed.choices)
    with client.chat.completions.stream(**{**ask, "n": 1}, response_format=Color) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Color)
    with pytest.raises(openai.BadRequestError, match="the JSON schema cannot be used"):
        wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
        client.chat.completions.create(**ASK, response_format=wrong)


def test_models_are_listed_and_others_are_not_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="there is no model 'large' here, but: small"):
        client.chat.completions.create(**{**ASK, "model": "large"})
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="small", input="a")


SYSTEM, USER = {"role": "system", "content": "a"}, {"role": "user", "content": "a"}
NESTED = {"name": "a", "schema": functools.reduce(lambda inner, _: {"items": inner}, range(100), dict[str, Any]())}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temprature": 1}, "temprature: it is not known here"),
        ({"temperature": -1}, "temperature: "),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "has no place for tools"),
        ({"tools": [{"type": "function"}]}, "a tool should have a function with a name"),
        ({"tool_choice": "required"}, "tool_choice: "),
        ({"messages": []}, "messages: "),
        ({"messages": [USER, SYSTEM]}, "only the first message can be the system's"),
        ({"messages": [SYSTEM]}, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": None}]}, "only a message of the assistant's can be without content"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "the last message must be the user's"),
        ({"messages": [PICTURE]}, "no other address is fetched"),
        ({"messages": [{"role": "user", "content": "a " * 500}]}, "the context is 256"),
        ({"top_logprobs": 2}, "top_logprobs goes with logprobs"),
        ({"logit_bias": {"300": 1}}, "tokens of the vocabulary, 0 to 299"),
        ({"response_format": {"type": "json_schema"}}, "needs a json_schema"),
        ({"stop": ""}, "a stop string has no characters"),
        ({"stop": "a" * 1001}, "stop: String should have at most 1000 characters"),
        ({"stop": ["a"] * 65}, "stop: Input should be a valid string; or: List should have at most 64 items"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0: Input tag 'audio'"),
        ({"messages": [{"role": "user", "content": "a" * 128 * 256}]}, "characters, the context is 256"),
        ({"messages": [{"role": "system", "content": "\ud800"}, USER]}, "not valid Unicode"),
        ({"response_format": {"type": "json_schema", "json_schema": NESTED}}, "nested more than 100 deep"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": NESTED}}]}, "nested more than 100"),
    ],
)
def test_what_cannot_be_answered_is_refused(change: dict[str, Any], words: str, server: Running) -> None:
    body, json_only = json.dumps({**ASK, **change}), {"Content-Type": "application/json"}
    response = httpx2.post(f"{server.url}/v1/chat/completions", content=body, headers=json_only)
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert (error["code"] == "context_length_exceeded") == ("context" in words)


def test_a_completion_of_what_is_no_prompt_is_refused(server: Running) -> None:
    for change in (
        {"prompt": [1, 300]},
        {"prompt": []},
        {"best_of": 3},
        {"suffix": "a"},
        {"echo": True},
        {"prompt": 1},
    ):
        body = {"model": "small", "prompt": "a", **change}
        assert httpx2.post(f"{server.url}/v1/completions", json=body).status_code == 400, change


def test_who_may_not_ask_is_refused(small: LoadedModel) -> None:
    access = Access("a key", ["localhost", "myhost"], ["https://chat.example.org"])
    with serving({"small": small}, access=access) as running:
        key = {"Authorization": "Bearer a key"}

        def ask(path: str = "/v1/models", method: str = "GET", **headers: str) -> httpx2.Response:
            return httpx2.request(method, running.url + path, headers={**key, **headers})

        assert ask().status_code == 200
        assert ask(Host="myhost:80").status_code == ask(Host="[::1]:80").status_code == 200
        assert (
            ask(Host="rebound.example.org").status_code
            == ask(Host="").status_code
            == ask(Host="[::").status_code
            == 403
        )
        assert ask(Authorization="Bearer another").status_code == ask(Authorization="").status_code == 401
        assert ask("/health", Authorization="").json() == {"status": "ok"}
        assert ask("/metrics", Authorization="").status_code == 401
        assert ask(Origin="https://elsewhere.example.org").status_code == ask(Origin="http://[::").status_code == 403
        assert ask(Origin=running.url).status_code == 200
        allowed = ask(Origin="https://chat.example.org").headers
        assert allowed["access-control-allow-origin"] == "https://chat.example.org"
        assert "access-control-allow-origin" not in ask().headers
        preflight = {"Origin": "https://chat.example.org", "Access-Control-Request-Method": "POST", "Authorization": ""}
        assert ask("/v1/chat/completions", "OPTIONS", **preflight).status_code == 200
        text = httpx2.post(f"{running.url}/v1/chat/completions", headers=key, content=json.dumps(ASK).encode())
        assert text.status_code == 415
        large = httpx2.post(
            f"{running.url}/v1/chat/completions",
            headers={**key, "Content-Type": "application/json"},
            content=bytes(2**25 + 1),
        )
        assert large.status_code == 413
        assert large.json()["error"]["type"] == "invalid_request_error"
        assert ask("/docs").status_code == ask("/nothing").status_code == 404


ENDLESS: dict[str, Any] = {**ASK, "max_tokens": 100_000, "logit_bias": {"40": 9999}}


def long_model(tokenizer_path: Path) -> LoadedModel:
    """One whose replies may have as many tokens as a test is patient."""
    from dataclasses import replace

    model = random_model(replace(SMALL, max_seq_len=100_000), seed=5).requires_grad_(False)
    return LoadedModel(model, load_tokenizer(tokenizer_path), get_template("dialogue"), "asked for", CPU)


def test_a_queue_has_an_end_and_who_leaves_makes_room(tokenizer_path: Path) -> None:
    with serving({"small": long_model(tokenizer_path)}, slots=1, queue=1) as running:
        engine, url = running.service.engine, f"{running.url}/v1/chat/completions"
        with httpx2.stream("POST", url, json={**ENDLESS, "stream": True}) as first:
            lines = first.iter_lines()  # kept: without it the client would leave
            next(lines)
            waiting = threading.Thread(target=lambda: httpx2.post(url, json=ASK, timeout=60))
            waiting.start()
            until(lambda: len(engine.waiting) == 1)
            full = httpx2.post(url, json=ASK)
            assert (full.status_code, full.headers["Retry-After"]) == (429, "1")
            assert full.json()["error"]["type"] == "rate_limit_error"
            never = httpx2.post(url, json={**ASK, "n": 3})
            assert (never.status_code, "the server takes 2" in never.text) == (400, True)
        waiting.join()  # the first client has left: the second one got its slot
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(url, json=ENDLESS, timeout=0.5)
        until(lambda: not engine.running)
        assert httpx2.post(url, json=ASK).status_code == 200


def test_answers_end_with_an_error_when_the_engine_fails(tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[str]()
    with serving({"small": long_model(tokenizer_path)}) as running:
        running.service.on_failure = lambda: told.append("failed")

        def fail(_: Engine) -> Sequence[Any]:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(Engine, "step", fail)
        url = f"{running.url}/v1/chat/completions"
        assert [httpx2.post(url, json=ASK).status_code for _ in range(2)] == [503, 503]
        health = httpx2.get(f"{running.url}/health")
        assert (health.status_code, told) == (503, ["failed"])
        assert "out of memory" in health.json()["error"]["message"]


def test_the_numbers_of_a_server(small: LoadedModel) -> None:
    with serving({"small": small}) as running:
        httpx2.post(f"{running.url}/v1/chat/completions", json={**ASK, "n": 2})
        httpx2.get(f"{running.url}/nothing")
        lines = httpx2.get(f"{running.url}/metrics").text.splitlines()
    numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert numbers["llama_acc_prompt_tokens_total"] == f"{len(question(small).tokens)}.0"
    assert numbers["llama_acc_generated_tokens_total"] == "24.0"
    assert numbers["llama_acc_slots"] == "4.0"
    assert numbers["llama_acc_running"] == numbers["llama_acc_waiting"] == "0.0"
    assert numbers["llama_acc_first_token_seconds_count"] == "2.0"
    assert numbers['llama_acc_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert numbers['llama_acc_requests_total{path="other",status="404"}'] == "1.0"


def test_tools_are_put_to_the_model_and_its_calls_found(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    source = "{{ tools | tojson }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls }}\n{% endfor %}>"
    template = ChatTemplate(source, tokenizer, Path("chat_template.jinja"))
    loaded = LoadedModel(long_model(tokenizer_path).model, tokenizer, template, "asked for", CPU)
    call = {"name": "get_weather", "parameters": {"city": "a town"}}
    schema = {"name": "call", "schema": {"const": call}}  # what a trained model would write by itself
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    with serving({"small": loaded}) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        ask: dict[str, Any] = {**ASK, "max_tokens": 300, "tools": tools}
        ask["response_format"] = {"type": "json_schema", "json_schema": schema}
        answer = client.chat.completions.create(**ask).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        [made] = answer.message.tool_calls or []
        assert (made.function.name, json.loads(made.function.arguments)) == ("get_weather", {"city": "a town"})
        with client.chat.completions.stream(**ask) as stream:
            [streamed] = stream.get_final_completion().choices[0].message.tool_calls or []
        assert streamed.function.arguments == made.function.arguments
        result = {"role": "tool", "tool_call_id": made.id, "content": "22 degrees"}
        after = client.chat.completions.create(**{**ASK, "messages": [*ASK["messages"], answer.message, result]})
        turns = [Turn("human", QUESTION), Turn("assistant", "", more={"tool_calls": calls_of([made.model_dump()])})]
        prompt = encode_prompt(loaded, [*turns, Turn("tool", "22 degrees", more={"tool_call_id": made.id})])
        assert after.choices[0].message.content == alone(loaded, prompt).text
        without = {**ask, "tool_choice": "none"}
        assert client.chat.completions.create(**without).choices[0].message.tool_calls is None


def test_a_schema_that_cannot_be_followed_ends_its_own_answer_alone(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: JsonGrammar) -> Any:
        raise RunError("too complex")

    monkeypatch.setattr(JsonGrammar, "allowed", fail)
    with pytest.raises(openai.BadRequestError, match="too complex to be followed"):
        client.chat.completions.create(**ASK, response_format={"type": "json_object"})
    assert client.chat.completions.create(**ASK).choices[0].finish_reason == "length"
    assert server.service.failure is None


# Models that see, several adapters over one base, and any request that the API's own description allows


def test_pictures_are_seen_and_no_address_is_fetched(tokenizer_path: Path) -> None:
    pytest.importorskip("transformers")
    from llama_acc.core.generate.load import load_vision_encoder

    model = seeing_model("tiny").requires_grad_(False)
    template = get_template("dialogue")
    loaded = LoadedModel(
        model, load_tokenizer(tokenizer_path), template, "asked for", CPU, load_vision_encoder(model, None, CPU)
    )
    assert loaded.vision is not None
    [pixels] = pictures(1, loaded.vision.image_size, 3)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    expected = encode_prompt(loaded, [Turn("human", "what is it?")], 1)._replace(images=[pixels])

    def body(url: str) -> dict[str, Any]:
        parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": parts}]
        return {"model": "seeing", "messages": messages, "temperature": 0, "max_tokens": GREEDY.max_new_tokens}

    with serving({"seeing": loaded}) as running:
        url = f"{running.url}/v1/chat/completions"
        answer = httpx2.post(url, json=body(f"data:image/png;base64,{data}")).json()
        assert answer["choices"][0]["message"]["content"] == decode(Engine(loaded), [expected], GREEDY)[0].text
        assert answer["usage"]["prompt_tokens"] == len(expected.tokens)
        for wrong in (
            "data:image/png;base64,AAAA",
            "data:image/png;base64,?",
            "data:text/plain,a",
            "file:///etc/hostname",
        ):
            response = httpx2.post(url, json=body(wrong))
            assert response.status_code == 400, wrong
            assert "an image " in response.json()["error"]["message"]


def test_adapters_are_chosen_by_name_over_one_base(tokenizer_path: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_model(random_model(CONFIG), base, torch.float32)
    (base / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    layers = {"base": [base]}
    for name, tuning in {"lora": LoRA(4), "norms": BiasNorm()}.items():
        layers[name] = [base, write_adapter(tmp_path / name, tuning, tokenizer_path)]
    ask = {"prompt": "once upon", "temperature": 0, "max_tokens": 12}
    with serving(dict(load_models(layers, device="cpu"))) as running, httpx2.Client(timeout=60) as client:

        def text(name: str) -> str:
            return str(
                client.post(f"{running.url}/v1/completions", json={"model": name, **ask}).json()["choices"][0]["text"]
            )

        found = {name: text(name) for name in layers}
    assert len(set(found.values())) == 3
    for name, folders in layers.items():
        with serving({name: load_model(*folders, device="cpu")}) as running:
            alone = httpx2.post(f"{running.url}/v1/completions", json={"model": name, **ask}).json()
        assert found[name] == alone["choices"][0]["text"]


def test_no_request_of_the_description_makes_the_server_fail(tokenizer_path: Path) -> None:
    """Whatever schemathesis makes of /openapi.json, also what that forbids, is answered or refused."""
    model = random_model(replace(SMALL, max_seq_len=32), seed=5).requires_grad_(False)
    loaded = LoadedModel(model, load_tokenizer(tokenizer_path), get_template("none"), "asked for", CPU)
    seen = set[int]()

    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body |= {"model": "small"}
        seen.add(case.call(timeout=PATIENCE).status_code)

    with serving({"small": loaded}, slots=64, queue=10_000) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        few = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        for operation in schema.get_all_operations():
            few(given(operation.ok().as_strategy())(ask))()
    assert max(seen) < 500
    assert {200, 400} <= seen
