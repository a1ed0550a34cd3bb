"""Calls of tools, what comes of them, and thoughts: what a message has besides its text, as chat templates take it.

Data has them in OpenAI's form (`tools`, `tool_calls` and role `tool`; formerly `functions`, `function_call` and role
`function`) or in that of LLaMA-Factory's ShareGPT data (`tools` as JSON text, roles `function_call` and `observation`).
They become what transformers passes to a template: functions as JSON schemas, arguments as objects.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import msgspec

from llama_acc.core.data.findings import beginning
from llama_acc.core.data.keys import Malformed, is_empty, key_of, type_name

TOOLS = ("tools", "functions")
"""Of an item: which functions the assistant may call."""
_CALLS = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = {"assistant": (*_CALLS, *_REASONING), "tool": ("name", "tool_call_id")}
"""Of the turns of a role, what `message_fields` reads."""
CALL_ROLES = ("function_call", "tool_call")
"""Of an assistant's turn whose text is its calls."""
RESULT_ROLES = ("tool", "function", "observation")
_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class Turn(NamedTuple):
    """One turn of a dialogue."""

    role: str  # "human" or "assistant"; "tool": what came of a call
    text: str
    weight: float = 1.0  # of a reply's tokens in the loss, from 0 to 1; 0: it is context only, not labeled
    more: Mapping[str, Any] = {}  # what its message has besides (`message_fields`)

    @property
    def is_label(self) -> bool:
        """Whether it is trained."""
        return self.role == "assistant" and self.weight > 0

    @property
    def whole_text(self) -> str:
        """Its text behind its thoughts, as Qwen3 and DeepSeek-R1 write them."""
        thoughts = self.more.get("reasoning_content")
        return f"<think>\n{thoughts}\n</think>\n\n{self.text}" if thoughts else self.text


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions that an item's assistant may call, each as `{"type": "function", "function": {"name", ...}}`."""
    name = key_of(row, TOOLS)
    if name is None or is_empty(found := _decoded(row[name], name)):
        return []
    if not isinstance(found, list):
        raise Malformed(f"{name!r} should be a list of functions, but is {type_name(found)}")
    return [_tool(tool) for tool in found]


def _tool(tool: Any) -> dict[str, Any]:
    if isinstance(tool, dict) and "function" not in tool:
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    _named(tool, "a tool")
    return cast(dict[str, Any], tool)


def _named(value: Any, what: str) -> dict[str, Any]:
    """The function in a tool or call."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Malformed(f"{what} should have a function with a name, but is {beginning(value)}")
    return function


def calls_of(value: Any, name: str = "tool_calls") -> list[dict[str, Any]]:
    """A reply's calls, or its only one, each as `{"type": "function", "function": {"name", "arguments"}}`, perhaps
    with an `id`; they and their arguments may be JSON text.
    """
    found = _decoded(value, name)
    found = [found] if isinstance(found, dict) else [] if is_empty(found) else found
    if not isinstance(found, list):
        raise Malformed(f"{name!r} should be a list of calls, but is {type_name(found)}")
    calls = []
    for call in found:
        function = _named(call if isinstance(call, dict) and "function" in call else {"function": call}, "a call")
        arguments = _decoded(function.get("arguments"), "arguments")
        arguments = {} if is_empty(arguments) else arguments
        if not isinstance(arguments, dict):
            raise Malformed(
                f"the arguments of {function['name']!r} should be an object, but are {beginning(arguments)}"
            )
        identified = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        about = {"name": function["name"], "arguments": arguments}
        calls.append({**identified, "type": "function", "function": about})
    return calls


def message_fields(turn: Mapping[str, Any], role: str) -> dict[str, Any]:
    """What the message of a turn has besides role and text: a reply's `tool_calls` and `reasoning_content`, a result's
    `name` and `tool_call_id`.
    """
    keys = MESSAGE_KEYS.get(role, ())
    if turn.keys().isdisjoint(keys):
        return {}
    names = {key: key for key in keys}
    if role == "assistant":
        names = {"tool_calls": key_of(turn, _CALLS) or "", "reasoning_content": key_of(turn, _REASONING) or ""}
    fields = {field: turn[key] for field, key in names.items() if not is_empty(turn.get(key))}
    for field, value in fields.items():
        if field != "tool_calls" and not isinstance(value, str):
            raise Malformed(f"{names[field]!r} should be text, but is {type_name(value)}")
    if "tool_calls" in fields:
        fields["tool_calls"] = calls_of(fields["tool_calls"], names["tool_calls"])
    return {field: value for field, value in fields.items() if value}


def called_in(text: str) -> dict[str, Any]:
    """The fields of a turn whose text is its calls, perhaps behind thoughts; see `message_fields`."""
    thoughts = _THOUGHTS.match(text)
    calls = {"tool_calls": calls_of(text[thoughts.end() if thoughts else 0 :], "function_call")}
    return calls | ({"reasoning_content": thoughts[1].strip()} if thoughts and thoughts[1].strip() else {})


class CallsInReply:
    """Finds calls in a reply as it comes, in the forms that models write: JSON between `<tool_call>` and `</tool_call>`
    (Hermes, Qwen, SmolLM3), or nothing but a JSON object with "name" and "parameters" (LLaMA 3)."""

    _BEGIN = "<tool_call>"
    _TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)

    def __init__(self) -> None:
        self._held, self._said = "", False

    def push(self, text: str, ended: bool) -> tuple[str, list[dict[str, Any]]]:
        """Takes more of the text. What of it is no call, and, where the reply has `ended`, its calls (`calls_of`)."""
        self._held += text
        if ended:
            return self._parted()
        if not self._said and self._held.lstrip().startswith("{"):
            return "", []
        begun = [n for n in range(1, len(self._BEGIN)) if self._held.endswith(self._BEGIN[:n])]
        at = self._held.find(self._BEGIN)
        at = at if at >= 0 else len(self._held) - max(begun, default=0)
        released, self._held = self._held[:at], self._held[at:]
        self._said = self._said or bool(released.strip())
        return released, []

    def _parted(self) -> tuple[str, list[dict[str, Any]]]:
        whole = self._held.strip()
        bare = [whole] if not self._said and whole.startswith("{") else []
        try:
            found = [_renamed(_decoded(call, "a call")) for call in bare or self._TAGGED.findall(self._held)]
            calls = calls_of(found)
        except Malformed:  # it is said, not called
            return self._held, []
        return (self._held, []) if not calls else ("" if bare else self._TAGGED.sub("", self._held).rstrip(), calls)


def _renamed(call: Any) -> Any:
    """A call whose arguments have the name that data has for them."""
    if isinstance(call, dict) and "arguments" not in call and "parameters" in call:
        return {"name": call.get("name"), "arguments": call["parameters"]}
    return call


def without_thoughts(text: str) -> str:
    """A reply without the `<think>...</think>` that it begins with."""
    thoughts = _THOUGHTS.match(text)
    return text[thoughts.end() :] if thoughts else text


def _decoded(value: Any, name: str) -> Any:
    """What stands in JSON text; anything else unchanged."""
    if not isinstance(value, str) or is_empty(value):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        raise Malformed(f"{name!r} should be JSON, but is {beginning(value)}") from None
