"""`llama-acc chat`: one answer for a script, or a conversation."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_acc.cli import console, options, stopping
from llama_acc.cli.loading import Which, check_split, launch_ranks, shared_model
from llama_acc.core.distributed import Launch, environment
from llama_acc.core.errors import UserError
from llama_acc.core.units import count_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llama_acc.core.generate.chat import Conversation
    from llama_acc.core.generate.engine import Sampling
    from llama_acc.core.generate.load import LoadedModel

HELP = """Talk to a model. A run's folder means its latest checkpoint.

Examples:

  llama-acc chat --ckpt runs/alpaca

  llama-acc chat --ckpt runs/alpaca --prompt "Name three colours." --temperature 0

  cat question.txt | llama-acc chat --ckpt runs/alpaca --prompt -

  llama-acc chat --ckpt runs/sharegpt-70b --nproc 4

  llama-acc chat --ckpt Llama-2-70b --ckpt runs/alpaca-70b-biasnorm-nf4
"""

COMMANDS = """/reset          forget the conversation
/image FILE     show it a picture; the next line asks about it
/system TEXT    set the system text (without TEXT: show it)
/save FILE      write the conversation to a JSON file
/help           this list
/quit           leave (also Ctrl-D)
Enter sends; Alt-Enter begins a new line; a pasted text keeps its lines"""


Show = Callable[[Iterable[str]], None]


@dataclass
class _Pictures:
    """Pictures of a conversation: the files of those in view, and those that the next question brings."""

    files: list[str] = field(default_factory=list)
    waiting: "list[tuple[str, NDArray[np.uint8]]]" = field(default_factory=list)


def chat(
    ckpt: options.Checkpoints,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT|-", help="Print the answer to this alone; - reads standard input."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="Ask about this picture; may repeat.", callback=options.given),
    ] = None,
    template: options.Template = "auto",
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System text in place of the template's own.")
    ] = None,
    context: options.Context = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.7,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens of this total probability.")
    ] = 0.9,
    plain: Annotated[
        bool, typer.Option("--plain", help="On a terminal, show answers as they are, not as Markdown.")
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answers.")] = None,
    tokenizer: options.TokenizerFile = None,
    quant: options.Quantize = None,
    device: options.Device = None,
    verify: options.Verify = False,
    nproc: options.Nproc = None,
) -> None:
    """Talk to a model."""
    from llama_acc.core.generate.engine import Sampling

    sampling = Sampling(temperature, top_p, seed, max_new_tokens)
    if image and prompt is None:
        raise UserError("--image goes with --prompt", "in a conversation, type /image FILE")
    launch_ranks(Launch(nproc), device, lambda count: check_split(ckpt, count))
    with shared_model(Which(ckpt, device, tokenizer, template, verify, quant, context)) as loaded:
        if environment.is_main():
            _talk(loaded, sampling, prompt, image or [], system, plain)


def _talk(
    loaded: "LoadedModel",
    sampling: "Sampling",
    prompt: str | None,
    images: Sequence[str],
    system: str | None,
    plain: bool,
) -> None:
    from llama_acc.core.generate.chat import Conversation
    from llama_acc.core.tokenizer import tokenizer_notes

    for note in tokenizer_notes(loaded.tokenizer, loaded.model.config.vocab_size):
        console.note(note)
    conversation = Conversation(loaded, sampling)
    conversation.system = system
    if loaded.template_from.startswith("none, as"):
        console.note("the checkpoint keeps no prompt format: template none, the text is continued as it stands")
    show = _shower(loaded, plain)
    if prompt is None:
        _converse(conversation, loaded, show)
        return
    question = _standard_input() if prompt == "-" else prompt
    show(conversation.ask(question, [_pixels(loaded, image) for image in images]))


def _shower(loaded: "LoadedModel", plain: bool) -> Show:
    """What shows an answer: on a terminal as Markdown, unless a model without a prompt format continues a text."""
    if plain or loaded.template.name == "none" or console.out.is_dumb_terminal or not sys.stdout.isatty():
        return console.stream
    from llama_acc.cli.chat_terminal import stream_markdown

    return stream_markdown


def _pixels(loaded: "LoadedModel", path: str) -> "NDArray[np.uint8]":
    """A picture as the model takes it.

    Raises:
        UserError: there is none, or the model takes none.
    """
    from llama_acc.core.data.images import ImageError, ImageJob, pixels
    from llama_acc.core.generate.caption import evaluation_transform

    transform = evaluation_transform(loaded)
    try:
        return pixels(ImageJob(str(Path(path).expanduser()), transform))
    except ImageError as error:
        raise UserError(f"{path}: {error.message}") from error


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} text: byte {error.start} cannot be decoded") from None


def _converse(conversation: "Conversation", loaded: "LoadedModel", show: Show) -> None:
    read = _read_line
    if console.is_terminal():
        if not console.out.is_dumb_terminal:
            from llama_acc.cli.chat_terminal import question_reader

            read = question_reader()
        said = [f"template: {loaded.template.name} ({loaded.template_from}). /help lists what else you can type."]
        if loaded.template.kind == "single_turn":
            said.append("this format was trained on single questions: each one stands alone, without the history")
        for line in said:
            console.note(line, by_words=True)
    pictures = _Pictures()
    while True:
        try:
            question = read().strip()
        except EOFError:
            return
        if question.startswith("/") and "\n" not in question:
            if question.split()[0] in ("/quit", "/exit"):
                return
            _command(question, conversation, loaded, pictures)
        elif question:
            _answer(conversation, question, pictures, show)


def _read_line() -> str:
    """A line of standard input, after a prompt where a person types it.

    Raises:
        EOFError: there are no more.
    """
    shown = "> " if console.is_terminal() else ""
    if not sys.stdout.isatty():  # input() would print it among the answers
        sys.stderr.write(shown)
        sys.stderr.flush()
        shown = ""
    try:
        return input(shown)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} text: byte {error.start} cannot be decoded") from None


def _answer(conversation: "Conversation", question: str, pictures: _Pictures, show: Show) -> None:
    try:
        waiting, pictures.waiting = pictures.waiting, []
        pieces = conversation.ask(question, [pixels for _, pixels in waiting])
        pictures.files += [file for file, _ in waiting]
        if conversation.dropped_turns:
            forgotten = count_text(conversation.dropped_turns, "oldest turn")
            console.note(f"the conversation is long: forgot its {forgotten}")
        show(pieces)
    except UserError as error:
        console.error(error.message, error.hint)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        if environment.world_size() > 1:
            raise  # the ranks no longer stand at the same place
        stopping.forget()
        console.note("answer cut short; Ctrl-C again at the prompt to leave")


def _command(line: str, conversation: "Conversation", loaded: "LoadedModel", pictures: _Pictures) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.reset()
        pictures.files, pictures.waiting = [], []
        console.note("forgotten")
    elif name == "/image":
        _show_picture(rest, conversation, loaded, pictures)
    elif name == "/system":
        conversation.system = rest or conversation.system
        shown = conversation.system if conversation.system is not None else getattr(loaded.template, "system", None)
        console.note(f"system: {shown}" if shown else "there is no system text")
    elif name == "/save":
        _save(conversation, rest, pictures.files)
    else:
        if name != "/help":
            console.error(f"there is no {name}")
        console.note(COMMANDS)


def _show_picture(path: str, conversation: "Conversation", loaded: "LoadedModel", pictures: _Pictures) -> None:
    if not path:
        console.error("which picture? /image FILE")
        return
    try:
        pixels = _pixels(loaded, path)
    except UserError as error:
        console.error(error.message, error.hint)
        return
    if loaded.template.kind == "single_turn" and (pictures.files or pictures.waiting):
        conversation.images, pictures.files, pictures.waiting = [], [], []
        console.note("it takes the place of the picture before: in this format each question stands alone")
    pictures.waiting.append((str(Path(path).expanduser().absolute()), pixels))
    console.note(f"{path}: ask about it")


def _save(conversation: "Conversation", name: str, pictures: list[str]) -> None:
    """Writes the conversation as a data file of one dialogue."""
    if not name:
        console.error("to which file? /save FILE")
        return
    if not conversation.turns:
        console.error("there is nothing to save yet")
        return
    roles = {"human": "human", "assistant": "gpt"}
    turns = [{"from": roles[role], "value": text} for role, text, _ in conversation.turns]
    try:
        item: dict[str, object] = {"image": pictures} if pictures else {}
        item |= {} if conversation.system is None else {"system": conversation.system}
        item["conversations"] = turns
        text = json.dumps([item], indent=1, ensure_ascii=False)
        Path(name).expanduser().write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        console.error(f"cannot write {name}: {error.strerror}")
        return
    console.note(f"wrote {count_text(len(turns), 'turn')} to {name}")
