"""Render Hugging Face chat templates as transformers does, in a child process with limits.

A chat template comes with a checkpoint and is a program: it may loop, recurse or grow without end. So the child gets
only so much processor time and memory, and its output may be only so long.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from llama_acc.core.errors import UserError


class Limits(NamedTuple):
    """What rendering one list of conversations may take."""

    seconds: int = 20  # of processor time
    characters: int = 20_000_000  # of each text: a long dialogue is written once for every reply
    memory: int = 2 << 30  # bytes of address space


class Chat(NamedTuple):
    """A conversation as transformers has it."""

    messages: Sequence[Mapping[str, Any]]  # each with a role and content; perhaps with `tool_calls` and the like
    tools: Sequence[Mapping[str, Any]] = ()  # functions that may be called, as JSON schemas


class Replies(NamedTuple):
    """What is to be trained of conversations."""

    wanted: Sequence[Sequence[int]]  # of each conversation, the numbers of messages
    special: Sequence[str]  # the texts of the tokenizer's special tokens
    ends: Sequence[Sequence[str]]
    """Those of them that end an answer: EOS and its like, which are looked for first, and others."""


REASONING_FIELDS = ("reasoning_content", "thinking")
"""Under which of them a template looks for a reply's reasoning, the first that it mentions."""
RenderedChat = tuple[str, list[tuple[int, int, int]]]
"""A conversation as text, and the characters [begin, end) of it that the model has to write, with the number of the
message that they are of."""
TRAINING_DAY = datetime(2024, 7, 26)
"""What templates that write the date (LLaMA 3.2's) are told in training: its tokens must not depend on the day. It is
the date that LLaMA 3.1's template writes itself."""

_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from llama_acc.core.data import chat_rendering as c; c.main()"


def render(
    source: str,
    chats: Sequence[Chat],
    variables: Mapping[str, str],
    replies: Replies | None,
    path: Path,
    limits: Limits | None = None,
) -> list[list[RenderedChat] | str]:
    """Render conversations with a chat template, as `apply_chat_template(tokenize=False)` does.

    `source` is the Jinja text, from `path`; `variables` are the special tokens by name, such as bos_token. Without
    `replies`, what is to be trained, each conversation is a prompt, and ends with what stands in front of an answer.

    Returns:
        Each conversation as one text; or, where a template writes earlier turns otherwise than it did while they were
        the last ones, as one text for each reply, which ends with that and is what the model is asked then. Where
        it refuses what is to be trained, or leaves something out of it, a text that says so.

    Raises:
        UserError: the template is not Jinja, refuses a prompt, or takes more than the limits.
    """
    limits = limits or Limits()
    line = _child(os.getpid(), source).ask([source, chats, variables, replies, limits], 10 * limits.seconds, path)
    if not line:
        taken = f"takes more than {limits.seconds} s of processor time, or ends the process that renders it"
        raise UserError(f"the chat template {path} {taken}")
    answer = json.loads(line)
    if isinstance(answer, str):
        raise UserError(f"{path} {answer}" if answer.startswith("is not") else f"the chat template {path} {answer}")
    return [
        f"the chat template {path} {texts}"
        if isinstance(texts, str)
        else [(text, list(map(tuple, spans))) for text, spans in texts]
        for texts in answer
    ]


