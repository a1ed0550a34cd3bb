"""The routes: OpenAI's chat and text completions, the models, and what who runs a server asks it."""

import asyncio
import contextlib
import functools
import re
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse

from llama_acc import __version__
from llama_acc.core.data.images import ImageError, decode
from llama_acc.core.data.keys import Malformed
from llama_acc.core.errors import LlamaAccError, UserError
from llama_acc.core.generate.caption import evaluation_transform
from llama_acc.core.generate.chat import encode_prompt
from llama_acc.core.generate.engine import Prompt, Reply
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import JsonGrammars, Sampler
from llama_acc.core.generate.service import Asked, Event, QueueFull, Service
from llama_acc.core.serve.guard import Access, Guard, error_response
from llama_acc.core.serve.protocol import Answer, ChatAnswer, ChatRequest, CompletionRequest, TextAnswer, dumps

_MOST_PIXELS = 25_000_000  # of a picture: 75 MB when it is unpacked, several times at once
_COMPLETION_TOKENS = 16  # OpenAI's API continues a text by so many, where nothing else is asked for
_TOKEN_CHARACTERS = 128  # no token of LLaMA's tokenizers has more

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _Gone(Exception):
    """The client has left."""


class _Failed(LlamaAccError):
    """The engine cannot go on."""


def make_app(models: Mapping[str, LoadedModel], service: Service, access: Access) -> FastAPI:
    """A server's application: models by the names that clients ask for, which one engine serves, and who may ask."""
    started, metrics = int(time.time()), Metrics(service)
    # The pages of documentation that FastAPI has would load scripts from elsewhere.
    app = FastAPI(title="llama-acc", version=__version__, docs_url=None, redoc_url=None)
    front = _Front(models, service, metrics)

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [described(name) for name in models]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSONResponse:
        front.model(name)
        return JSONResponse(described(name))

    def described(name: str) -> dict[str, Any]:
        about = {"object": "model", "created": started, "owned_by": "llama-acc"}
        return {"id": name, **about, "max_model_len": service.engine.context}

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        asked = await run_in_threadpool(front.asked_in_chat, body)
        return await front.answer(request, body, asked, ChatAnswer)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        asked = await run_in_threadpool(front.asked_to_continue, body)
        return await front.answer(request, body, asked, TextAnswer)

    @app.get("/health")
    async def health() -> Response:
        if service.failure is not None:
            return error_response(503, f"the engine has failed: {service.failure}")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    _handle_errors(app)
    app.add_middleware(Guard, access=access, done=metrics.answered)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _handle_errors(app: FastAPI) -> None:
    """Gives all errors OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        # Of a union, what lies deepest is wrong with the branch that fits best.
        errors = sorted(error.errors(), key=lambda one: -len(one["loc"]))
        first, places = errors[0], [_place(one["loc"]) for one in errors]
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        unknown = first["type"] == "extra_forbidden"
        messages = dict.fromkeys(one["msg"] for one, at in zip(errors, places, strict=True) if at == places[0])
        message = "it is not known here" if unknown else "; or: ".join(messages)
        code = "unknown_parameter" if unknown else None
        return error_response(400, f"{places[0] or 'the body'}: {message}", code, places[0])

    @app.exception_handler(Malformed)
    @app.exception_handler(UserError)
    async def refused(_: Request, error: Exception) -> Response:
        code = "context_length_exceeded" if "the context is" in str(error) else None
        return error_response(400, str(error), code)

    @app.exception_handler(QueueFull)
    async def busy(_: Request, error: QueueFull) -> Response:
        return error_response(429, error.message, "rate_limit_exceeded")

    @app.exception_handler(LlamaAccError)
    async def failed(_: Request, error: LlamaAccError) -> Response:
        return error_response(503, str(error))

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(_Gone)
    async def gone(_: Request, error: _Gone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return error_response(500, f"{type(error).__name__}: this is a fault of the server")


def _place(location: Sequence[int | str]) -> str:
    """The key that pydantic means; what it calls a union's branch is no part of it."""
    parts = map(str, location[1:])
    return ".".join(part for part in parts if not re.search(r"\[|^(constrained-)?(str|int)$", part))


