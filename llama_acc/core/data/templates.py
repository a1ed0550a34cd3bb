"""Prompt formats: how an item becomes text, which of it is trained, and how a conversation is put to the model.

A `Template` holds all of a format, so a checkpoint carries it as `template.json`. The wording and layout are
LLaMA2-Accessory's (`alpaca`, `shortqa`, `qg`, `caption`, `none`, `dialogue`), and ChatML. A `ChatTemplate` is what
Hugging Face checkpoints carry instead: a jinja text that can only ask, not say what is trained.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from llama_acc.core.errors import UserError, did_you_mean, listed
from llama_acc.core.schema_problems import problems_of
from llama_acc.core.tokenizer import Tokenizer
from llama_acc.core.tokenizer_folder import CHAT_TEMPLATE_FILE, CONFIG_FILE

TEMPLATE_FILE = "template.json"
FORMAT_VERSION = 1


class Turn(NamedTuple):
    """One turn of a dialogue."""

    role: str
    """"human" or "assistant"."""
    text: str
    trained: bool = True
    """False: a reply that is context only, not labeled."""


Span = tuple[int, int]
"""Characters [begin, end) of a text."""

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_SHORTQA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request using a single word or phrase.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_DIALOGUE_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


class Template(BaseModel):
    """A prompt format. Single-turn formats use `prompt*`, dialogue formats the fields from `roles` on.

    A dialogue is: the system text, then for every turn `turn_begin`, the role's name, `turn_separator`, the text and
    `turn_end`. What is trained goes from behind the role's name and `prompt_end` up to where `turn_end` has its
    `trained_end`, so it is what the model has to write when it is asked with `prompt_text`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    name: str
    kind: Literal["single_turn", "dialogue"]
    bos: bool = True
    eos: bool = True
    eos_trained: bool = False
    strip: bool = False
    """Values lose `removed` and the white space at both ends."""
    removed: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    """Generation ends before any of these, besides at EOS."""

    prompt: str = ""
    """`{instruction}` stands for the instruction."""
    prompt_with_input: str | None = None
    """Where the item has an input that is not blank; None: this format does not show it."""

    roles: dict[Literal["human", "assistant"], str] = {}
    system: str | None = None
    system_begin: str = ""
    system_end: str = ""
    turn_begin: str = ""
    turn_separator: str = ""
    turn_end: str = ""
    prompt_end: str = ""
    """The beginning of `turn_separator` that a prompt ends with; the rest is the model's to write."""
    trained_end: str = ""
    """The beginning of `turn_end` that is trained."""

    def single_turn_prompt(self, instruction: str, input: str | None = None, system: str | None = None) -> str:
        """The text before the output, which follows it with nothing between. A blank input counts as none.

        A system text stands in front, with a blank line between.
        """
        if system is not None and system.strip():
            return f"{system}\n\n{self.single_turn_prompt(instruction, input)}"
        if input is None or not input.strip() or self.prompt_with_input is None:
            return self.prompt.replace("{instruction}", instruction)
        # In two halves, so that "{input}" within the instruction stays as it is.
        before, _, after = self.prompt_with_input.partition("{input}")
        return before.replace("{instruction}", instruction) + input + after.replace("{instruction}", instruction)

    def clean(self, text: str) -> str:
        """A turn's text as it goes into a dialogue."""
        for mark in self.removed:
            text = text.replace(mark, "")
        return text.strip() if self.strip else text

    def dialogue_text(self, turns: Sequence[Turn], system: str | None = None) -> tuple[str, list[Span]]:
        """A whole dialogue, and the spans of it that are trained: each reply up to and with its end mark.

        A span starts where `prompt_text` would end. For `dialogue` that is before the space in front of the reply:
        a tokenizer that makes a token of that space leaves it to the model to write.
        """
        parts = [self._system_text(system)]
        length = len(parts[0])
        trained: list[Span] = []
        for role, text, is_trained in turns:
            head = self.turn_begin + self._role(role)
            turn = head + self.turn_separator + self.clean(text)
            if role == "assistant" and is_trained:
                trained.append((length + len(head + self.prompt_end), length + len(turn + self.trained_end)))
            parts.append(turn + self.turn_end)
            length += len(parts[-1])
        return "".join(parts), trained

    def prompt_text(self, history: Sequence[Turn], system: str | None = None) -> str:
        """The text up to where the model is to answer. Single-turn formats see the last human turn only."""
        if self.kind == "single_turn":
            last = next((turn.text for turn in reversed(history) if turn.role == "human"), "")
            return self.single_turn_prompt(last)
        return self.dialogue_text(history, system)[0] + self.turn_begin + self._role("assistant") + self.prompt_end

    def prompt_ids(self, tokenizer: Tokenizer, history: Sequence[Turn], system: str | None = None) -> list[int]:
        """`prompt_text` in tokens, with BOS where the format has it."""
        return tokenizer.encode(self.prompt_text(history, system), bos=self.bos)

    def as_dialogue(self, instruction: str, input: str | None, output: str) -> list[Turn]:
        """A single-turn item as a dialogue of one exchange; an input that is not blank follows as a paragraph."""
        question = f"{instruction}\n\n{input}" if input and input.strip() else instruction
        return [Turn("human", question), Turn("assistant", output)]

    def save(self, path: Path) -> None:
        """Write the whole format as JSON."""
        path.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The whole format, as in template.json."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> "Template":
        """Read what `save` wrote.

        Raises:
            UserError: it cannot be read, or a newer llama-acc wrote it.
        """
        settings = _read_json(path)
        version = settings.get("format_version") if isinstance(settings, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{path} has format_version {version}; this llama-acc reads up to {FORMAT_VERSION}",
                "update it: pip install --upgrade llama-acc",
            )
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise UserError(f"{path} is not a prompt template:\n{listed(problems_of(error))}") from error

    def _system_text(self, system: str | None) -> str:
        line = self.system if system is None else system
        return "" if line is None else self.system_begin + line + self.system_end

    def _role(self, role: str) -> str:
        return self.roles["assistant" if role == "assistant" else "human"]


