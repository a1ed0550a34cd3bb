"""The command line: one file per subcommand, and one place that turns an error into a line and an exit code."""

import errno
import functools
import inspect
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperCommand, TyperGroup

from llama_acc import __version__
from llama_acc.cli import stopping
from llama_acc.core.distributed import environment
from llama_acc.core.errors import LlamaAccError
from llama_acc.core.interrupt import EXIT_CODES
from llama_acc.core.text import escape_control_chars

HELP = """Fine-tune LLaMA models: from a checkpoint and a data file to a model you can talk to.

Examples (nothing to download, one minute on a CPU):

  llama-acc finetune --recipe quickstart --output runs/quickstart

  llama-acc chat --ckpt runs/quickstart
"""
# No disk or race makes these: what was typed can be no file's name.
_IMPOSSIBLE_NAMES = {
    errno.ENAMETOOLONG: "a name may have 255 bytes: give a shorter one",
    errno.ENOTDIR: "it leads through a file as if that were a folder: give another path",
    errno.ELOOP: "links there lead in a circle: give another path",
    errno.EISDIR: "it is a folder, and should be a file",
}


# Each one's module has its name, and is imported when it is asked for: help needs no more than this.
_COMMANDS = {
    "download": "Download models and data: by a name of the catalogue, or by an address.",
    "finetune": "Fine-tune a model as a recipe says.",
    "runs": "List runs: what they train, how far they are, and whether they are running; the newest first.",
    "chat": "Chat with a model. A run's folder means its latest checkpoint.",
    "caption": "Generate captions for images. A run's folder means its latest checkpoint.",
    "serve": "Serve a model to programs that speak OpenAI's protocol (extra: serve).",
    "benchmark-vram": "Predict the memory of a run, part by part, without a GPU; measure it; find what fits.",
    "convert-checkpoint": "Convert a checkpoint between Meta's layout, LLaMA2-Accessory's (consolidated) and Hugging "
    "Face's; merge what\nwas tuned, write it for PEFT, or for llama.cpp and Ollama (gguf), or quantize a base.",
    "push": "Push a model to Hugging Face, with a model card: an adapter as PEFT has it, or a whole model.",
    "convert-data": "Convert data to what `finetune` takes, and check it.",
    "evaluate": "Measure a checkpoint: lm-evaluation-harness's tasks, Gorilla's API calls, or perplexity on data of "
    "yours.",
    "recipes": "Recipes: everything a run is, in one YAML file.",
}
_JOINS = ("finetune", "chat", "caption", "serve", "lm_eval")


class Commands(TyperGroup):
    """The commands, by what is said of them in the list; which of them is run is imported."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=text) for name, text in _COMMANDS.items()}

    def get_params(self, context: Any) -> list[Any]:
        params = super().get_params(context)
        for flag in params:
            flag.default = False  # of None, Typer would ask pydantic, which takes long to import, whether it is one
        return params

    def resolve_command(self, context: Any, words: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(context, words)
        return name, command and load_command(command.name), rest


@functools.cache
def load_command(name: str) -> Any:
    """Imports a command, or a group of them."""
    function = name.replace("-", "_")
    module = import_module(f"llama_acc.cli.{function}")
    app = getattr(module, "app", None) or typer.Typer()
    for word, command in getattr(module, "SUBCOMMANDS", {name: getattr(module, function, None)}).items():
        app.command(word)(_reported(command))
    if hasattr(module, "default"):
        app.callback(invoke_without_command=True)(_reported(module.default))
    group = typer.main.get_group(app)
    group.name = name
    return group if hasattr(module, "app") else group.commands[name]


app = typer.Typer(
    name="llama-acc",
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llama-acc {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error. Also: LLAMA_ACC_DEBUG=1.")] = False,
) -> None:
    if debug:
        os.environ["LLAMA_ACC_DEBUG"] = "1"


def _reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a command so that what goes wrong ends in one clear message and the promised exit code.

    Unless it joins the processes started with it, it is alone, whatever stands in the environment.
    """
    from llama_acc.cli import console

    typed = inspect.signature(command).parameters

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        for name, value in kwargs.items():
            if (problem := _problem_of(name, value)) is not None:
                is_option = isinstance(typed[name].annotation.__metadata__[0], typer.models.OptionInfo)
                what = f"'--{name.replace('_', '-')}'" if is_option else "an argument"
                raise typer.BadParameter(problem, param_hint=what)
        try:
            with stopping.command():
                if command.__name__ not in _JOINS:
                    environment.stand_alone()
                elif environment.world_size() > 1:
                    environment.check_place()
                return command(*args, **kwargs)
        except typer.Exit:
            raise
        except BaseException as error:
            raise _exit_of(error) from None
        finally:
            console.working(None)

    return run


