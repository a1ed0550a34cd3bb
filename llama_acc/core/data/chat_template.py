"""Hugging Face's chat templates, and which prompt format a name, a file or a checkpoint's folder stands for."""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import PrivateAttr

from llama_acc.core.data.chat_rendering import REASONING_FIELDS, Chat, Limits, RenderedChat, Replies, render
from llama_acc.core.data.templates import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    TEMPLATE_FILE,
    TEMPLATES,
    TURN_ENDS,
    USUAL,
    Rendered,
    Template,
    Tools,
    Turn,
    get_template,
    is_template_file,
    special_texts,
    weights_of,
)
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_json, read_text
from llama_acc.core.tokenizer import Tokenizer
from llama_acc.core.tokenizer_folder import CHAT_TEMPLATE_FILE, CONFIG_FILE, TOKEN_NAMES, token_text

# Noncharacters, which no text may hold in interchange; two that are not in the text at hand mark special tokens.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


_ROLES = {"human": "user"}


class Talk(NamedTuple):
    """A dialogue to be written."""

    turns: Sequence[Turn]
    system: str | None = None
    tools: Tools = ()


class ChatTemplate(Template):
    """A Hugging Face chat template: a format that its jinja text renders, with the special tokens in it."""

    path: Path  # where it came from
    source: str  # the jinja text
    variables: dict[str, str]  # the special tokens that it is given, by name
    _limits: Limits = PrivateAttr()
    _special_texts: list[str] = PrivateAttr()
    _special: re.Pattern[str] = PrivateAttr()
    _ends: list[list[str]] = PrivateAttr()

    def __init__(self, source: str, tokenizer: Tokenizer, path: Path, limits: Limits = Limits()) -> None:  # noqa: B008
        """Of the Jinja text `source`, from `path`; it writes the tokenizer's special tokens."""
        stop = tuple(mark for mark in TURN_ENDS if mark in source)
        name = path.stem if path in CHAT_TEMPLATES.values() else CHAT_TEMPLATE
        variables = _special_tokens(tokenizer.path.parent / CONFIG_FILE, tokenizer)
        own: dict[str, Any] = {"path": path, "source": source, "variables": variables}
        super().__init__(name=name, kind="dialogue", bos=False, eos=False, stop=stop, **own)
        self._limits = limits
        self._special_texts = special_texts(tokenizer)
        self._special = re.compile("|".join(map(re.escape, self._special_texts)))
        first = {tokenizer.eos_id, *tokenizer.settings.end_ids}
        self._ends = [[tokenizer.piece(token) for token in sorted(ends)] for ends in (first, tokenizer.end_ids)]
        self._rendered([], None)

    def render_prompt(self, history: Sequence[Turn], system: str | None = None, tools: Tools = ()) -> Rendered:
        """Render the text up to where the model is to answer.

        Raises:
            UserError: the template refuses these turns, or leaves out the tools.
        """
        [prompt] = self._rendered([Talk(history, system, tools)], None)
        assert not isinstance(prompt, str)
        return prompt[0]

    def marks(self, tokenizer: Tokenizer | None) -> list[str]:
        """The stop strings that are text for the tokenizer; what else looks like a turn is not known."""
        return self.text_stops(tokenizer)

    @property
    def shown(self) -> str:
        return f"the chat template in {self.path}" if self.name == CHAT_TEMPLATE else self.name

    def to_json(self) -> str:
        """All that decides what it renders."""
        return json.dumps([self.source, self.variables])

    def dialogue_texts(self, dialogues: Sequence[Talk]) -> list[list[Rendered] | str]:
        """Render whole dialogues; trained is what the model has to write: see `chat_rendering.render`.

        Each is one text, or, where the template writes earlier turns otherwise than the last one, one for each reply;
        or a text that says why the template cannot write it.
        """
        wanted = [
            [number + (talk.system is not None) for number, turn in enumerate(talk.turns) if turn.is_label]
            for talk in dialogues
        ]
        return self._rendered(dialogues, Replies(wanted, self._special_texts, self._ends))

    def _rendered(self, dialogues: Sequence[Talk], replies: Replies | None) -> list[list[Rendered] | str]:
        """The texts of dialogues, or of prompts.

        Special tokens in own texts are put between marks, by which they are found again in what is rendered.
        """
        chats = [Chat(self._messages(talk), talk.tools) for talk in dialogues]
        texts = json.dumps(chats, ensure_ascii=False)
        begin, end, *_ = [mark for mark in _MARKS if mark not in texts]
        chats = _with_texts(chats, lambda text: self._special.sub(rf"{begin}\g<0>{end}", text))
        found = render(self.source, chats, self.variables, replies, self.path, self._limits)
        return [
            texts if isinstance(texts, str) else [_unmarked(text, begin, end, talk) for text in texts]
            for texts, talk in zip(found, dialogues, strict=True)
        ]

    def _messages(self, talk: Talk) -> list[dict[str, Any]]:
        """A dialogue as transformers has it; reasoning that the template does not look for stands in the text."""
        field = next((field for field in REASONING_FIELDS if field in self.source), None)
        messages = [] if talk.system is None else [{"role": "system", "content": talk.system}]
        for turn in talk.turns:
            message = {"role": _ROLES.get(turn.role, turn.role), "content": turn.text, **turn.more}
            if (reasoning := message.pop("reasoning_content", None)) is not None:
                message |= {"content": turn.whole_text} if field is None else {field: reasoning}
            messages.append(message)
        return messages


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _with_texts(part, change) for key, part in value.items()}
    return [_with_texts(part, change) for part in value] if isinstance(value, (list, tuple)) else value


