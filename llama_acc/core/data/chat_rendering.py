"""Render Hugging Face chat templates as transformers does, in a child process with limits.

A chat template comes with a checkpoint and is a program: it may loop, recurse or grow without end. So the child gets
only so much processor time and memory, and its output may be only so long.
"""

import json
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
    """Of all that is rendered."""
    memory: int = 2 << 30
    """Bytes of address space."""


RenderedChat = tuple[str, list[tuple[int, int]]]
"""A conversation as text, and the characters [begin, end) of it that stand in `{% generation %}` blocks."""

_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from llama_acc.core.data import chat_rendering as c; c.main()"


def render(
    source: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    variables: Mapping[str, str],
    add_generation_prompt: bool,
    path: Path,
    limits: Limits | None = None,
) -> list[RenderedChat]:
    """Render conversations with a chat template, as `apply_chat_template(tokenize=False)` does.

    Args:
        source: the Jinja text.
        conversations: messages, each with a role and content.
        variables: the special tokens by name, such as bos_token.
        add_generation_prompt: end each with what stands in front of an answer.
        path: where it came from, for messages.
        limits: what it may take.

    Raises:
        UserError: the template is not Jinja, refuses the messages, or takes more than the limits.
    """
    limits = limits or Limits()
    job = [source, conversations, variables, add_generation_prompt, limits]
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
    return [(text, [(begin, end) for begin, end in generated]) for text, generated in answer]


def main() -> None:
    """Read a job from standard input; write the rendered conversations, or a text saying what is wrong."""
    import resource

    source, conversations, variables, add_generation_prompt, limits = json.load(sys.stdin)
    limits = Limits(*limits)
    for kind, most in ((resource.RLIMIT_CPU, limits.seconds), (resource.RLIMIT_AS, limits.memory)):
        with suppress(ValueError, OSError):  # macOS has no limit of address space
            resource.setrlimit(kind, (most, most))
    sys.stdout.write(json.dumps(_answer(source, conversations, variables, add_generation_prompt, limits)))


def _answer(
    source: str,
    conversations: list[list[dict[str, str]]],
    variables: dict[str, str],
    add_generation_prompt: bool,
    limits: Limits,
) -> list[RenderedChat] | str:
    from jinja2 import TemplateError

    # What transformers passes where its caller gives neither tools nor documents.
    passed = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **variables}
    blocks: list[str] = []
    generated: list[tuple[int, int]] = []
    rendered: list[RenderedChat] = []
    wrong = "is not a chat template"
    try:
        template = _compiled(source, blocks, generated)
        wrong = "fails on these turns"
        for messages in conversations:
            blocks.clear()
            generated.clear()
            left = limits.characters - sum(len(text) for text, _ in rendered)
            for block in template.generate(messages=messages, **passed):
                blocks.append(block)
                left -= len(block)
                if left < 0:
                    return f"{wrong}: it writes more than {limits.characters:,} characters"
            rendered.append(("".join(blocks), list(generated)))
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
    return rendered


def _compiled(source: str, blocks: list[str], generated: list[tuple[int, int]]) -> Any:
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
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["namespace"] = PlainNamespace
    return environment.from_string(source)