class _Child:
    """A process that renders one template again and again: to start one takes 0.1 to 0.3 s, each turn of a conversation
    then 15 ms at most. It ends with this process, whose end closes the pipe that it reads from."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, job: Any, seconds: float, path: Path) -> bytes:
        """The line that answers a job; empty if the process has ended.

        Raises:
            UserError: there is none after so long, as it sleeps.
        """
        with self._lock:
            if self._process is None:
                # Isolated: neither the working directory nor PYTHON* variables decide what the child imports.
                command = [sys.executable, "-I", "-c", _PROGRAM, *filter(None, sys.path)]
                pipe = subprocess.PIPE
                self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            watch = threading.Timer(seconds, process.kill)
            watch.start()
            line = b""
            try:
                with suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(job).encode() + b"\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
                if not line and not watch.is_alive():
                    raise UserError(f"the chat template {path} takes more than {seconds:g} s")
                return line
            finally:
                watch.cancel()
                if not line:  # also where this was interrupted: what comes later would be taken for the next answer
                    self._process = None
                    process.kill()
                    with process:  # closes the pipes and waits
                        pass


@lru_cache(maxsize=8)
def _child(process: int, source: str) -> _Child:
    """That of a template, which no forked process shares."""
    return _Child()


def renderer(source: str, variables: Mapping[str, str]) -> Callable[[Sequence[Mapping[str, str]], bool], str]:
    """A chat template that renders messages in this process, up to where an answer would begin if so asked.

    It is for an evaluation's many prompts, for each of which a child would take up to 15 ms. Nothing limits it
    but the sandbox, as in transformers: take a template that `render` has rendered. Raises jinja2's errors.
    """
    template = _compiled(source, [], [], datetime.now())

    def write(messages: Sequence[Mapping[str, str]], ask: bool) -> str:
        return template.render(
            messages=messages, add_generation_prompt=ask, **{"tools": None, "documents": None, **variables}
        )

    return write


def main() -> None:
    """Read jobs from standard input, each a line; write a line with the rendered conversations, or a text saying what
    is wrong."""
    import resource

    for line in sys.stdin:
        source, chats, variables, replies, limits = json.loads(line)
        limits = Limits(*limits)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = math.ceil(used.ru_utime + used.ru_stime) + limits.seconds
        for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, limits.memory)):
            with suppress(ValueError, OSError):  # macOS has no limit of address space
                resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
        answer = _answer(source, list(itertools.starmap(Chat, chats)), variables, replies, limits)
        print(json.dumps(answer), flush=True)


_Span = tuple[int, int]
_Write = Callable[[Chat, bool], tuple[str, list[_Span]]]
"""Writes a conversation, and then, if so asked, the prompt for an answer; with what is in `{% generation %}` blocks."""


def _answer(
    source: str,
    chats: list[Chat],
    variables: dict[str, str],
    replies: list[Any] | None,
    limits: Limits,
) -> list[list[RenderedChat] | str] | str:
    from jinja2 import TemplateError

    blocks: list[str] = []
    generated: list[tuple[int, int]] = []

    def write(chat: Chat, ask: bool) -> tuple[str, list[_Span]]:
        written = 0
        # As transformers, which passes None where its caller gives none.
        passed = {"tools": chat.tools or None, "documents": None, **variables}
        blocks.clear()
        generated.clear()
        for block in template.generate(messages=chat.messages, add_generation_prompt=ask, **passed):
            blocks.append(block)
            written += len(block)
            if written > limits.characters:
                raise TemplateError(f"it writes more than {limits.characters:,} characters")
        return "".join(blocks), list(generated)

    # Of what else a template may raise, the bases of the rest.
    refusals = (
        TemplateError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
    )
    wrong, found = "is not a chat template", list[list[RenderedChat] | str]()
    try:
        template = _compiled(source, blocks, generated, datetime.now() if replies is None else TRAINING_DAY)
        wrong = "fails on these turns"
        if replies is None:
            prompts = [write(chat, True)[0] for chat in chats]
            for chat, prompt in zip(chats, prompts, strict=True):
                if lost := _lost_of_tools(write, chat, prompt, True):
                    raise TemplateError(f"it leaves out {lost}")
            return [[(text, [])] for text in prompts]
        wanted, special, ends = replies
        for chat, numbers in zip(chats, wanted, strict=True):
            try:
                found.append(_trained(write, chat, numbers, special, ends))
            except refusals as error:
                begins = next((message["role"] for message in chat.messages if message["role"] != "system"), "")
                note = " (they begin with a reply, which `llama-acc convert-data` leaves out)"
                found.append(f"{wrong}: {error}{note if begins == 'assistant' else ''}")
        return found
    except MemoryError:
        return f"takes more than {limits.memory >> 20} MiB of memory on these turns"
    except refusals as error:
        return f"{wrong}: {error}"


def _trained(
    write: _Write, chat: Chat, wanted: list[int], special: list[str], ends: list[list[str]]
) -> list[RenderedChat]:
    """The texts of a conversation, and in each what the model has to write: from behind the prompt that it is asked
    with to the token that ends its answer. A template that has `{% generation %}` blocks says it itself."""
    from jinja2 import TemplateError

    def until(number: int) -> Chat:
        return chat._replace(messages=chat.messages[:number])

    whole, blocks = write(chat, False)
    if lost := _lost_of_tools(write, chat, whole, False):
        raise TemplateError(f"it leaves out {lost}")
    replies = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if blocks and len(blocks) == len(replies):
        block_of = dict(zip(replies, blocks, strict=True))
        if not any(_lost_of_reply(chat.messages[number], whole[slice(*block_of[number])]) for number in wanted):
            return [(whole, [(*block_of[number], number) for number in wanted])]
    found: list[RenderedChat] = []
    for number in wanted:
        text, blocks = write(until(number + 1), False)
        if blocks:
            shared = len(commonprefix([write(until(number), False)[0], text]))  # noqa: RUF071
            spans = [(begin, end, number) for begin, end in blocks if shared <= begin < end]
        else:
            spans = [(*_span(write(until(number), True)[0], text, special, ends), number)]
        if lost := _lost_of_reply(chat.messages[number], "".join(text[begin:end] for begin, end, _ in spans)):
            raise TemplateError(f"it {lost}")
        found.append((text[: spans[-1][1]], spans))
    if all(whole.startswith(text) for text, _ in found):
        return [(whole, [span for _, spans in found for span in spans])]
    return found


def _span(asked: str, text: str, special: list[str], ends: list[list[str]]) -> _Span:
    """Where a text's last reply stands, to which the model is asked so."""
    from jinja2 import TemplateError

    if not text.startswith(asked):
        raise TemplateError("it does not begin a reply as it asks for one")
    marks = "|".join(map(re.escape, special))
    tail = re.search(rf"(?:{marks}|\s)*$", text)
    closing = [] if tail is None else [found for found in re.finditer(marks, text) if found.start() >= tail.start()]
    if not closing:
        raise TemplateError("it ends a reply with no special token, by which chat would know the end")
    chosen = (mark for group in ends for mark in closing if mark.group() in group)
    return len(asked), next(chosen, closing[-1]).end()