class ChatTemplate:
    """A Hugging Face chat template; the same `prompt_text`, `prompt_ids` and `stop` as a `Template`."""

    name = "chat_template"
    kind = "dialogue"
    # The rendered text holds the special tokens itself.
    bos = False
    eos = False

    _TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")

    def __init__(self, source: str, tokenizer: Tokenizer, path: Path) -> None:
        """Args:
            source: the jinja text.
            tokenizer: whose BOS and EOS it writes.
            path: where it came from, for messages.

        Raises:
            UserError: it is not jinja.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._path = path
        self._tokenizer = tokenizer
        # The settings and functions that Hugging Face's own renderer gives a template.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = self._raise
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        environment.filters["tojson"] = lambda value, **settings: json.dumps(value, ensure_ascii=False, **settings)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"{path} is not a chat template: {error}") from error
        self.stop = tuple(mark for mark in self._TURN_ENDS if mark in source)

    def prompt_text(self, history: Sequence[Turn], system: str | None = None) -> str:
        """The text up to where the model is to answer.

        Raises:
            UserError: the template refuses these turns.
        """
        from jinja2 import TemplateError

        roles = {"human": "user", "assistant": "assistant"}
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": roles[role], "content": text} for role, text, _ in history]
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=self._tokenizer.piece(self._tokenizer.bos_id),
                eos_token=self._tokenizer.piece(self._tokenizer.eos_id),
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(f"the chat template {self._path} fails on these turns: {error}") from error

    def prompt_ids(self, tokenizer: Tokenizer, history: Sequence[Turn], system: str | None = None) -> list[int]:
        """`prompt_text` in tokens."""
        return tokenizer.encode(self.prompt_text(history, system))

    def _raise(self, message: str) -> None:
        from jinja2 import TemplateError

        raise TemplateError(message)


def _single_turn(name: str, prompt: str, prompt_with_input: str | None = None) -> Template:
    return Template(name=name, kind="single_turn", prompt=prompt, prompt_with_input=prompt_with_input, eos_trained=True)


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _single_turn("alpaca", _ALPACA, _ALPACA_WITH_INPUT),
        _single_turn("shortqa", _SHORTQA),
        _single_turn("qg", "Generate a question whose answer is:\n{instruction}\n\nQuestion:\n"),
        _single_turn("caption", ""),
        _single_turn("none", "{instruction}"),
        Template(
            name="dialogue",
            kind="dialogue",
            strip=True,
            removed=("<image>",),
            stop=("\n###",),
            roles={"human": "Human", "assistant": "Assistant"},
            system=_DIALOGUE_SYSTEM,
            system_end="\n\n###",
            turn_begin=" ",
            turn_separator=": ",
            turn_end="\n###",
            prompt_end=":",
            trained_end="\n###",
        ),
        Template(
            name="chatml",
            kind="dialogue",
            bos=False,
            eos=False,
            stop=("<|im_end|>",),
            roles={"human": "user", "assistant": "assistant"},
            system_begin="<|im_start|>system\n",
            system_end="<|im_end|>\n",
            turn_begin="<|im_start|>",
            turn_separator="\n",
            turn_end="<|im_end|>\n",
            prompt_end="\n",
            trained_end="<|im_end|>",
        ),
    )
}


_AUTO = {"single_turn": "alpaca", "dialogue": "dialogue"}
KINDS = tuple(_AUTO)


def get_template(name: str) -> Template:
    """The shipped format of that name.

    Raises:
        UserError: there is none.
    """
    if name not in TEMPLATES:
        hint = did_you_mean(name, TEMPLATES) or f"there are: {', '.join(TEMPLATES)}"
        raise UserError(f"unknown template {name!r}", hint)
    return TEMPLATES[name]


def template_for(name: str, kind: str) -> Template:
    """A shipped format by name; "auto": the usual one for a kind of items.

    Raises:
        UserError: there is none of that name, or it cannot write items of that kind.
    """
    template = TEMPLATES[_AUTO[kind]] if name == "auto" else get_template(name)
    if kind == "dialogue" and template.kind == "single_turn":
        raise UserError(
            f"template {template.name!r} is for single-turn items, but these are dialogues",
            "use template: dialogue, or format: single_turn_llava for the first question and answer of each",
        )
    return template


def template_of_folder(folder: Path, tokenizer: Tokenizer) -> tuple[Template | ChatTemplate, str]:
    """The format a checkpoint was trained with, and where that is known from, for showing.

    `template.json` if there, else the chat template of a Hugging Face checkpoint, else the bare instruction.

    Raises:
        UserError: one is there but cannot be used.
    """
    if (folder / TEMPLATE_FILE).is_file():
        template = Template.load(folder / TEMPLATE_FILE)
        return template, f"{template.name}, from {TEMPLATE_FILE}"
    jinja = folder / CHAT_TEMPLATE_FILE
    if jinja.is_file():
        return ChatTemplate(_read_text(jinja), tokenizer, jinja), f"the chat template, from {CHAT_TEMPLATE_FILE}"
    config = folder / CONFIG_FILE
    source = _default_chat_template(_read_json(config)) if config.is_file() else None
    if source is not None:
        return ChatTemplate(source, tokenizer, config), f"the chat template, from {CONFIG_FILE}"
    return TEMPLATES["none"], f"none, as the folder has no {TEMPLATE_FILE} and no chat template"


def _default_chat_template(config: Any) -> str | None:
    """`chat_template` is a text, or a list of named ones of which "default" is the one for plain chat."""
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
