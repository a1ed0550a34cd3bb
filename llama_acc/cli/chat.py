"""`llama-acc chat`: one answer for a script, or a conversation."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llama_acc.cli import console, options, stopping
from llama_acc.cli.loading import ModelOptions, launch_model, load_distributed
from llama_acc.core.atomic import write_text_whole
from llama_acc.core.distributed import environment
from llama_acc.core.errors import UserError
from llama_acc.core.text import count_text, escape_control_chars

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llama_acc.core.generate.load import LoadedModel
    from llama_acc.core.generate.sampling import Sampling


COMMANDS = """/reset          forget the conversation
/image FILE     show it a picture; the next line asks about it
/system TEXT    set the system text (without TEXT: show it)
/save FILE      write the conversation to a JSON file
/help           this list
/quit           leave (also Ctrl-D)
Enter sends; Alt-Enter begins a new line; a pasted text keeps its lines"""

Show = Callable[[Iterable[str]], None]


def chat(
    ckpt: options.Checkpoints,
    prompt: Annotated[
        str | None, Option(metavar="TEXT|-", help="Print the answer to this alone; - reads standard input.")
    ] = None,
    image: Annotated[list[str] | None, Option(metavar="FILE", help="Ask about this picture; may repeat.")] = None,
    template: options.Template = "auto",
    system: Annotated[str | None, Option(metavar="TEXT", help="System text in place of the template's own.")] = None,
    context: options.Context = None,
    max_new_tokens: Annotated[int, Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens of this total probability.")] = 0.9,
    plain: Annotated[bool, Option("--plain", help="On a terminal, show answers as they are, not as Markdown.")] = False,
    seed: Annotated[int | None, Option(help="The same seed gives the same answers.")] = None,
    tokenizer: options.TokenizerFile = None,
    quantize: options.Quantize = None,
    device: options.Device = None,
    verify: options.Verify = False,
    nproc: options.Nproc = None,
) -> None:
    """Chat with a model. A run's folder means its latest checkpoint.

    Examples:

      llama-acc chat --ckpt runs/alpaca

      llama-acc chat --ckpt runs/alpaca --prompt "Name three colors." --temperature 0

      cat question.txt | llama-acc chat --ckpt runs/alpaca --prompt -

      llama-acc chat --ckpt runs/sharegpt-70b --nproc 4

      llama-acc chat --ckpt Llama-2-70b --ckpt runs/alpaca-70b-biasnorm-nf4
    """
    from llama_acc.core.generate.sampling import Sampling

    sampling = Sampling(temperature, top_p, seed, max_new_tokens)
    if image and prompt is None:
        raise UserError("--image goes with --prompt", "in a conversation, type /image FILE")
    launch_model(nproc, device, ckpt)
    with load_distributed(ModelOptions(ckpt, device, tokenizer, template, verify, quantize, context)) as loaded:
        if environment.is_main():
            _Chat(loaded, sampling, system, plain).run(prompt, image or [])


class _Chat:
    """A conversation with a loaded model, of one question or of as many as are typed.

    `files` are the pictures in view, `waiting` those that the next question brings.
    """

    def __init__(self, loaded: "LoadedModel", sampling: "Sampling", system: str | None, plain: bool) -> None:
        from llama_acc.core.generate.chat import Conversation

        self.loaded = loaded
        self.conversation: Conversation = Conversation(loaded, sampling)
        self.conversation.system = system
        self.files: list[str] = []
        self.waiting: list[tuple[str, NDArray[np.uint8]]] = []
        self.show: Show = console.stream
        # As Markdown on a terminal, unless a model without a prompt format continues a text.
        if not (plain or loaded.template.name == "none" or console.out.is_dumb_terminal) and sys.stdout.isatty():
            from llama_acc.cli.chat_terminal import stream_markdown

            self.show = stream_markdown

    def run(self, prompt: str | None, images: Sequence[str]) -> None:
        """Answers a prompt, or what is typed until its end."""
        from llama_acc.core.tokenizer import tokenizer_notes

        for note in tokenizer_notes(self.loaded.tokenizer, self.loaded.model.config.vocab_size):
            console.note(note)
        if prompt is not None:
            question = _decoded(sys.stdin.read) if prompt == "-" else prompt
            self.show(self.conversation.ask(question, [self._pixels(image) for image in images]))
            return
        read = self._reader()
        while True:
            try:
                question = read().strip()
            except EOFError:
                return
            if question in ("/quit", "/exit"):
                return
            try:
                if question.startswith("/") and "\n" not in question:
                    self._command(question)
                elif question:
                    self._answer(question)
            except UserError as error:
                console.error(error.message, error.hint)

    def _reader(self) -> Callable[[], str]:
        from llama_acc.core.data.templates import answer_ends

        template = self.loaded.template
        if not sys.stdin.isatty():
            return _read_line
        console.note(f"template: {template.name} ({self.loaded.template_from}). /help lists what else you can type.")
        ends = map(escape_control_chars, answer_ends(template, self.loaded.tokenizer))
        console.note(f"an answer ends at {', '.join(ends)}")
        if template.kind == "single_turn":
            console.note("this format was trained on single questions: each one stands alone, without the history")
        if console.out.is_dumb_terminal:
            return _read_line
        from llama_acc.cli.chat_terminal import question_reader

        return question_reader()

    def _pixels(self, path: str) -> "NDArray[np.uint8]":
        from llama_acc.core.generate.caption import load_image

        return load_image(self.loaded, str(Path(path).expanduser()), path)

    def _answer(self, question: str) -> None:
        try:
            waiting, self.waiting = self.waiting, []
            pieces = self.conversation.ask(question, [pixels for _, pixels in waiting])
            self.files += [file for file, _ in waiting]
            if self.conversation.dropped_turns:
                forgotten = count_text(self.conversation.dropped_turns, "oldest turn")
                console.note(f"the conversation is long: forgot its {forgotten}")
            self.show(pieces)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            if environment.world_size() > 1:
                raise  # the ranks no longer stand at the same place
            stopping.forget()
            console.note("answer cut short; Ctrl-C again at the prompt to leave")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.conversation.reset()
            self.files, self.waiting = [], []
            console.note("forgotten")
        elif name == "/image":
            self._show_picture(rest)
        elif name == "/system":
            self.conversation.system = system = rest or self.conversation.system
            system = getattr(self.loaded.template, "system", None) if system is None else system
            console.note(f"system: {system}" if system else "there is no system text")
        elif name == "/save":
            self._save(rest)
        else:
            if name != "/help":
                console.error(f"there is no {name}")
            console.note(COMMANDS)

    def _show_picture(self, path: str) -> None:
        if not path:
            raise UserError("which picture? /image FILE")
        pixels = self._pixels(path)
        if self.loaded.template.kind == "single_turn" and (self.files or self.waiting):
            self.conversation.images, self.files, self.waiting = [], [], []
            console.note("it takes the place of the picture before: in this format each question stands alone")
        self.waiting.append((str(Path(path).expanduser().absolute()), pixels))
        console.note(f"{path}: ask about it")

    def _save(self, name: str) -> None:
        """Writes the conversation as a data file of one dialogue."""
        turns = self.conversation.turns
        if not name or not turns:
            raise UserError("there is nothing to save yet" if name else "to which file? /save FILE")
        item = self.conversation.to_item(self.files)
        try:
            write_text_whole(Path(name).expanduser(), json.dumps([item], indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {name}: {error.strerror}") from error
        console.note(f"wrote {count_text(len(turns), 'turn')} to {name}")


def _read_line() -> str:
    """A line of standard input, after a prompt where a person types it.

    Raises:
        EOFError: there are no more.
    """
    shown = "> " if sys.stdin.isatty() else ""
    if not sys.stdout.isatty():  # input() would print it among the answers
        sys.stderr.write(shown)
        sys.stderr.flush()
        shown = ""
    return _decoded(lambda: input(shown))


def _decoded(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} text: byte {error.start} cannot be decoded") from None
