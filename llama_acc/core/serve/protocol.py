"""Requests and answers: the part of OpenAI's API that is served, with vLLM's names for what that API does not have.

https://platform.openai.com/docs/api-reference. Nothing that would change an answer is left out in silence: what is not
served, and what nobody knows, is refused. What says nothing about the answer (`user`, `metadata` ...) is taken.
"""

import base64
import binascii
import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama_acc.core.data.templates import Turn
from llama_acc.core.data.tools import CallsInReply, message_fields, tools_of
from llama_acc.core.errors import UserError
from llama_acc.core.generate.chat import checked_text
from llama_acc.core.generate.engine import Prompt
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import JSON_OBJECT, Sampler, Sampling, TokenLogprobs
from llama_acc.core.generate.service import Event

_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Stop = Annotated[str, Field(max_length=1000)]  # each token is compared with all its beginnings
_MOST_CHOICES = 128
_LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON does not have; as OpenAI's API and vLLM have it
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF = {chr(byte): byte for byte in _PRINTED}  # as GPT-2's and most later tokenizers write bytes
_BYTE_OF |= {chr(256 + place): byte for place, byte in enumerate(sorted({*range(256)}.difference(_PRINTED)))}
_DEEPEST = 100  # objects and lists within each other: a schema that goes deeper is none that llguidance reads


class _Given(BaseModel):
    """An object whose unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class TextPart(_Given):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ImageURL(_Given):
    """Where a picture is: in the address itself."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Given):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(BaseModel):
    """A message of a conversation. Of an answer that a client sends back, what is empty or says nothing is dropped."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        """Its text, in one."""
        parts = [] if self.content is None else self.content
        return parts if isinstance(parts, str) else "\n".join(part.text for part in parts if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """The addresses of its pictures."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class JsonSchema(_Given):
    """The schema of an answer."""

    name: str
    json_schema: dict[str, Any] = Field(default=dict(JSON_OBJECT), alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Given):
    """Of what form an answer is."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Given):
    """What comes with a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Asked(_Given):
    """What both kinds of requests have."""

    model: str
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=_MOST_CHOICES)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=64)] | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: Annotated[dict[_Token, float], Field(max_length=4096)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    stop_token_ids: Annotated[list[_Token], Field(max_length=64)] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, body: Any) -> Any:
        _check(body)
        return body

    def sampling(self, most: int, logprobs: int | None) -> Sampling:
        """How tokens are chosen, of which there are `most` where nothing else is asked for."""
        given = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p or 1.0,
            "seed": self.seed,
            "max_new_tokens": most,
            "top_k": max(self.top_k or 0, 0),  # vLLM's -1 is all, too
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": self.logit_bias or {},
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or [],
            "stop_ids": self.stop_token_ids or [],
            "logprobs": logprobs,
        }
        return Sampling(**given)  # type: ignore[arg-type]


