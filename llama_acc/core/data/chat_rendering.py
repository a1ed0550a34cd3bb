"""Render Hugging Face chat templates as transformers does, in a child process with limits.

A chat template comes with a checkpoint and is a program: it may loop, recurse or grow without end. So the child gets
only so much processor time and memory, and its output may be only so long.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from llama_acc.core.errors import UserError


class Limits(NamedTuple):
    """What rendering one list of conversations may take."""

    seconds: int = 20
    """Of processor time."""
    characters: int = 20_000_000
    """Of each text: a long dialogue is written once for every reply."""
    memory: int = 2 << 30
    """Bytes of address space."""


class Replies(NamedTuple):
    """What is to be trained of conversations."""

    wanted: Sequence[Sequence[int]]
    """Of each conversation, the numbers of messages."""
    special: Sequence[str]
    """The texts of the tokenizer's special tokens."""
    ends: Sequence[str]
    """Those of them that end an answer."""


RenderedChat = tuple[str, list[tuple[int, int]]]
"""A conversation as text, and the characters [begin, end) of it that the model has to write."""
TRAINING_DAY = datetime(2024, 7, 26)
"""What templates that write the date (LLaMA 3.2's) are told in training: its tokens must not depend on the day. It is
the date that LLaMA 3.1's template writes itself."""

_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from llama_acc.core.data import chat_rendering as c; c.main()"


def render(
    source: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    variables: Mapping[str, str],
    replies: Replies | None,
    path: Path,
    limits: Limits | None = None,
) -> list[list[RenderedChat]]:
    """Render conversations with a chat template, as `apply_chat_template(tokenize=False)` does.

    Args:
        source: the Jinja text.
        conversations: messages, each with a role and content.
        variables: the special tokens by name, such as bos_token.
        replies: what is to be trained; None: each conversation is a prompt, and ends with what stands in front of an
            answer.
        path: where it came from, for messages.
        limits: what it may take.

    Returns:
        Each conversation as one text; or, where a template writes earlier turns otherwise than it did while they were
        the last ones, as one text for each reply, which ends with that and is what the model is asked then.

    Raises:
        UserError: the template is not Jinja, refuses the messages, or takes more than the limits.
    """
    limits = limits or Limits()
    job = [source, conversations, variables, replies, limits]
    # Isolated: neither the working directory nor PYTHON* variables decide what the child imports.
    command = [sys.executable, "-I", "-c", _PROGRAM, *filter(None, sys.path)]
    most = 10 * limits.seconds  # for one that sleeps
    try:
        done = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, check=False, timeout=most)
    except subprocess.TimeoutExpired:
        raise UserError(f"the chat template {path} takes more than {most} s") from None
    if done.returncode or not done.stdout:
        taken = f"takes more than {limits.seconds} s of processor time, or ends the process that renders it"
        raise UserError(f"the chat template {path} {taken}")
    answer = json.loads(done.stdout)
    if isinstance(answer, str):
        raise UserError(f"{path} {answer}" if answer.startswith("is not") else f"the chat template {path} {answer}")
    return [[(text, [(begin, end) for begin, end in spans]) for text, spans in texts] for texts in answer]


def main() -> None:
    """Read a job from standard input; write the rendered conversations, or a text saying what is wrong."""
    import resource

    source, conversations, variables, replies, limits = json.load(sys.stdin)
    limits = Limits(*limits)
    for kind, most in ((resource.RLIMIT_CPU, limits.seconds), (resource.RLIMIT_AS, limits.memory)):
        with suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(kind, (most, most))
    sys.stdout.write(json.dumps(_answer(source, conversations, variables, replies, limits)))


_Write = Callable[[list[dict[str, str]], bool], RenderedChat]
"""Writes messages, and then, if so asked, the prompt for an answer; with what stands in `{% generation %}` blocks."""


def _answer(
    source: str,
    conversations: list[list[dict[str, str]]],
    variables: dict[str, str],
    replies: list[Any] | None,
    limits: Limits,
) -> list[list[RenderedChat]] | str:
    from jinja2 import TemplateError

    # What transformers passes where its caller gives neither tools nor documents.
    passed = {"tools": None, "documents": None, **variables}
    blocks: list[str] = []
    generated: list[tuple[int, int]] = []

    def write(messages: list[dict[str, str]], ask: bool) -> RenderedChat:
        written = 0
        blocks.clear()
        generated.clear()
        for block in template.generate(messages=messages, add_generation_prompt=ask, **passed):
            blocks.append(block)
            written += len(block)
            if written > limits.characters:
                raise TemplateError(f"it writes more than {limits.characters:,} characters")
        return "".join(blocks), list(generated)

    wrong = "is not a chat template"
    try:
        template = _compiled(source, blocks, generated, datetime.now() if replies is None else TRAINING_DAY)
        wrong = "fails on these turns"
        if replies is None:
            return [[write(messages, True)] for messages in conversations]
        found, (wanted, special, ends) = [], replies
        for messages, numbers in zip(conversations, wanted, strict=True):
            found.append(_trained(write, messages, numbers, special, ends))
        return found
    except MemoryError:
        return f"takes more than {limits.memory >> 20} MiB of memory on these turns"
    except (
        TemplateError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
    ) as error:
        return f"{wrong}: {error}"


def _trained(
    write: _Write, messages: list[dict[str, str]], wanted: list[int], special: list[str], ends: list[str]
) -> list[RenderedChat]:
    """The texts of a conversation, and in each what the model has to write: from behind the prompt that it is asked
    with to the token that ends its answer. A template that has `{% generation %}` blocks says it itself."""
    from jinja2 import TemplateError

    whole, blocks = write(messages, False)
    if blocks:
        replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(blocks) != len(replies):
            raise TemplateError(f"it has {{% generation %}} around {len(blocks)} of {len(replies)} replies")
        return [(whole, [block for block, number in zip(blocks, replies, strict=True) if number in wanted])]
    marks = "|".join(map(re.escape, special))
    found: list[RenderedChat] = []
    for number in wanted:
        asked, text = write(messages[:number], True)[0], write(messages[: number + 1], False)[0]
        said = messages[number]["content"].rpartition("</think>")[2].strip()
        if not text.startswith(asked):
            raise TemplateError("it does not begin a reply as it asks for one")
        if said not in text[len(asked) :]:
            raise TemplateError("it changes the text of a reply")
        tail = re.search(rf"(?:{marks}|\s)*$", text)
        closing = [] if tail is None else [found for found in re.finditer(marks, text) if found.start() >= tail.start()]
        if not closing:
            raise TemplateError("it ends a reply with no special token, by which chat would know the end")
        end = next((mark for mark in closing if mark.group() in ends), closing[-1]).end()
        found.append((text, [(len(asked), end)]))
    if all(whole.startswith(text[:end]) for text, [(_, end)] in found):
        return [(whole, [span for _, spans in found for span in spans])]
    return [(text[:end], spans) for text, spans in found for _, end in spans]


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
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

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
