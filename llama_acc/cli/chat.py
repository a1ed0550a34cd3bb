"""`llama-acc chat`: one answer for a script, or a conversation."""

import json
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llama_acc.cli import console, options, stopping, web
from llama_acc.cli.options import ModelOptions, check_alone, launch_model, load_beside, load_distributed
from llama_acc.core.atomic import write_text_whole
from llama_acc.core.distributed import environment
from llama_acc.core.errors import UserError
from llama_acc.core.text import count_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llama_acc.core.generate.chat import Conversation
    from llama_acc.core.generate.load import LoadedModel
    from llama_acc.core.generate.sampling import Sampling


# Lines that forty columns hold.
COMMANDS = """\
/retry         another answer
/edit [TEXT]   change the last question
/compare [DIR] let a second model answer
/tokens        what the model saw, wrote
/image FILE    show it a picture
/system [TEXT] set or show system text
/save FILE     save the conversation
/reset         forget the conversation
/help          this list
/quit          leave (or Ctrl-D)
Enter sends; Alt-Enter begins a line"""


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
    compare: Annotated[
        list[str] | None, Option(metavar="DIR", help="Show this checkpoint's answers, too; may repeat, as --ckpt.")
    ] = None,
    history: Annotated[
        Path | None, Option(metavar="FILE", help="On a terminal, keep questions here for the next time.")
    ] = None,
    as_page: web.Web = False,
    host: web.Host = web.HOST,
    port: web.Port = web.PORT,
    seed: Annotated[int | None, Option(help="The same seed gives the same answers.")] = None,
    tokenizer: options.TokenizerFile = None,
    quantize: options.Quantize = None,
    stream: options.Stream = False,
    device: options.Device = None,
    verify: options.Verify = False,
    nproc: options.Nproc = None,
) -> None:
    """Chat with a model. A run's folder means its latest checkpoint.

    Examples:

      llama-acc chat --ckpt runs/alpaca

      llama-acc chat --ckpt runs/alpaca --prompt "Name three colors." --temperature 0

      cat question.txt | llama-acc chat --ckpt runs/alpaca --prompt -

      llama-acc chat --ckpt runs/alpaca --compare Llama-2-7b

      llama-acc chat --ckpt runs/alpaca --web

      llama-acc chat --ckpt runs/sharegpt-70b --nproc 4

      llama-acc chat --ckpt Llama-2-70b --ckpt runs/alpaca-70b-biasnorm-nf4
    """
    from llama_acc.core.generate.sampling import Sampling

    sampling = Sampling(temperature, top_p, seed, max_new_tokens, logprobs=0)
    if image and prompt is None:
        raise UserError("--image goes with --prompt", "in a conversation, type /image FILE")
    if history is not None and (prompt is not None or not sys.stdin.isatty() or console.out.is_dumb_terminal):
        raise UserError("--history keeps what is typed on a terminal that can edit a line", "leave it out")
    if as_page and (prompt is not None or history is not None):
        raise UserError("--web goes without --prompt and --history", "type the question into the page")
    launch_model(nproc, device, ckpt)
    if compare:
        check_alone()
    listener = web.listen(host, port) if as_page and environment.is_main() else None
    model = ModelOptions(ckpt, device, tokenizer, template, verify, quantize, context, stream)
    with load_distributed(model) as loaded:
        if listener is not None:
            models = {ckpt[-1]: loaded}
            if compare:
                models[compare[-1]] = load_beside(loaded, compare, model)
            web.serve_chat(listener, models, sampling, system)
        elif environment.is_main():
            chat = _Chat(loaded, model, sampling, system, plain)
            if compare:
                chat.compare_with(compare)
            chat.run(prompt, image or [], history)


