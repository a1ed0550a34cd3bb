"""Flags that several commands share, with their checks, and the model they mean, which several processes may share.

A wrong flag is reported as Typer reports any other.
"""

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Option

from llama_acc.cli import console
from llama_acc.core.distributed import Launch, environment, launch_if_asked
from llama_acc.core.errors import LlamaAccError, UserError

if TYPE_CHECKING:
    from llama_acc.core.generate.load import LoadedModel

_QUIET = 5.0  # seconds: a script that asks for one answer need not hear of it
_PATIENCE = timedelta(days=365)  # people think
of_processes = partial(Option, rich_help_panel="Several processes")


def matching(pattern: str, problem: str) -> Callable[[str | None], str | None]:
    """A callback that refuses what is not of a pattern; in `problem`, {} is what was typed."""

    def check(value: str | None) -> str | None:
        if value is not None and not re.fullmatch(pattern, value):
            raise typer.BadParameter(problem.format(repr(value)))
        return value

    return check


# Whether the device is there is found out when it is used.
device = matching(r"cpu|mps|cuda(:\d+)?", "{} is not one of: cuda, cuda:1 (another GPU), mps, cpu.")
nproc = matching(r"auto|0*[1-9]\d*", "{} is neither a number of processes nor auto.")
endpoint = matching(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", "{} is not HOST:PORT.")


def plot(path: Path | None) -> Path | None:
    """Refuses what no picture can be drawn into."""
    if path is not None and path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{path} is no PNG: name it like {path.with_suffix('.png')}")
    if path is not None and not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path}: there is no folder {path.parent}")
    return path


def known_template(name: str) -> str:
    """Refuses an unknown prompt format before a model is loaded."""
    from llama_acc.core.data.templates import CHAT_TEMPLATE, check_template, is_template_file

    if is_template_file(name):
        if not Path(name).is_file():
            raise typer.BadParameter(f"there is no file {name}.")
    elif name not in ("auto", CHAT_TEMPLATE):
        try:
            check_template(name)
        except UserError as error:
            raise typer.BadParameter(f"{error.message}: {error.hint}") from None
    return name