def _problem_of(name: str, value: Any) -> str | None:
    """What is wrong with any parameter: a number beyond any use, the empty text that an unset shell variable leaves."""
    if isinstance(value, int) and abs(value) >= 2**31 and name != "seed":
        return f"{value} is beyond any use"
    if "" in (value if isinstance(value, list) else [value]) and name not in ("prompt", "instruction", "system"):
        return "it is empty. Is a shell variable not set?"
    return None


def _exit_of(error: BaseException) -> BaseException:
    """Reports what ended a command; returns what ends the process with the right code."""
    from llama_acc.cli import console

    number = stopping.received(error)
    if number is not None:
        if environment.is_main() and environment.is_stopped_by_user():
            console.note(f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}")
        return typer.Exit(EXIT_CODES[number])
    if not isinstance(error, Exception):
        return error
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has seen enough; Python would complain once more when it flushes.
        console.discard(sys.stdout)
        return typer.Exit(0)
    if os.environ.get("LLAMA_ACC_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    message, hint, exit_code = _message_of(error)
    if not environment.record_exit(error, message, hint, exit_code) and _is_reported_here(error):
        several = environment.world_size() > 1
        console.error(f"rank {environment.rank()}: {message}" if several else message, hint)
    return typer.Exit(exit_code)


def _is_reported_here(error: Exception) -> bool:
    """Whether this process reports an error: what all ranks found is reported by the first of them; before they have
    joined, by the first one of each machine."""
    first = vars(error).get("failing_rank")
    if environment.world_size() == 1 or first is not None:
        return first is None or first == environment.rank()
    return environment.local_rank() == 0 or not isinstance(error, LlamaAccError)


def _message_of(error: Exception) -> tuple[str, str | None, int]:
    """Message, hint and exit code."""
    if isinstance(error, LlamaAccError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's
        return "this user has no home folder", "set LLAMA_ACC_HOME to a folder for downloads and the token cache", 1
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        impossible = _IMPOSSIBLE_NAMES.get(error.errno or 0)
        hint = impossible or "add --debug to see what was being done"
        return f"{where}{error.strerror}", hint, 1 if impossible is None else 2
    return f"{type(error).__name__}: {error}", "this is a fault of the program: add --debug to see where", 1


def main() -> None:
    """The command line; `__main__` is where it is entered."""
    stopping.watch()
    environment.kill_on_parent_exit()
    alone = environment.join_slurm()
    # Standard streams that were closed lead nowhere; what a terminal cannot show is shown as its code.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("llama_acc").addFilter(_escape)
    if alone is not None:
        print(f"note: {alone}", file=sys.stderr)
    # --debug is understood wherever it stands.
    if "--debug" in sys.argv[1:]:
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    if {"-h", "--help"}.intersection(sys.argv):
        _import_formatter()
    app()


def _import_formatter() -> None:
    """Imports what formats help, without two modules of rich that take a third of the time that `--help` takes, and
    serve settings of Typer that are not ours: help in Markdown, and errors with their source."""
    unused = "rich.markdown", "rich.traceback"
    for name in unused:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__getattr__ = lambda _: object  # type: ignore[method-assign]
    import_module("typer.rich_utils")
    for name in unused:
        del sys.modules[name]


def _escape(record: logging.LogRecord) -> bool:
    """Lets no file's name in a warning act on a terminal."""
    record.msg, record.args = escape_control_chars(record.getMessage()), ()
    return True
