"""A page to talk to a model, or to two side by side. Each tab of a browser has conversations of its own; all of them
share the models' engines.
"""

import html
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import gradio as gr

from llama_acc.core.errors import LlamaAccError, UserError
from llama_acc.core.generate.caption import load_image
from llama_acc.core.generate.chat import Conversation, ShownToken
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.sampling import Sampler, Sampling
from llama_acc.core.generate.service import Service
from llama_acc.core.text import count_text, escape_control_chars
from llama_acc.core.web.site import in_html

_ALTERNATIVES = 5  # of each token of an answer, so many of the likeliest are shown
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_DOWNLOAD = """items => {
    const text = JSON.stringify(items, null, 1) + "\\n", link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    if (items.length) link.click();
}"""


class Served(NamedTuple):
    """A model to talk to, and the service of its engine."""

    name: str
    loaded: LoadedModel
    service: Service


@dataclass
class _Tab:
    """What a tab of a browser has: a conversation with each model.

    `pictures` are paths, each with the number of the turn that it came with. `answering` is held by what is answered,
    which ends when `stop` is set.
    """

    conversations: list[Conversation]
    pictures: list[tuple[int, str]] = field(default_factory=list)
    answering: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)


class ChatPage:
    """The page, and what its components do; what an answer changes is listed in `_outputs`."""

    def __init__(self, models: Sequence[Served], sampling: Sampling, system: str | None = None) -> None:
        """Sampling and system text are the settings that a tab begins with; see `Conversation`."""
        self._models, self._sampling = models, sampling
        self._tabs: dict[str, _Tab] = {}
        self.blocks = gr.Blocks(title="llama-acc chat", analytics_enabled=False, fill_height=True)
        with self.blocks:
            with gr.Row():
                self._chats = [_chat(served) for served in models]
            seeing = all(served.loaded.vision is not None for served in models)
            self._box = gr.MultimodalTextbox(
                placeholder="Ask about pictures, or anything" if seeing else "Ask",
                show_label=False,
                sources=["upload"] if seeing else [],
                file_types=["image"],
                file_count="multiple",
                autofocus=True,
                elem_id="question",
            )
            with gr.Row():
                clear = gr.Button("New conversation", size="sm", min_width=120)
                save = gr.Button("Save as data file", size="sm", min_width=120)
            saved = gr.JSON(visible=False)
            with gr.Accordion("Settings", open=False):
                self._settings = _settings(models[0].loaded, sampling, system)
            with gr.Accordion("Tokens: what the model was fed, and what it wrote", open=False), gr.Row():
                tokens = []
                for _ in models:
                    with gr.Column(min_width=280):
                        tokens.append(gr.HTML())
        self._outputs = [self._box, *(part for side in zip(self._chats, tokens, strict=True) for part in side)]
        self._connect(clear, save, saved)

    def _connect(self, clear: gr.Button, save: gr.Button, saved: gr.JSON) -> None:
        many = {"concurrency_limit": None, "show_progress": "hidden", "outputs": self._outputs}
        with self.blocks:
            self._box.submit(self._ask, [self._box, *self._settings], **many)
            self._box.stop(self._stop, queue=False)
            for side, chat in enumerate(self._chats):
                chat.retry(self._retry, self._settings, **many)
                chat.edit(self._edit, [gr.State(side), *self._settings], **many)
                chat.clear(self._clear, **many)
            clear.click(self._clear, **many)
            save.click(self._save, outputs=saved, show_progress="hidden").then(None, saved, js=_DOWNLOAD)
            self.blocks.unload(self._leave)

    def _tab(self, request: gr.Request) -> _Tab:
        made = _Tab([Conversation(loaded, self._sampling, service) for _, loaded, service in self._models])
        return self._tabs.setdefault(request.session_hash or "", made)

    # Gradio gives what its type asks for, in its place; the values of components stand behind it.

    def _ask(self, request: gr.Request, question: dict[str, Any], *settings: Any) -> Iterator[list[Any]]:
        tab, files = self._tab(request), [str(file) for file in question["files"]]

        def ask(conversation: Conversation) -> Iterator[str]:
            images = [load_image(conversation.loaded, file, "the picture") for file in files]
            if files and conversation.loaded.template.kind == "single_turn":
                conversation.images, tab.pictures = [], []  # each question stands alone
            return conversation.ask(question["text"].strip(), images)

        if question["text"].strip() or files:
            yield from self._answers(tab, settings, ask, files=files)

    def _retry(self, request: gr.Request, *settings: Any) -> Iterator[list[Any]]:
        yield from self._answers(self._tab(request), settings, Conversation.retry)

    def _edit(self, request: gr.Request, edited: gr.EditData, side: int, *settings: Any) -> Iterator[list[Any]]:
        """All conversations go on from an edited question; it is told by how many turns follow it."""
        tab = self._tab(request)
        shown = _messages(tab.conversations[side], tab.pictures)
        follow = sum(isinstance(message["content"], str) for message in shown[edited.index :])

        def ask(conversation: Conversation) -> Iterator[str]:
            place = len(conversation.turns) - follow
            tab.pictures = [(turn, file) for turn, file in tab.pictures if turn <= place]
            conversation.turns = conversation.turns[:place]
            conversation.images = conversation.images[: len(tab.pictures)]
            return conversation.ask(_outside_code(html.unescape, edited.value))

        yield from self._answers(tab, settings, ask)

    def _answers(
        self,
        tab: _Tab,
        settings: Sequence[Any],
        start: Callable[[Conversation], Iterator[str]],
        files: Sequence[str] = (),
    ) -> Iterator[list[Any]]:
        """What a tab shows while its conversations are answered; what was answered before ends."""
        tab.stop.set()
        with tab.answering:
            tab.stop.clear()
            before = [(one.turns, one.images) for one in tab.conversations], tab.pictures
            try:
                sampling, system = self._chosen(settings)
                for conversation in tab.conversations:
                    if conversation.sampler.sampling != sampling:
                        conversation.sampler = Sampler(sampling)
                    conversation.system = system
                answers = [start(conversation) for conversation in tab.conversations]
            except UserError as error:
                for conversation, (turns, images) in zip(tab.conversations, before[0], strict=True):
                    conversation.turns, conversation.images = turns, images
                tab.pictures = before[1]
                gr.Warning(_text_of(error), title="Not asked")
                yield [gr.skip(), *_shown(tab)]
                return
            dropped = max(conversation.dropped_turns for conversation in tab.conversations)
            if dropped:
                gr.Info(f"The conversation is long: forgot its {count_text(dropped, 'oldest turn')}.")
            kept = [(max(0, place - dropped), file) for place, file in tab.pictures]
            tab.pictures = [*kept, *((len(tab.conversations[0].turns) - 1, file) for file in files)]
            yield from self._streamed(tab, answers)

    def _streamed(self, tab: _Tab, answers: Sequence[Iterator[str]]) -> Iterator[list[Any]]:
        texts = [""] * len(answers)
        try:
            # The first token may take long: the question is shown, and can be stopped, before.
            yield [gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True), *_shown(tab, texts)]
            # Engines do not wait for each other, only what is shown of them.
            for pieces in zip_longest(*answers, fillvalue=""):
                texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
                yield [gr.skip(), *_shown(tab, texts)]
                if tab.stop.is_set():
                    break
        except LlamaAccError as error:
            gr.Warning(_text_of(error), title="The answer has ended")
        finally:
            for answer in answers:
                answer.close()  # type: ignore[attr-defined]  # a generator
        yield [gr.MultimodalTextbox(submit_btn=True, stop_btn=False), *_shown(tab)]

    def _chosen(self, settings: Sequence[Any]) -> tuple[Sampling, str | None]:
        system, temperature, top_p, top_k, min_p, penalty, most, seed = settings
        return replace(
            self._sampling,
            temperature=temperature,
            top_p=top_p,
            top_k=int(top_k or 0),
            min_p=min_p,
            repetition_penalty=penalty,
            max_new_tokens=int(most or 0),
            seed=None if seed is None else int(seed),
            logprobs=_ALTERNATIVES,
        ), system or None

    def _stop(self, request: gr.Request) -> None:
        self._tab(request).stop.set()

    def _clear(self, request: gr.Request) -> list[Any]:
        tab = self._tab(request)
        tab.stop.set()
        with tab.answering:
            for conversation in tab.conversations:
                conversation.reset()
            tab.pictures = []
            return [gr.MultimodalTextbox(value=None, submit_btn=True, stop_btn=False), *_shown(tab)]

    def _save(self, request: gr.Request) -> list[dict[str, Any]]:
        """The conversations as items of a data file."""
        tab = self._tab(request)
        files = [file for _, file in tab.pictures]
        items = [conversation.to_item(files) for conversation in tab.conversations if conversation.turns]
        if not items:
            gr.Warning("There is nothing to save yet.")
        return items

    def _leave(self, request: gr.Request) -> None:
        if (tab := self._tabs.pop(request.session_hash or "", None)) is not None:
            tab.stop.set()