def _unmarked(chat: RenderedChat, begin: str, end: str, talk: Talk) -> Rendered:
    """A rendered text without the marks. The character at each mark's inner side is own text, which is enough to keep
    the tokenizer from the special token there, even if the template has cut the text between two marks."""
    marked, blocks = chat
    marks = [match.start() for match in re.finditer(f"[{begin}{end}]", marked)]
    text = marked.replace(begin, "").replace(end, "")
    inner = {mark - number - (marked[mark] == end) for number, mark in enumerate(marks)}
    generated = [(first - bisect_left(marks, first), last - bisect_left(marks, last)) for first, last, _ in blocks]
    own = [(place, place + 1) for place in sorted(inner) if 0 <= place < len(text)]
    weights = weights_of([talk.turns[number - (talk.system is not None)] for *_, number in blocks])
    return Rendered(text, own, generated, weights=weights)


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


def own_template(folder: Path, tokenizer: Tokenizer) -> Template | None:
    """The format a checkpoint has of its own: `template.json`, in which it was trained, else its chat template."""
    if (folder / TEMPLATE_FILE).is_file():
        return Template.load(folder / TEMPLATE_FILE)
    return _chat_template_of(folder, tokenizer)


def template_of_folder(folder: Path, tokenizer: Tokenizer) -> tuple[Template, str]:
    """A checkpoint's own format, else the bare instruction; and where that is known from, for showing."""
    own = own_template(folder, tokenizer)
    if own is None:
        return get_template("none", tokenizer), f"none, as the folder has no {TEMPLATE_FILE} and no chat template"
    if isinstance(own, ChatTemplate):
        return own, f"the chat template, from {own.path.name}"
    return own, f"{own.name}, from {TEMPLATE_FILE}"


def template_for(name: str, kind: str, tokenizer: Tokenizer | None = None) -> Template:
    """A prompt format for items of a kind: "single_turn", "dialogue" or "text", which is written in no format.

    `name` is that of a shipped one; `chat_template`, the one beside the tokenizer; a file (`is_template_file`); or
    "auto": the checkpoint's own, which are the chat template beside the tokenizer and what it was trained in before, if
    that was for such items; else the usual one.

    Raises:
        UserError: there is none of that name, or it cannot write items of that kind.
    """
    if kind == "text":
        return get_template("none", tokenizer)
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
        template = ChatTemplate(read_text(CHAT_TEMPLATES[name]), tokenizer, CHAT_TEMPLATES[name])
        if (note := end_note(template, tokenizer)) is not None:
            raise UserError(note, f"take the checkpoint's own (auto), or one of: {', '.join(TEMPLATES)}")
        return template
    return _checked_kind(get_template(USUAL[kind] if name == "auto" else name, tokenizer), kind)


def end_note(template: Template, tokenizer: Tokenizer) -> str | None:
    """What a user should know of a format that ends turns with a token that the tokenizer does not have."""
    ends = [mark for mark in template.stop if mark in TURN_ENDS]
    if not ends or any(map(tokenizer.is_special, ends)):
        return None
    what = template.shown if template.name == CHAT_TEMPLATE else f"template {template.name}"
    return f"{what} ends a turn with {ends[0]}, which is no special token of {tokenizer.path}"


def _checked_kind(template: Template, kind: str) -> Template:
    if kind == "dialogue" and template.kind == "single_turn":
        raise UserError(
            f"template {template.name!r} is for single-turn items, but these are dialogues",
            "use template: dialogue, or format: single_turn_llava for the first question and answer of each",
        )
    return template


def template_from(path: Path, tokenizer: Tokenizer | None) -> Template:
    """The prompt format of a file: a template.json, a chat template in jinja or a tokenizer_config.json with one."""
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
