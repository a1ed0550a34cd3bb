"""Prompt formats: how an item becomes text, which of it is trained, and how a conversation is put to the model.

A `Template` holds all of a format, so a checkpoint carries it as `template.json`. The wording and layout are
LLaMA2-Accessory's (`alpaca`, `shortqa`, `qg`, `caption`, `none`, `dialogue`), and ChatML. A `ChatTemplate` is what
Hugging Face checkpoints carry instead: a jinja text, which says what is trained if it has `{% generation %}` blocks.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from llama_acc.core.data.chat_rendering import Limits, RenderedChat, Replies, render
from llama_acc.core.errors import UserError, did_you_mean, listed, schema_problems
from llama_acc.core.input_files import read_json, read_object, read_text
from llama_acc.core.tokenizer import Tokenizer
from llama_acc.core.tokenizer_folder import CHAT_TEMPLATE_FILE, CONFIG_FILE, TOKEN_NAMES, token_text

TEMPLATE_FILE = "template.json"
FORMAT_VERSION = 1


class Turn(NamedTuple):
    """One turn of a dialogue."""

    role: str
    """"human" or "assistant"."""
    text: str
    trained: bool = True
    """False: a reply that is context only, not labeled."""


CHAT_TEMPLATE = "chat_template"
"""The name of the chat template beside a tokenizer."""
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")
# Noncharacters, which no text may hold in interchange; two that are not in the text at hand mark special tokens.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))

Span = tuple[int, int]
"""Characters [begin, end) of a text."""


class Rendered(NamedTuple):
    """An item or a prompt as text."""

    text: str
    own: list[Span]
    """What of it is the item's or the user's own text, in which no special token is recognized."""
    trained: list[Span] = []
    eos_trained: bool = False
    """EOS behind the text is a label."""


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

        Args:
            turns: of the dialogue.
            system: its system text; None: the format's own.
            stops: the stop strings that are text for the tokenizer (`text_stops`); None: all.
        """
        stops = self.stop if stops is None else stops
        trains_end = any(_held(self.clean(turn.text), stops) for turn in turns if _is_label(turn))
        parts = self._system_parts(system)
        length = sum(len(part) for part, _ in parts)
        trained: list[Span] = []
        for number, turn in enumerate(turns):
            head, text = self.turn_begin + self._role(turn.role), self.clean(turn.text)
            begin, end = length + len(head + self.prompt_end), length + len(head + self.turn_separator + text)
            parts += [(head + self.turn_separator, False), (text, True), (self.turn_end, False)]
            length = end + len(self.turn_end)
            if _is_label(turn):
                end += len(self.trained_end)
                if trains_end:
                    following = turns[number + 1].role if number + 1 < len(turns) else None
                    end = length + (len(self._turn_mark(following)) if following and self._ends_alike else 0)
                trained.append((begin, end))
        text, own, *_ = _joined(parts)
        eos_trained = self.eos_trained or (trains_end and self._ends_alike and _is_label(turns[-1]))
        return Rendered(text, own, trained, eos_trained)

    def render_prompt(self, history: Sequence[Turn], system: str | None = None) -> Rendered:
        """Render the text up to where the model is to answer. Single-turn formats see the last human turn only.

        Spaces at the end of a single-turn prompt are left to the model to write: most tokenizers make one token of a
        space and the word behind it, and that is what was trained.
        """
        if self.kind == "single_turn":
            text, own, *_ = self._question(history, system)
            kept = len(text.rstrip(" "))
            return Rendered(text[:kept], [(begin, min(end, kept)) for begin, end in own if begin < kept])
        text, own, *_ = self.dialogue_text(history, system)
        return Rendered(text + self._turn_mark("assistant"), own)

    def prompt_text(self, history: Sequence[Turn], system: str | None = None) -> str:
        """The text of `render_prompt`."""
        return self.render_prompt(history, system).text

    def prompt_ids(self, tokenizer: Tokenizer, history: Sequence[Turn], system: str | None = None) -> list[int]:
        """`render_prompt` in tokens, with BOS where the format has it."""
        text, own, *_ = self.render_prompt(history, system)
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
        """Read a template.json.

        Raises:
            UserError: it cannot be read, or a newer llama-acc wrote it.
        """
        settings = read_object(path)
        version = settings.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{path} has format_version {version}; this llama-acc reads up to {FORMAT_VERSION}",
                "update llama-acc",
            )
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise UserError(f"{path} is not a prompt template:\n{listed(schema_problems(error))}") from error

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

    def _system_parts(self, system: str | None) -> "_Parts":
        line = self.system if system is None else system
        if line is None:
            return []
        return [(self.system_begin, False), (line, system is not None), (self.system_end, False)]

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


