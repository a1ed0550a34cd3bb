"""Prompt formats: how an item becomes text, which of it is trained, and how a conversation is put to the model.

A `Template` holds all of a format, so a checkpoint carries it as `template.json`. The wording and layout are
LLaMA2-Accessory's (`alpaca`, `shortqa`, `qg`, `caption`, `none`, `dialogue`), and ChatML. What Hugging Face checkpoints
carry instead is a `ChatTemplate`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from llama_acc.core.data.tools import Turn as Turn  # there, as it needs none of what is imported here
from llama_acc.core.errors import UserError, did_you_mean
from llama_acc.core.input_files import read_object
from llama_acc.core.model.schema import checked
from llama_acc.core.tokenizer import Tokenizer

TEMPLATE_FILE = "template.json"
FORMAT_VERSION = 1

Tools = Sequence[Mapping[str, Any]]
"""Functions that the assistant may call; see `tools.tools_of`."""
CHAT_TEMPLATE = "chat_template"
"""The name of the chat template beside a tokenizer."""
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")

Span = tuple[int, int]
"""Characters [begin, end) of a text."""


class Rendered(NamedTuple):
    """An item or a prompt as text."""

    text: str
    own: list[Span]  # what of it is the item's or the user's own text, in which no special token is recognized
    trained: list[Span] = []
    eos_trained: bool = False  # EOS behind the text is a label
    weights: Sequence[float] = ()  # how much each of `trained` counts in the loss; empty: all in full


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
_QG = "Generate a question whose answer is:\n{instruction}\n\nQuestion:\n"
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
    strip: bool = False  # values lose the white space at both ends, and
    removed: tuple[str, ...] = ()  # these
    prefix_labels: bool = False
    """LLaMA2-Accessory's rule: as many tokens have no label as the prompt has by itself. Else every token with a
    character of the output has one, also where it begins in the prompt."""
    stop: tuple[str, ...] = ()  # generation ends before any of these, besides at EOS; see `with_strict_stops`

    prompt: str = ""  # `{instruction}` stands for the instruction
    prompt_with_input: str | None = None  # where the item has one that is not blank; None: the format does not show it

    roles: dict[Literal["human", "assistant"], str] = {}
    system: str | None = None
    system_begin: str = ""
    system_end: str = ""
    turn_begin: str = ""
    turn_separator: str = ""
    turn_end: str = ""
    prompt_end: str = ""  # the beginning of `turn_separator` that a prompt ends with; the rest is the model's to write
    trained_end: str = ""  # the beginning of `turn_end` that is trained

    @property
    def shown(self) -> str:
        """What a user is told of it."""
        return self.name

    def single_turn_text(self, instruction: str, input: str | None, output: str, system: str | None = None) -> Rendered:
        """Render a whole single-turn item; what is trained begins where `render_prompt` ends.

        A blank input counts as none. A system text stands in front, with a blank line between.
        """
        output = self.clean(output)
        text, own, *_ = _joined([*self._prompt_parts(instruction, input, system), (output, True)])
        begin = len(text[: len(text) - len(output)].rstrip(" "))
        return Rendered(text, own, [(begin, len(text))], self.eos_trained)

    def clean(self, text: str) -> str:
        """A turn's text as it goes into a dialogue."""
        for mark in self.removed:
            text = text.replace(mark, "")
        return text.strip() if self.strip else text

    def dialogue_text(
        self, turns: Sequence[Turn], system: str | None = None, stops: Sequence[str] | None = None
    ) -> Rendered:
        """Render a whole dialogue; trained is each reply up to and with its end mark.

        A span starts where `render_prompt` would end. For `dialogue` that is before the space in front of the reply:
        a tokenizer that makes a token of that space leaves it to the model to write.

        Where a reply holds a stop string, what follows a reply's end mark is trained too (the next role, or EOS), as
        only that tells the end from what looks like it. LLaMA2-Accessory trains it nowhere.

        Without a system text, the format's own is used. `stops` are the stop strings that are text for the tokenizer
        (`text_stops`); None: all.
        """
        stops = self.stop if stops is None else stops
        trains_end = any(_held(self.clean(turn.whole_text), stops) for turn in turns if turn.is_label)
        parts: _Parts = []
        if (line := self.system if system is None else system) is not None:
            parts = [(self.system_begin, False), (line, system is not None), (self.system_end, False)]
        length = sum(len(part) for part, _ in parts)
        trained: list[Span] = []
        for number, turn in enumerate(turns):
            head, text = self.turn_begin + self._role(turn.role), self.clean(turn.whole_text)
            begin, end = length + len(head + self.prompt_end), length + len(head + self.turn_separator + text)
            parts += [(head + self.turn_separator, False), (text, True), (self.turn_end, False)]
            length = end + len(self.turn_end)
            if turn.is_label:
                end += len(self.trained_end)
                if trains_end:
                    following = turns[number + 1].role if number + 1 < len(turns) else None
                    end = length + (len(self._turn_mark(following)) if following and self._ends_alike else 0)
                trained.append((begin, end))
        text, own, *_ = _joined(parts)
        eos_trained = self.eos_trained or (trains_end and self._ends_alike and turns[-1].is_label)
        return Rendered(text, own, trained, eos_trained, weights_of([turn for turn in turns if turn.is_label]))

    def render_prompt(self, history: Sequence[Turn], system: str | None = None, tools: Tools = ()) -> Rendered:
        """Render the text up to where the model is to answer. Single-turn formats see the last human turn only.

        Spaces at the end of a single-turn prompt are left to the model to write: most tokenizers make one token of a
        space and the word behind it, and that is what was trained.

        Raises:
            UserError: tools, or calls of them, for which only a chat template has a place.
        """
        if tools or any(turn.role == "tool" or turn.more.get("tool_calls") for turn in history):
            raise UserError(f"the prompt format {self.name!r} has no place for tools: only chat templates have")
        if self.kind == "single_turn":
            text, own, *_ = self._question(history, system)
            kept = len(text.rstrip(" "))
            return Rendered(text[:kept], [(begin, min(end, kept)) for begin, end in own if begin < kept])
        text, own, *_ = self.dialogue_text(history, system)
        return Rendered(text + self._turn_mark("assistant"), own)

    def prompt_text(self, history: Sequence[Turn], system: str | None = None) -> str:
        """The text of `render_prompt`."""
        return self.render_prompt(history, system).text

    def prompt_ids(
        self, tokenizer: Tokenizer, history: Sequence[Turn], system: str | None = None, tools: Tools = ()
    ) -> list[int]:
        """`render_prompt` in tokens, with BOS where the format has it."""
        text, own, *_ = self.render_prompt(history, system, tools)
        return [tokenizer.bos_id] * self.bos + tokenizer.encode_batch([text], own=[own])[0]

    def spaces_left(self, history: Sequence[Turn]) -> int:
        """How many spaces a prompt ends with that are left to the model, and so are no part of its answer."""
        text = self._question(history).text if self.kind == "single_turn" else ""
        return len(text) - len(text.rstrip(" "))

    def text_stops(self, tokenizer: Tokenizer | None) -> list[str]:
        """The stop strings that a reply may hold as text; special tokens end an answer by their ids instead."""
        return _without_special(self.stop, tokenizer)

    def text_end(self, tokenizer: Tokenizer) -> str:
        """What the model writes as text where a reply ends, if more must follow for a stop string."""
        return "".join(_without_special([self.trained_end], tokenizer))

    def marks(self, tokenizer: Tokenizer | None) -> list[str]:
        """What begins a part of this format, where it is text for the tokenizer: in an item it looks like one."""
        if self.kind == "dialogue":
            begins = [self._turn_mark(role) for role in self.roles]
            looks = [self.turn_end + begin for begin in begins] if self._ends_alike else [*begins, self.turn_end]
            return _without_special(looks, tokenizer)
        formats = filter(None, (self.prompt, self.prompt_with_input))
        literals = [literal for text in formats for literal in _split(text)[2::2]]
        return sorted({literal for literal in literals if literal.strip()})

    def with_strict_stops(self) -> "Template":
        """This format for a model whose data has replies that hold a stop string: an answer ends at what the format
        really writes behind one, a whole turn's end or the role that follows."""
        strict = [self.turn_end + self._turn_mark(role) for role in self.roles] if self._ends_alike else [self.turn_end]
        stop = [mark for stop in self.stop for mark in (strict if self.turn_end.startswith(stop) else [stop])]
        return self.model_copy(update={"stop": tuple(dict.fromkeys(stop))})

    def to_json(self) -> str:
        """The whole format, as in template.json."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> "Template":
        """Read a template.json."""
        settings = read_object(path)
        version = settings.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{path} has format_version {version}; this llama-acc reads up to {FORMAT_VERSION}",
                "update llama-acc",
            )
        return checked(cls, settings, f"the prompt template {path}")

    def _question(self, history: Sequence[Turn], system: str | None = None) -> Rendered:
        """The whole prompt of a single-turn format."""
        last = next((turn.text for turn in reversed(history) if turn.role == "human"), "")
        return _joined(self._prompt_parts(last, None, system))

    def _prompt_parts(self, instruction: str, input: str | None, system: str | None) -> "_Parts":
        parts: _Parts = [(system, True), ("\n\n", False)] if system is not None and system.strip() else []
        if input is None or not input.strip() or self.prompt_with_input is None:
            text, values = self.prompt, {"{instruction}": instruction}
        else:
            text, values = self.prompt_with_input, {"{instruction}": instruction, "{input}": input}
        pieces = _split(text)
        return parts + [(values.get(piece, piece), piece in values) for piece in pieces]

    @property
    def _ends_alike(self) -> bool:
        """All of a turn's end is trained, so that only what follows it tells it from the same text in a reply."""
        return self.turn_end == self.trained_end

    def _turn_mark(self, role: str) -> str:
        return self.turn_begin + self._role(role) + self.prompt_end

    def _role(self, role: str) -> str:
        return self.roles["assistant" if role == "assistant" else "human"]