class Metrics:
    """The numbers of one server, which /metrics shows in Prometheus's form."""

    def __init__(self, service: Service) -> None:
        self.registry = registry = CollectorRegistry()
        engine = service.engine
        self._requests = Counter(
            "llama_acc_requests", "HTTP requests that have been answered", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("llama_acc_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generated_tokens = Counter("llama_acc_generated_tokens", "Tokens generated", registry=registry)
        self.first_token = Histogram(
            "llama_acc_first_token_seconds",
            "From a request to the first token of a reply",
            buckets=_SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "llama_acc_request_seconds", "From a request to the end of its answer", buckets=_SECONDS, registry=registry
        )
        for name, about, value in (
            ("slots", "Replies that can be under way at a time", lambda: engine.slots),
            ("running", "Replies under way", lambda: len(engine.running)),
            ("waiting", "Requests that wait for a slot", lambda: len(engine.waiting)),
        ):
            Gauge(f"llama_acc_{name}", about, registry=registry).set_function(value)

    def answered(self, path: str, status: int) -> None:
        """Counts a request."""
        self._requests.labels(path, status).inc()


class _Front:
    """What makes replies of requests, and answers of replies."""

    def __init__(self, models: Mapping[str, LoadedModel], service: Service, metrics: Metrics) -> None:
        self._models, self._service, self._metrics = models, service, metrics
        self._grammars: dict[int, JsonGrammars] = {}
        self._lock = threading.Lock()

    def model(self, name: str) -> LoadedModel:
        """The one that is asked for. HTTPException 404 if there is none."""
        if name not in self._models:
            raise HTTPException(404, f"there is no model {name!r} here, but: {', '.join(self._models)}")
        return self._models[name]

    def asked_in_chat(self, body: ChatRequest) -> list[tuple[Prompt, Sampler]]:
        """What is to be generated for a conversation, `n` times. It takes a while."""
        loaded = self.model(body.model)
        system, turns, files = body.conversation()
        context = self._service.engine.context
        _check_length(dumps([system, [(turn.text, turn.more) for turn in turns], body.tools]), context)
        prompt = encode_prompt(loaded, turns, len(files), system, body.tools_to_call())
        if len(prompt.tokens) < context:  # else it is refused, before pictures are unpacked
            prompt = prompt._replace(images=[_pixels(loaded, file) for file in files])
        most = body.max_completion_tokens or body.max_tokens or context
        sampling = body.sampling(most, body.logprobs_of())
        schema = body.schema_of_answer()
        grammar = None if schema is None else self._grammars_of(loaded).of_schema(schema)
        return [(prompt, sampler) for sampler in _samplers(Sampler(sampling, grammar), body.n or 1)]

    def asked_to_continue(self, body: CompletionRequest) -> list[tuple[Prompt, Sampler]]:
        """What is to be generated for texts, `n` times each."""
        loaded = self.model(body.model)
        sampling = body.sampling(body.max_tokens or _COMPLETION_TOKENS, body.logprobs)
        prompts = [_continued(loaded, prompt, self._service.engine.context) for prompt in body.prompts()]
        count = body.n or 1
        samplers = _samplers(Sampler(sampling), count * len(prompts))
        return [(prompts[number // count], sampler) for number, sampler in enumerate(samplers)]

    def _grammars_of(self, loaded: LoadedModel) -> JsonGrammars:
        with self._lock:
            if id(loaded) not in self._grammars:
                self._grammars[id(loaded)] = JsonGrammars(loaded)
            return self._grammars[id(loaded)]

    async def answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        asked: Sequence[tuple[Prompt, Sampler]],
        form: type[Answer],
    ) -> Response:
        """Generates and sends it, in one or as it comes."""
        loaded = self.model(body.model)
        answer = form(body, loaded, asked)
        replies = _Replies(self._service, self._metrics, answer, request)
        await replies.begin()
        if not body.stream:
            try:
                async for _ in replies:
                    pass
                return JSONResponse(answer.whole())
            finally:
                replies.close()
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_sent(replies, answer, with_usage), 200, headers, "text/event-stream")


def _samplers(first: Sampler, count: int) -> list[Sampler]:
    """One for each reply, with a seed that follows from the one asked for, as in `Engine.generate`."""
    return [first.spawn() for _ in range(count)]


def _check_length(text: str, context: int) -> None:
    """Refuses what cannot fit into the context before it is encoded, which takes a minute for 30 MB."""
    if len(text) > _TOKEN_CHARACTERS * context:
        raise UserError(f"the prompt has {len(text):,} characters, the context is {context} tokens")


def _continued(loaded: LoadedModel, prompt: str | list[int], context: int) -> Prompt:
    """A prompt that is no conversation. Special tokens in it are meant: it may be one rendered elsewhere."""
    rows = loaded.model.config.vocab_size
    if isinstance(prompt, str):
        _check_length(prompt, context)
        tokens = loaded.tokenizer.encode(prompt)
        if loaded.tokenizer.settings.add_bos is not False and tokens[:1] != [loaded.tokenizer.bos_id]:
            tokens.insert(0, loaded.tokenizer.bos_id)
        prompt = tokens or [loaded.tokenizer.bos_id]
    elif unknown := [token for token in prompt if token >= rows]:
        raise UserError(f"tokens are 0 to {rows - 1}, not {unknown[0]}")
    return Prompt(prompt, raw=True, adapter=loaded.adapter)


def _pixels(loaded: LoadedModel, file: bytes) -> NDArray[np.uint8]:
    """A picture as the model takes it. A UserError if it takes none."""
    transform = evaluation_transform(loaded)
    try:
        square = transform(decode(file, _MOST_PIXELS), np.random.default_rng(0))
    except ImageError as error:
        raise UserError(f"an image {error}") from error
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


class _Replies:
    """The replies to one HTTP request: an iterator over their events, each with the number of its reply. They are
    cancelled as soon as the client has left."""

    def __init__(self, service: Service, metrics: Metrics, answer: Answer, request: Request) -> None:
        self._answer = answer
        self._service, self._metrics, self._request = service, metrics, request
        self._came: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._replies: list[Reply] = []
        self._begun = time.monotonic()

    async def begin(self) -> None:
        """Raises the errors of `Service.submit`."""
        loop = asyncio.get_running_loop()

        def listen(number: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server's loop has ended
                loop.call_soon_threadsafe(self._came.put_nowait, (number, event))

        requests = [
            Asked(prompt, sampler, functools.partial(listen, number))
            for number, (prompt, sampler) in enumerate(self._answer.asked)
        ]
        self._replies = await asyncio.wrap_future(self._service.submit(requests))
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Waits until the client leaves."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._cancel()
        await self._came.put(None)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        left, events = len(self._answer.asked), self._answer.events
        while left:
            came = await self._came.get()
            if came is None:
                raise _Gone
            number, event = came
            if event.finish_reason == "failed":
                raise UserError("the JSON schema is too complex to be followed to the answer's end")
            if event.finish_reason in ("error", "cancelled"):
                raise _Failed("the server is closing" if event.finish_reason == "cancelled" else "the engine failed")
            if not events[number]:
                self._metrics.first_token.observe(time.monotonic() - self._begun)
            events[number].append(event)
            left -= event.finish_reason is not None
            yield number, event

    def close(self) -> None:
        """To be called at the end, whatever has happened."""
        self._watcher.cancel()
        self._cancel()
        usage = self._answer.usage()
        self._metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self._metrics.generated_tokens.inc(usage["completion_tokens"])
        self._metrics.seconds.observe(time.monotonic() - self._begun)

    def _cancel(self) -> None:
        for reply in self._replies:
            if not reply.ended:
                self._service.cancel(reply)


async def _sent(replies: _Replies, answer: Answer, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events."""
    more: dict[str, Any] = {"usage": None} if with_usage else {}

    def line(chunk: Mapping[str, Any]) -> str:
        return f"data: {dumps(chunk)}\n\n"

    try:
        if opening := answer.opening():
            yield line(answer.chunk(opening, **more))
        async for number, event in replies:
            delta = answer.delta(number, event)
            if any(delta.get("delta", {}).values()) or delta.get("text") or event.logprobs or event.finish_reason:
                yield line(answer.chunk([delta], **more))
        if with_usage:
            yield line(answer.chunk([], usage=answer.usage()))
        yield "data: [DONE]\n\n"
    except _Gone:
        return
    except LlamaAccError as error:
        yield line({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
    finally:
        replies.close()
