"""The forms of answers: whole or in parts, to a conversation or to a text."""

import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from llama_acc.core.data.tools import CallsInReply
from llama_acc.core.generate.engine import Prompt
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import Sampler, TokenLogprobs
from llama_acc.core.generate.service import Event
from llama_acc.core.serve.protocol import ChatRequest, CompletionRequest, dumps

_LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON does not have; as OpenAI's API and vLLM have it


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
            whole = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "bytes": whole, "logprob": max(value, _LEAST_LOGPROB)}

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