_Parts = list[tuple[str, bool]]
"""Texts that make up a whole, and which of them are own ones (see `Rendered`)."""


@cache
def _split(text: str) -> list[str]:
    """A prompt's text at its placeholders, which are every second piece."""
    return re.split(r"({instruction}|{input})", text)


def _joined(parts: _Parts) -> Rendered:
    own, length = [], 0
    for part, is_own in parts:
        if is_own and part:
            own.append((length, length + len(part)))
        length += len(part)
    return Rendered("".join(part for part, _ in parts), own)


def as_dialogue(instruction: str, input: str | None, output: str) -> list[Turn]:
    """A single-turn item as a dialogue of one exchange; an input that is not blank follows as a paragraph."""
    question = f"{instruction}\n\n{input}" if input and input.strip() else instruction
    return [Turn("human", question), Turn("assistant", output)]


def weights_of(replies: Sequence[Turn]) -> Sequence[float]:
    """How much each counts; empty: all in full."""
    weights = [turn.weight for turn in replies]
    return weights if any(weight != 1 for weight in weights) else ()


def _held(text: str, stops: Iterable[str]) -> bool:
    return any(stop in text for stop in stops)


def answer_ends(template: Template, tokenizer: Tokenizer) -> list[str]:
    """The texts that end an answer: the tokens that the checkpoint names, EOS first, and the format's stop strings."""
    named = sorted(tokenizer.settings.end_ids - {tokenizer.eos_id})
    return [*map(tokenizer.piece, (tokenizer.eos_id, *named)), *template.text_stops(tokenizer)]