def _lost_of_tools(write: _Write, chat: Chat, whole: str, ask: bool) -> str | None:
    """What a template did not write of a conversation's tools, and of what came of their calls."""
    names = [tool["function"]["name"] for tool in chat.tools]
    if not _holds(whole, names) or (names and write(chat._replace(tools=()), ask)[0] == whole):
        return "the tools"
    results = [message["content"] for message in chat.messages if message["role"] == "tool"]
    return None if _holds(whole, results) else "what came of a call"


def _lost_of_reply(message: Mapping[str, Any], text: str) -> str | None:
    """What a template did with a reply that it wrote as this text, if something of it is not there."""
    thoughts, _, said = message["content"].rpartition("</think>")
    calls = [[call["function"][field] for field in ("name", "arguments")] for call in message.get("tool_calls", ())]
    if not _holds(text, [said]):
        return "changes the text of a reply"
    inline = thoughts.strip().removeprefix("<think>")
    if not _holds(text, [inline, *(message.get(field, "") for field in REASONING_FIELDS)]):
        return "leaves out the reasoning of a reply (data.sources.reasoning=drop does so everywhere)"
    return None if _holds(text, calls) else "leaves out calls of a reply, or a part of them"


def _holds(text: str, value: Any) -> bool:
    """Whether all texts in a value stand in a text, as they are or as JSON writes them, but for space around them."""
    if isinstance(value, str):
        said = value.strip()
        return said in text or any(json.dumps(said, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    return not isinstance(value, Sequence) or all(_holds(text, part) for part in value)


def _compiled(source: str, blocks: list[str], generated: list[tuple[int, int]], now: datetime) -> Any:
    """The template in the environment that `transformers.utils.chat_template_utils` (5.24) gives it.

    `blocks` is what has been rendered so far; `generated` takes the characters of `{% generation %}` blocks.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTracker(Extension):
        """`{% generation %}...{% endgeneration %}`: notes where in the output its content stands."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

        def _note(self, caller: Callable[[], str]) -> str:
            content = caller()
            begin = sum(map(len, blocks))
            generated.append((begin, begin + len(content)))
            return content

    class PlainNamespace(jinja2.utils.Namespace):
        """Refuses names that begin with an underscore, which may lead out of the sandbox."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            attributes = dict(*args[1:], **kwargs)
            for name in attributes:
                PlainNamespace._check(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            PlainNamespace._check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no name with an underscore first: {name!r}")

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        # The noncharacters in it are the marks of `chat_template`, by which own text is known again.
        return re.sub(r"\\ufd[de][0-9a-f]", lambda escape: chr(int(escape[0][2:], 16)), text)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTracker, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    environment.globals["namespace"] = PlainNamespace
    return environment.from_string(source)