class ChatRequest(_Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    # They say nothing about the answer.
    parallel_tool_calls: Literal[True] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def logprobs_of(self) -> int | None:
        """Of so many of the likeliest tokens the probabilities are asked for; None: of none at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs goes with logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """What an answer must be; None: any text."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return JSON_OBJECT
        if wanted.json_schema is None:
            raise UserError("response_format of the type json_schema needs a json_schema")
        return wanted.json_schema.json_schema

    def tools_to_call(self) -> list[dict[str, Any]]:
        """The functions that may be called. Malformed (`core.data.keys`) if they are none."""
        return [] if self.tool_choice == "none" else tools_of({"tools": self.tools or []})

    def conversation(self) -> tuple[str | None, list[Turn], list[bytes]]:
        """The system text, the turns, and the files of the pictures.

        Raises:
            UserError: they are not in an order that a prompt can have.
        """
        first, *_ = self.messages
        has_system = first.role in ("system", "developer")
        others = self.messages[has_system:]
        if any(message.role in ("system", "developer") for message in others):
            raise UserError("only the first message can be the system's")
        if not others or others[-1].role not in ("user", "tool"):
            raise UserError("the last message must be the user's, or what came of a tool")
        if any(message.content is None for message in self.messages if message.role != "assistant"):
            raise UserError("only a message of the assistant's can be without content")
        if any(message.images for message in self.messages if message.role != "user"):
            raise UserError("only the user's messages can have images")
        turns = [
            Turn(
                "human" if message.role == "user" else message.role,
                message.text,
                more=message_fields(message.model_dump(exclude_none=True), message.role),
            )
            for message in others
        ]
        images = [_file_of(address) for message in others for address in message.images]
        return first.text if has_system else None, turns, images


class CompletionRequest(_Asked):
    """The body of /v1/completions: texts or tokens to continue as they are, in no prompt format."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=_MOST_CHOICES)]
        | Annotated[list[_Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[_Token], Field(min_length=1)]], Field(min_length=1, max_length=_MOST_CHOICES)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=_MOST_CHOICES)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> "Sequence[str | list[int]]":
        """One or several, each a text or tokens."""
        if self.best_of not in (None, self.n or 1):
            raise UserError("best_of is not served: ask for n answers")
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


def _check(value: Any, depth: int = 0) -> None:
    """A UserError for what JSON may hold and nothing else takes: half a surrogate pair, nesting without end."""
    if depth > _DEEPEST:
        raise UserError(f"the body is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        checked_text(value)
    elif isinstance(value, (dict, list)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            if isinstance(part, (str, dict, list)):
                _check(part, depth + 1)


def _file_of(address: str) -> bytes:
    """The file in a data URI (RFC 2397). No other address is looked at."""
    head, comma, data = address.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise UserError("an image must be a data URI, data:image/...;base64,...: no other address is fetched")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("the data URI of an image is not base64") from None


def part_bytes(piece: str) -> list[int] | None:
    """The bytes that a token stands for, by its piece in the vocabulary; None, if that is not written in bytes."""
    if byte := _BYTE_PIECE.fullmatch(piece):
        return [int(byte[1], 16)]
    return [_BYTE_OF[character] for character in piece] if _BYTE_OF.keys() >= set(piece) else None


def dumps(value: Any) -> str:
    """As JSON in one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# Answers: whole or in parts, to a conversation or to a text


class Answer:
    """The form of an answer."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(
        self, body: ChatRequest | CompletionRequest, loaded: LoadedModel, asked: Sequence[tuple[Prompt, Sampler]]
    ) -> None:
        self.asked, self._body = asked, body  # of each reply what it was asked for with
        self.events: list[list[Event]] = [[] for _ in asked]  # of each reply so far
        self._loaded, self._anchor = loaded, loaded.tokenizer.encode("a")[-1:]
        self._about = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def usage(self) -> dict[str, int]:
        """How many tokens so far. A prompt that is answered several times counts once."""
        prompts = {id(prompt): len(prompt.tokens) for prompt, _ in self.asked}
        given, made = sum(prompts.values()), sum(len(event.tokens) for events in self.events for event in events)
        return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}

    def whole(self) -> dict[str, Any]:
        """All of it."""
        choices = [self.choice(number, events) for number, events in enumerate(self.events)]
        return {**self._about, "object": self.whole_object, "choices": choices, "usage": self.usage()}

    def chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """A part of it."""
        return {**self._about, "object": self.chunk_object, "choices": choices, **more}

    def opening(self) -> Sequence[Mapping[str, Any]]:
        """The choices of the chunk before the first token; none: there is no such chunk."""
        return []

    def choice(self, number: int, events: Sequence[Event]) -> dict[str, Any]:
        """A reply that has ended."""
        raise NotImplementedError

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        """What came to a reply."""
        raise NotImplementedError

    def token_text(self, token: int) -> str:
        """Its text within a text, such as with the space in front of it."""
        decode = self._loaded.tokenizer.decode
        return decode([*self._anchor, token])[len(decode(self._anchor)) :]


class ChatAnswer(Answer):
    """To a conversation."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @cached_property
    def _calls(self) -> list[CallsInReply] | None:
        has_tools = isinstance(self._body, ChatRequest) and bool(self._body.tools_to_call())
        return [CallsInReply() for _ in self.asked] if has_tools else None

    def opening(self) -> Sequence[Mapping[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [
            {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
            for number in range(len(self.asked))
        ]

    def choice(self, number: int, events: Sequence[Event]) -> dict[str, Any]:
        parts = self._parts(number, events)
        parts["content"] = parts["content"].rstrip() if self.asked[number][0].strip else parts["content"]
        if "tool_calls" in parts:
            parts["content"] = parts["content"] or None
        message = {"role": "assistant", **parts, "refusal": None}
        return {"index": number, "message": message, **self._end(number, events, parts)}

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        parts = self._parts(number, [event])
        for place, call in enumerate(parts.get("tool_calls", ())):
            call["index"] = place
        if not parts["content"] and event.finish_reason:
            del parts["content"]
        return {"index": number, "delta": parts, **self._end(number, [event], parts)}

    def _parts(self, number: int, events: Sequence[Event]) -> dict[str, Any]:
        """What these events bring to a message."""
        text = "".join(event.text for event in events)
        if self._calls is None:
            return {"content": text}
        text, calls = self._calls[number].push(text, events[-1].finish_reason is not None)
        made = [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {**call["function"], "arguments": dumps(call["function"]["arguments"])},
            }
            for call in calls
        ]
        return {"content": text, "tool_calls": made} if made else {"content": text}

    def _end(self, number: int, events: Sequence[Event], parts: Mapping[str, Any]) -> dict[str, Any]:
        reason = "tool_calls" if "tool_calls" in parts else events[-1].finish_reason
        return {"logprobs": self._logprobs(number, events), "finish_reason": reason}

    def _logprobs(self, number: int, events: Sequence[Event]) -> dict[str, Any] | None:
        if self.asked[number][1].sampling.logprobs is None:
            return None

        def entry(token: int, value: float) -> dict[str, Any]:
            text = self.token_text(token)
            part = "\ufffd" in text  # of a character, which clients put together of bytes
            own = part_bytes(self._loaded.tokenizer.piece(token)) if part else list(text.encode())
            return {"token": text, "bytes": own, "logprob": max(value, _LEAST_LOGPROB)}

        def told(token: int, values: TokenLogprobs) -> dict[str, Any]:
            return {**entry(token, values.own), "top_logprobs": [entry(*top) for top in values.top]}

        pairs = [pair for event in events for pair in zip(event.tokens, event.logprobs, strict=True)]
        return {"content": [told(*pair) for pair in pairs], "refusal": None}


class TextAnswer(Answer):
    """To a text that is to be continued."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    @cached_property
    def _lengths(self) -> dict[int, int]:
        """Of the text of each reply that logprobs were told of."""
        return {}

    def choice(self, number: int, events: Sequence[Event]) -> dict[str, Any]:
        text, reason = "".join(event.text for event in events), events[-1].finish_reason
        return {"index": number, "text": text, "logprobs": self._logprobs(number, events), "finish_reason": reason}

    def delta(self, number: int, event: Event) -> dict[str, Any]:
        return self.choice(number, [event])

    def _logprobs(self, number: int, events: Sequence[Event]) -> dict[str, Any] | None:
        if self.asked[number][1].sampling.logprobs is None:
            return None
        pairs = [pair for event in events for pair in zip(event.tokens, event.logprobs, strict=True)]
        texts = [self.token_text(token) for token, _ in pairs]
        before = self._lengths.get(number, 0)
        self._lengths[number] = before + sum(map(len, texts))
        return {
            "tokens": texts,
            "token_logprobs": [max(values.own, _LEAST_LOGPROB) for _, values in pairs],
            "top_logprobs": [{self.token_text(token): value for token, value in values.top} for _, values in pairs],
            "text_offset": [before + sum(map(len, texts[:place])) for place in range(len(texts))],
        }