def special_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts of the special tokens, longest first."""
    texts = tokenizer.special_texts.union(map(tokenizer.piece, tokenizer.end_ids))
    return sorted(texts, key=lambda text: (-len(text), text))


def _without_special(marks: Iterable[str], tokenizer: Tokenizer | None) -> list[str]:
    marks = list(marks)
    special = special_texts(tokenizer) if marks and tokenizer is not None else []
    return [mark for mark in marks if not _held(mark, special)]


_SINGLE_TURN: dict[str, Any] = {"kind": "single_turn", "eos_trained": True, "prefix_labels": True}
TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(name="alpaca", prompt=_ALPACA, prompt_with_input=_ALPACA_WITH_INPUT, **_SINGLE_TURN),
        Template(name="shortqa", prompt=_SHORTQA, **_SINGLE_TURN),
        Template(name="qg", prompt=_QG, **_SINGLE_TURN),
        Template(name="caption", **_SINGLE_TURN),
        Template(name="none", prompt="{instruction}", **_SINGLE_TURN | {"prefix_labels": False}),
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


CHAT_TEMPLATES = {
    path.stem: path for path in sorted((Path(__file__).parents[2] / "recipes" / "templates").glob("*.jinja"))
}
"""The chat templates of well-known families, as they are published, by name."""
USUAL = {"single_turn": "alpaca", "dialogue": "dialogue"}
KINDS = tuple(USUAL)


def check_template(name: str) -> None:
    """Refuses a name that no shipped format has."""
    known = (*TEMPLATES, *CHAT_TEMPLATES)
    if name not in known:
        hint = did_you_mean(name, known) or f"there are: {', '.join(known)}"
        raise UserError(f"unknown template {name!r}", hint)


def get_template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """The shipped format of that name; without BOS where a tokenizer says that texts begin without."""
    check_template(name)
    if name in CHAT_TEMPLATES:
        raise UserError(f"template {name} needs a tokenizer, as its special tokens are part of it", "give --tokenizer")
    template = TEMPLATES[name]
    if tokenizer is not None and tokenizer.settings.add_bos is False:
        return template.model_copy(update={"bos": False})
    return template


def is_template_file(name: str) -> bool:
    """Whether a template is given as a file: of our own form (.json), or a chat template."""
    return name.endswith((".json", ".jinja", ".jinja2", ".j2"))
