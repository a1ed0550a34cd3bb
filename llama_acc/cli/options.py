"""Flags that several commands share, and their checks. A wrong one is reported as Typer reports any other."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from llama_acc.core.errors import UserError

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
