"""A model for the commands that let it generate, shared by several processes where that is wanted."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import typer

from llama_acc.cli import console
from llama_acc.core.distributed import Launch, environment, launch_if_asked
from llama_acc.core.errors import LlamaAccError, UserError

if TYPE_CHECKING:
    from llama_acc.core.generate.load import LoadedModel

_QUIET = 5.0  # seconds: a script that asks for one answer need not hear of it
_PATIENCE = timedelta(days=365)  # people think


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

    Raises:
        UserError: it cannot be loaded, or several processes share the first.
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