def _chat(served: Served) -> gr.Chatbot:
    loaded = served.loaded
    about = f"Prompt format: {loaded.template.name} ({loaded.template_from})"
    if loaded.template.kind == "single_turn":
        about += "\n\nIt was trained on single questions: each one stands alone, without the history."
    return gr.Chatbot(
        label=served.name,
        placeholder=_outside_code(_escaped, about),
        height="calc(100dvh - 17rem)",
        min_height="18rem",
        min_width=280,
        editable="user",
        group_consecutive_messages=False,  # a question is not edited together with its pictures
        buttons=["copy"],
        feedback_options=None,
        render_markdown=loaded.template.name != "none",
        latex_delimiters=[],
    )


def _settings(loaded: LoadedModel, sampling: Sampling, system: str | None) -> list[gr.components.Component]:
    own = getattr(loaded.template, "system", None) or "none"
    info = "Empty: the prompt format's own."
    with gr.Row():
        asked = gr.Textbox(system or "", label="System text", info=info, placeholder=own, lines=3, min_width=280)
    with gr.Row():
        drawn = [
            gr.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature", info="0 takes the likeliest token."),
            gr.Slider(0.01, 1, sampling.top_p, step=0.01, label="Top-p", info="Draw from the likeliest of this total."),
            gr.Slider(0, 200, sampling.top_k, step=1, label="Top-k", info="Draw from so many; 0: from all."),
            gr.Slider(0, 1, sampling.min_p, step=0.01, label="Min-p", info="At least this part of the likeliest."),
        ]
    with gr.Row():
        return [
            asked,
            *drawn,
            gr.Slider(0.5, 2, sampling.repetition_penalty, step=0.05, label="Repetition penalty", info="1 is none."),
            gr.Number(sampling.max_new_tokens, precision=0, minimum=1, label="Most tokens", info="Of an answer."),
            gr.Number(sampling.seed, precision=0, label="Seed", info="The same one gives the same answers."),
        ]