class _Chat:
    """A conversation with a loaded model, of one question or of as many as are typed."""

    def __init__(
        self, loaded: "LoadedModel", model: ModelOptions, sampling: "Sampling", system: str | None, plain: bool
    ) -> None:
        from llama_acc.core.generate.chat import Conversation

        self.loaded, self.model, self.sampling = loaded, model, sampling
        self.conversation = Conversation(loaded, sampling)
        self.conversation.system = system
        self.second: Conversation | None = None  # what answers beside it
        self.second_name = ""
        self.files: list[str] = []  # the pictures in view
        self.waiting: list[tuple[str, NDArray[np.uint8]]] = []  # those that the next question brings
        self.draft = ""  # the text that the next question begins as, which then takes the place of the last one
        # Ctrl-C at an answer is read as a key: as a signal it would end all processes that share the model.
        self.stops_by_key = False
        # As Markdown on a terminal, unless a model without a prompt format continues a text.
        self.plain = plain or loaded.template.name == "none" or console.out.is_dumb_terminal or not sys.stdout.isatty()

    def run(self, prompt: str | None, images: Sequence[str], history: Path | None) -> None:
        """Answers a prompt, or what is typed until its end."""
        from llama_acc.core.tokenizer import tokenizer_notes

        for note in tokenizer_notes(self.loaded.tokenizer, self.loaded.model.config.vocab_size):
            console.note(note)
        if prompt is not None:
            question = _decoded(sys.stdin.read) if prompt == "-" else prompt
            self._answer(self.conversation.ask(question, [self._pixels(image) for image in images]))
            return
        self.stops_by_key = environment.world_size() > 1 and sys.stdin.isatty()
        read = self._reader(history)
        while True:
            draft, self.draft = self.draft, ""
            try:
                question = read(draft).strip()
            except EOFError:
                return
            if question in ("/quit", "/exit"):
                return
            try:
                if question.startswith("/") and "\n" not in question:
                    self._command(question)
                elif question:
                    self._ask(question, replace_last=bool(draft))
            except UserError as error:
                console.error(error.message, error.hint)
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                if environment.world_size() > 1:
                    raise  # the ranks no longer stand at the same place
                stopping.forget()
                console.note("cut short; Ctrl-C again at the prompt to leave")

    def _reader(self, history: Path | None) -> Callable[[str], str]:
        from llama_acc.core.data.templates import answer_ends

        template = self.loaded.template
        if not sys.stdin.isatty():
            return _read_line
        console.note(f"template: {template.name} ({self.loaded.template_from}). /help lists what else you can type.")
        ends = (end.replace("\n", "\\n") for end in answer_ends(template, self.loaded.tokenizer))
        console.note(f"an answer ends at {', '.join(ends)}")
        if template.kind == "single_turn":
            console.note("this format was trained on single questions: each one stands alone, without the history")
        if console.out.is_dumb_terminal:
            return _read_line
        from llama_acc.cli.chat_terminal import question_reader

        return question_reader(lambda: _status(self.conversation), history)

    def _pixels(self, path: str) -> "NDArray[np.uint8]":
        from llama_acc.core.generate.caption import load_image

        return load_image(self.loaded, str(Path(path).expanduser()), path)

    def _ask(self, question: str, replace_last: bool = False) -> None:
        waiting, self.waiting = self.waiting, []
        answer = self.conversation.ask(question, [pixels for _, pixels in waiting], replace_last)
        self.files += [file for file, _ in waiting]
        self._answer(answer)

    def _answer(self, answer: Generator[str, None, None]) -> None:
        """Shows an answer, and the second model's to the same question."""
        if self.conversation.dropped_turns:
            forgotten = count_text(self.conversation.dropped_turns, "oldest turn")
            console.note(f"the conversation is long: forgot its {forgotten}")
        self._show(self.model.ckpt[-1], self.conversation, answer)
        if self.second is not None:
            self._show(self.second_name, self.second, self.second.answer_last_of(self.conversation))

    def _show(self, name: str, conversation: "Conversation", answer: Generator[str, None, None]) -> None:
        if self.second is not None:
            console.heading(name)
        if self.stops_by_key:
            from llama_acc.cli.chat_terminal import stop_by_key

            answer = stop_by_key(answer)
        if self.plain:
            console.stream(answer)
            return
        from llama_acc.cli.chat_terminal import stream_markdown

        stream_markdown(answer, lambda: _status(conversation))

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/retry":
                self._answer(self.conversation.retry())
            case "/edit" if rest:
                self._ask(rest, replace_last=True)
            case "/edit":
                self.draft = self.conversation.last_question
            case "/compare":
                self._compare(rest)
            case "/tokens":
                self._show_tokens()
            case "/image":
                self._show_picture(rest)
            case "/system":
                self.conversation.system = system = rest or self.conversation.system
                system = getattr(self.loaded.template, "system", None) if system is None else system
                console.note(f"system: {system}" if system else "there is no system text")
            case "/save":
                self._save(rest)
            case "/reset":
                self.conversation.reset()
                self.files, self.waiting = [], []
                console.note("forgotten")
            case _:
                if name != "/help":
                    console.error(f"there is no {name}")
                console.note(COMMANDS)

    def _compare(self, folder: str) -> None:
        if not folder:
            self.second = None
            console.note("no second model answers")
            return
        second = self.compare_with([folder])
        if self.conversation.turns:
            self._show(self.second_name, second, second.answer_last_of(self.conversation))

    def compare_with(self, folders: Sequence[str]) -> "Conversation":
        """Lets another checkpoint answer, too, from folders laid over each other."""
        from llama_acc.core.generate.chat import Conversation

        self.second = None  # its memory is needed
        loaded = load_beside(self.loaded, [str(Path(folder).expanduser()) for folder in folders], self.model)
        self.second, self.second_name = Conversation(loaded, self.sampling), folders[-1]
        return self.second

    def _show_tokens(self) -> None:
        both = (self.model.ckpt[-1], self.conversation), (self.second_name, self.second)
        answered = [(name, one) for name, one in both if one is not None and one.reply is not None]
        if not answered:
            raise UserError("there is no answer yet")
        for name, conversation in answered:
            console.heading(name)
            console.note(_status(conversation))
            console.show_tokens(conversation.token_view())

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


def _status(conversation: "Conversation") -> str:
    """How fast the last answer came, and how much of the context is used: at most 40 characters, most of the time."""
    reply, speed = conversation.reply, conversation.tokens_per_second
    used = 0 if reply is None else len(reply.prompt.tokens) + len(reply.tokens)
    fast = "" if speed is None else f"{speed:.1f} tokens/s, "
    return f"{fast}context {used:,} of {conversation.loaded.model.config.max_seq_len:,}"


def _read_line(draft: str) -> str:
    """A line of standard input, after a prompt where a person types it; EOFError at the end. A draft cannot be edited
    here, and is said."""
    if draft:
        console.note(f"the next line takes the place of: {draft}")
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