def check_writable(path: Path) -> None:
    """Refuses, with a UserError, a file in a folder that is not there."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}", f"mkdir -p {path.parent}")


Checkpoints = Annotated[
    list[str], Option("--ckpt", metavar="DIR", help="Checkpoint or run folder; may repeat: a later one overrides.")
]
Nproc = Annotated[
    str | None,
    of_processes(
        "--nproc", metavar="N|auto", help="Processes on this machine; auto: one for each GPU.", callback=nproc
    ),
]
TokenizerFile = Annotated[
    str | None, Option("--tokenizer", metavar="FILE", help="In place of the one beside the checkpoint.")
]
Device = Annotated[
    str | None,
    Option(
        "--device", metavar="NAME", help="cuda, cuda:1, mps or cpu; without it, the first there is.", callback=device
    ),
]
Verify = Annotated[bool, Option("--verify", help="Compare the SHA-256 of the checkpoint's files with its manifest.")]
Template = Annotated[
    str,
    Option(
        "--template",
        metavar="NAME|FILE",
        help="The prompt format: auto, alpaca, dialogue, none, ..., a template.json or a chat template (.jinja).",
        callback=known_template,
    ),
]
Quantize = Annotated[
    Literal["nf4", "none"] | None,
    Option(
        "--quantize",
        "--quant",
        help="nf4: keep the matrices in four bits, a quarter of the memory of bf16. Without it: as in training.",
    ),
]
Stream = Annotated[
    bool, Option("--stream", help="Leave the blocks in their files: two are in memory at a time, for a small machine.")
]
Context = Annotated[
    int | None,
    Option("--context", metavar="N", min=2, max=2**27, help="Longest sequence. Without it: the checkpoint's."),
]
Plot = Annotated[Path | None, Option("--plot", metavar="FILE.png", help="Draw it, too.", callback=plot)]
Json = Annotated[bool, Option("--json", help="Print JSON.")]


# The model


@dataclass(frozen=True)
class ModelOptions:
    """The flags that say which model, and how it is loaded."""

    ckpt: list[str]
    device: str | None
    tokenizer: str | None
    template: str
    verify: bool
    quantize: Literal["nf4", "none"] | None
    context: int | None = None
    stream: bool = False


def launch_ranks(how: Launch, device: str | None, check: Callable[[int], None]) -> None:
    """Runs this command in several processes, and exits, if that is asked for and was not done yet; see
    `launch_if_asked`."""
    code = launch_if_asked(how, device, sys.argv[1:], check, console.note)
    if code is not None:
        raise typer.Exit(code)


def launch_model(nproc: str | None, device: str | None, ckpt: list[str]) -> None:
    """Runs this command in as many processes as share one model; see `launch_ranks`."""

    def check(processes: int) -> None:
        from llama_acc.core.checkpoint.layout import inspect, locate, read_config
        from llama_acc.core.model.config import check_divides

        config = read_config([inspect(locate(folder)) for folder in ckpt])
        if config is not None and config.vocab_size > 0:
            check_divides(config, processes)
        console.working(None)

    launch_ranks(Launch(nproc), device, check)


@contextlib.contextmanager
def load_distributed(model: ModelOptions) -> "Iterator[LoadedModel]":
    """The model, shared by all processes; those other than rank 0 compute in here what that asks for."""
    with load_models_distributed(model, {"": model.ckpt}) as models:
        yield models[""]


@contextlib.contextmanager
def load_models_distributed(
    model: ModelOptions, checkpoints: Mapping[str, Sequence[str]]
) -> "Iterator[dict[str, LoadedModel]]":
    """Models of the same base, by name, each from its checkpoints; see `load_distributed`."""
    console.working("loading the model", after=_QUIET)
    from llama_acc.core.device import pick_device
    from llama_acc.core.distributed.groups import init_distributed
    from llama_acc.core.generate.engine import Engine, stop_followers
    from llama_acc.core.generate.load import load_models

    if not environment.is_main():
        # While it waits for rank 0, Python would not look at a signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    device = pick_device(model.device)
    with init_distributed(device, environment.world_size(), console.note, timeout=_PATIENCE) as parallel:
        loaded = parallel.raise_together(
            lambda: load_models(
                checkpoints,
                device=str(device),
                tokenizer=model.tokenizer,
                template=model.template,
                verify=model.verify,
                quantize=model.quantize,
                context=model.context,
                parallel=parallel,
                stream=model.stream,
            )
        )
        first = next(iter(loaded.values()))
        if not parallel.is_main:
            Engine(first).follow()
        for note in dict.fromkeys(note for one in loaded.values() for note in one.notes):
            console.note(note)
        if any(one.template_from.startswith("none, as") for one in loaded.values()):
            console.note("the checkpoint keeps no prompt format: template none, the text is continued as it is")
        console.working(None)
        try:
            yield loaded
        except LlamaAccError:
            stop_followers(first)
            raise
        if parallel.is_main:
            stop_followers(first)


def check_alone() -> None:
    """Refuses, with a UserError, that a second model is loaded beside one that several processes share."""
    if environment.world_size() > 1:
        raise UserError("two models are compared by a single process", "leave --nproc out")


def load_beside(first: "LoadedModel", ckpt: Sequence[str], model: ModelOptions) -> "LoadedModel":
    """Another model, to be compared with one that is loaded as `model` says. One that keeps no prompt format is asked
    in the first one's.
    """
    check_alone()
    from llama_acc.core.generate.load import load_model

    console.working("loading the model", after=_QUIET)
    device, verify, quantize, context = str(first.device), model.verify, model.quantize, model.context
    try:
        loaded = load_model(
            *ckpt, device=device, verify=verify, quantize=quantize, context=context, stream=model.stream
        )
    finally:
        console.working(None)
    for note in loaded.notes:
        console.note(note)
    if not loaded.template_from.startswith("none, as"):
        return loaded
    console.note(f"{ckpt[-1]} keeps no prompt format: it is asked in {first.template.name}")
    return replace(loaded, template=first.template)