def _shown(tab: _Tab, so_far: Sequence[str] | None = None) -> list[Any]:
    """Messages and tokens of each conversation; while its answer is under way, and is so far this, the messages."""
    shown: list[Any] = []
    for place, conversation in enumerate(tab.conversations):
        shown.append(_messages(conversation, tab.pictures, "" if so_far is None else so_far[place]))
        piece = conversation.loaded.tokenizer.piece
        shown.append(tokens_html(conversation.token_view(), piece) if so_far is None else gr.skip())
    return shown


def _messages(
    conversation: Conversation, pictures: Sequence[tuple[int, str]], so_far: str = ""
) -> list[dict[str, Any]]:
    """A conversation for display, each picture before the question that it came with, and an answer under way."""
    turns, messages = conversation.turns, list[dict[str, Any]]()
    for place, turn in enumerate(turns):
        messages += [{"role": "user", "content": {"path": file}} for at, file in pictures if at == place]
        messages.append(_message("user" if turn.role == "human" else "assistant", turn.text))
    return [*messages, _message("assistant", so_far)] if so_far and turns[-1].role == "human" else messages


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": _outside_code(_escaped, text)}


def _escaped(text: str) -> str:
    return html.escape(escape_control_chars(text), quote=False)


def _outside_code(change: Callable[[str], str], text: str) -> str:
    """Markdown in which tags are text; in code they are anyway."""
    parts = _CODE.split(text)
    return "".join(part if place % 2 else change(part) for place, part in enumerate(parts))


def _text_of(error: LlamaAccError) -> str:
    return html.escape(f"{error.message}: {error.hint}" if error.hint else error.message)


def tokens_html(tokens: Sequence[ShownToken], piece: Callable[[int], str]) -> str:
    """Tokens, of which the pointer shows ids and probabilities; `piece` is how the vocabulary writes a token."""
    return f'<div class="tokens">{"".join(_token_html(token, piece) for token in tokens)}</div>' if tokens else ""


def _token_html(token: ShownToken, piece: Callable[[int], str]) -> str:
    about, style = f"{token.piece!r}, id {token.token}", ""
    if token.logprobs is not None:
        probability = math.exp(token.logprobs.own)
        others = (f"{math.exp(log):6.1%}  {piece(other)!r}" for other, log in token.logprobs.top)
        about, style = "\n".join([f"{probability:.1%}  {about}", "", *others]), f' style="--p: {probability:.3f}"'
    kind = "special" if token.special else "reply" if token.is_reply else "fed"
    shown = (token.text or (token.piece if token.special else "")).replace("\n", "\u21b5\n")
    return f'<span class="{kind}" title="{in_html(about)}"{style}>{in_html(shown)}</span>'