def _is_label(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.trained


def _held(text: str, stops: Iterable[str]) -> bool:
    return any(stop in text for stop in stops)


def special_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts of the special tokens, longest first."""
    texts = {tokenizer.piece(token) for token in (tokenizer.bos_id, *tokenizer.end_ids)}
    texts |= {text for text in ("<unk>", *tokenizer.settings.roles.values()) if tokenizer.is_special(text)}
    return sorted(texts, key=lambda text: (-len(text), text))


def _without_special(marks: Iterable[str], tokenizer: Tokenizer | None) -> list[str]:
    marks = list(marks)
    special = special_texts(tokenizer) if marks and tokenizer is not None else []
    return [mark for mark in marks if not _held(mark, special)]


class ChatTemplate(Template):
    """A Hugging Face chat template: a format that its jinja text renders, with the special tokens in it."""

    _path: Path = PrivateAttr()
    _source: str = PrivateAttr()
    _limits: Limits = PrivateAttr()
    _variables: dict[str, str] = PrivateAttr()
    _special_texts: list[str] = PrivateAttr()
    _special: re.Pattern[str] = PrivateAttr()
    _ends: list[str] = PrivateAttr()

    def __init__(self, source: str, tokenizer: Tokenizer, path: Path, limits: Limits = Limits()) -> None:  # noqa: B008
        """Args:
            source: the jinja text.
            tokenizer: whose special tokens it writes; its settings are beside it.
            path: where it came from, for messages.
            limits: of what rendering may take.

        Raises:
            UserError: it is not jinja.
        """
        stop = tuple(mark for mark in _TURN_ENDS if mark in source)
        name = path.stem if path in CHAT_TEMPLATES.values() else CHAT_TEMPLATE
        super().__init__(name=name, kind="dialogue", bos=False, eos=False, stop=stop)
        self._path, self._source, self._limits = path, source, limits
        self._variables = _special_tokens(tokenizer.path.parent / CONFIG_FILE, tokenizer)
        self._special_texts = special_texts(tokenizer)
        self._special = re.compile("|".join(map(re.escape, self._special_texts)))
        self._ends = [tokenizer.piece(token) for token in sorted(tokenizer.end_ids)]
        self._rendered([], [], False)

    def render_prompt(self, history: Sequence[Turn], system: str | None = None) -> Rendered:
        """Render the text up to where the model is to answer.

        Raises:
            UserError: the template refuses these turns.
        """
        return self._rendered([history], [system], False)[0][0]

    def marks(self, tokenizer: Tokenizer | None) -> list[str]:
        """The stop strings that are text for the tokenizer; what else looks like a turn is not known."""
        return self.text_stops(tokenizer)

    @property
    def path(self) -> Path:
        """Where it came from."""
        return self._path

    @property
    def shown(self) -> str:
        return f"the chat template in {self._path}" if self.name == CHAT_TEMPLATE else self.name

    @property
    def source(self) -> str:
        """The jinja text."""
        return self._source

    def to_json(self) -> str:
        """All that decides what it renders."""
        return json.dumps([self._source, self._variables])

    def dialogue_texts(
        self, dialogues: Sequence[Sequence[Turn]], systems: Sequence[str | None]
    ) -> list[list[Rendered]]:
        """Render whole dialogues; trained is what the model has to write: see `chat_rendering.render`.

        Each is one text, or, where the template writes earlier turns otherwise than the last one, one for each reply.

        Raises:
            UserError: the template refuses these turns, or does not write a reply as it asks for one.
        """
        try:
            return self._rendered(dialogues, systems, True)
        except UserError as error:
            known = ", ".join((*TEMPLATES, *CHAT_TEMPLATES))
            hint = f"take another one: --template NAME, in a run data.sources.0.template=NAME; there are: {known}"
            raise UserError(error.message, hint) from None

    def _rendered(
        self, dialogues: Sequence[Sequence[Turn]], systems: Sequence[str | None], trains: bool
    ) -> list[list[Rendered]]:
        """The texts of dialogues, or of prompts.

        Special tokens in own texts are put between marks, by which they are found again in what is rendered.
        """
        roles = {"human": "user", "assistant": "assistant"}
        conversations = [
            ([] if system is None else [("system", system)]) + [(roles[turn.role], turn.text) for turn in turns]
            for turns, system in zip(dialogues, systems, strict=True)
        ]
        texts = "".join(text for conversation in conversations for _, text in conversation)
        begin, end, *_ = [mark for mark in _MARKS if mark not in texts]
        messages = [
            [{"role": role, "content": self._special.sub(rf"{begin}\g<0>{end}", text)} for role, text in conversation]
            for conversation in conversations
        ]
        wanted = [
            [number + (system is not None) for number, turn in enumerate(turns) if _is_label(turn)]
            for turns, system in zip(dialogues, systems, strict=True)
        ]
        replies = Replies(wanted, self._special_texts, self._ends) if trains else None
        chats = render(self._source, messages, self._variables, replies, self._path, self._limits)
        return [[_unmarked(text, begin, end) for text in texts] for texts in chats]


def _unmarked(chat: RenderedChat, begin: str, end: str) -> Rendered:
    """A rendered text without the marks. The character at each mark's inner side is own text, which is enough to keep
    the tokenizer from the special token there, even if the template has cut the text between two marks."""
    marked, blocks = chat
    marks = [match.start() for match in re.finditer(f"[{begin}{end}]", marked)]
    text = marked.replace(begin, "").replace(end, "")
    inner = {mark - number - (marked[mark] == end) for number, mark in enumerate(marks)}
    generated = [(first - bisect_left(marks, first), last - bisect_left(marks, last)) for first, last in blocks]
    return Rendered(text, [(place, place + 1) for place in sorted(inner) if 0 <= place < len(text)], generated)


def _special_tokens(config: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens that transformers passes to a chat template, by name: those that are set.

    LLaMA's own class of tokenizers has a BOS and an EOS also where tokenizer_config.json does not mention them.
    """
    settings = read_json(config) if config.is_file() else {}
    settings = settings if isinstance(settings, dict) else {}
    tokens: dict[str, Any] = {}
    if "Llama" in str(settings.get("tokenizer_class", "Llama")):
        tokens = {"bos_token": tokenizer.piece(tokenizer.bos_id), "eos_token": tokenizer.piece(tokenizer.eos_id)}
    texts = {name: token_text(value) for name, value in (tokens | settings).items() if name in TOKEN_NAMES}
    return {name: text for name, text in texts.items() if text is not None}


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
_AUTO = {"single_turn": "alpaca", "dialogue": "dialogue"}
KINDS = tuple(_AUTO)


def check_template(name: str) -> None:
    """Refuses a name that no shipped format has.

    Raises:
        UserError: with the near ones.
    """
    known = (*TEMPLATES, *CHAT_TEMPLATES)
    if name not in known:
        hint = did_you_mean(name, known) or f"there are: {', '.join(known)}"
        raise UserError(f"unknown template {name!r}", hint)


def get_template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """The shipped format of that name; without BOS where a tokenizer says that texts begin without.

    Raises:
        UserError: there is none.
    """
    check_template(name)
    if name in CHAT_TEMPLATES:
        raise UserError(f"template {name} needs a tokenizer, as its special tokens are part of it", "give --tokenizer")
    template = TEMPLATES[name]
    if tokenizer is not None and tokenizer.settings.add_bos is False:
        return template.model_copy(update={"bos": False})
    return template


def own_template(folder: Path, tokenizer: Tokenizer) -> Template | None:
    """The format a checkpoint has of its own: `template.json`, in which it was trained, else its chat template.

    Raises:
        UserError: one is there but cannot be used.
    """
    if (folder / TEMPLATE_FILE).is_file():
        return Template.load(folder / TEMPLATE_FILE)
    return _chat_template_of(folder, tokenizer)


def template_of_folder(folder: Path, tokenizer: Tokenizer) -> tuple[Template, str]:
    """A checkpoint's own format, else the bare instruction; and where that is known from, for showing.

    Raises:
        UserError: one is there but cannot be used.
    """
    own = own_template(folder, tokenizer)
    if own is None:
        return get_template("none", tokenizer), f"none, as the folder has no {TEMPLATE_FILE} and no chat template"
    if isinstance(own, ChatTemplate):
        return own, f"the chat template, from {own.path.name}"
    return own, f"{own.name}, from {TEMPLATE_FILE}"


def is_template_file(name: str) -> bool:
    """Whether a template is given as a file: of our own form (.json), or a chat template."""
    return name.endswith((".json", ".jinja", ".jinja2", ".j2"))


def template_for(name: str, kind: str, tokenizer: Tokenizer | None = None) -> Template:
    """A prompt format for items of a kind.

    Args:
        name: of a shipped one; `chat_template`, the one beside the tokenizer; a file (`is_template_file`); or "auto":
            the checkpoint's own, which are the chat template beside the tokenizer and what it was trained in before, if
            that was for such items; else the usual one.
        kind: "single_turn" or "dialogue".
        tokenizer: the model's.

    Raises:
        UserError: there is none of that name, or it cannot write items of that kind.
    """
    if name == "auto" and tokenizer is not None:
        own = own_template(tokenizer.path.parent, tokenizer)
        if own is not None and (own.kind == kind or isinstance(own, ChatTemplate)):
            return own
    if is_template_file(name):
        return _checked_kind(template_from(Path(name), tokenizer), kind)
    if name == CHAT_TEMPLATE:
        if tokenizer is None:
            raise UserError("template chat_template stands beside a tokenizer", "give --tokenizer FOLDER")
        folder = tokenizer.path.parent
        if (found := _chat_template_of(folder, tokenizer)) is not None:
            return found
        raise UserError(
            f"{folder} has no chat template: neither {CHAT_TEMPLATE_FILE} nor one in {CONFIG_FILE}",
            f"give one of the shipped formats: {', '.join(TEMPLATES)}",
        )
    if name in CHAT_TEMPLATES and tokenizer is not None:
        return ChatTemplate(read_text(CHAT_TEMPLATES[name]), tokenizer, CHAT_TEMPLATES[name])
    return _checked_kind(get_template(_AUTO[kind] if name == "auto" else name, tokenizer), kind)


def _checked_kind(template: Template, kind: str) -> Template:
    if kind == "dialogue" and template.kind == "single_turn":
        raise UserError(
            f"template {template.name!r} is for single-turn items, but these are dialogues",
            "use template: dialogue, or format: single_turn_llava for the first question and answer of each",
        )
    return template


def template_from(path: Path, tokenizer: Tokenizer | None) -> Template:
    """The prompt format of a file: a template.json, a chat template in jinja, or a tokenizer_config.json that has one.

    Raises:
        UserError: it cannot be read or used.
    """
    if path.suffix == ".json" and path.name != CONFIG_FILE:
        return Template.load(path)
    if tokenizer is None:
        raise UserError(f"{path} is a chat template, which needs a tokenizer", "give --tokenizer FOLDER")
    if path.name == CONFIG_FILE and (found := _setting_of(path, tokenizer)) is not None:
        return found
    return ChatTemplate(read_text(path), tokenizer, path)


def _chat_template_of(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """A folder's chat template: a file, or a setting."""
    jinja = folder / CHAT_TEMPLATE_FILE
    if jinja.is_file():
        return ChatTemplate(read_text(jinja), tokenizer, jinja)
    return _setting_of(folder / CONFIG_FILE, tokenizer)


def _setting_of(config: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template in a tokenizer's settings, a text or a list of named ones ("default" for chat)."""
    settings = read_json(config) if config.is_file() else None
    source = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[-1].get("template") if named else None
    return ChatTemplate(source, tokenizer, config) if isinstance(source, str) else None
