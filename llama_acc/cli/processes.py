"""Flags that ask for several processes: this command, once more for each of them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from llama_acc.cli import console
from llama_acc.core.distributed import environment
from llama_acc.core.errors import UserError


@dataclass(frozen=True)
class Wanted:
    """The flags as they were typed."""

    nproc: str | None = None
    nnodes: int = 1
    rdzv_endpoint: str | None = None
    max_restarts: int = 0
    log_ranks: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether none was."""
        return self == Wanted()


def world_size(wanted: Wanted) -> int | None:
    """Number of processes in all; None if it was left open."""
    if wanted.nproc is None:
        return wanted.nnodes if wanted.nnodes > 1 else None
    from llama_acc.core.distributed.launch import processes_here

    # What a dry run asks about need not be here.
    return wanted.nnodes * (int(wanted.nproc) if wanted.nproc != "auto" else processes_here("auto", None))


def launched(wanted: Wanted, device: str | None, check: Callable[[int], None]) -> bool:
    """Runs this command in several processes, if that is wanted and was not done yet.

    Args:
        wanted: the flags.
        device: the flag.
        check: is given the number of processes in all, and raises what would end each of them.

    Returns:
        Whether it was: then there is nothing left to do.

    Raises:
        UserError: flags that do not go together.
        WorkerError: a process failed.
    """
    if wanted.is_plain or environment.is_launched():
        return False
    if environment.world_size() > 1:
        raise UserError(
            "this process was started by torchrun or Slurm as one of several, and is to start several itself",
            f"leave out --nproc, --nnodes, --rdzv-endpoint, --max-restarts and --log-ranks; {environment.run_alone()}",
        )
    if (wanted.nnodes > 1) != (wanted.rdzv_endpoint is not None):
        raise UserError(
            "--nnodes above 1 and --rdzv-endpoint go together",
            "on every machine: --nnodes 2 --rdzv-endpoint HOST:PORT, with the name and a free port of one of them",
        )
    if device is not None and ":" in device:
        raise UserError(f"--device {device} is one GPU, of several processes each takes its own", "say --device cuda")

    from llama_acc.core.distributed.agent import Stopped
    from llama_acc.core.distributed.launch import Launch, launch, processes_here

    count = processes_here(wanted.nproc or "1", None if device is None else device == "cuda")
    how = Launch(
        count,
        wanted.nnodes,
        wanted.rdzv_endpoint,
        wanted.max_restarts,
        None if wanted.log_ranks is None else Path(wanted.log_ranks).expanduser().absolute(),
    )
    check(how.world_size)
    if how == Launch(1):
        return False
    console.working(None)
    try:
        launch(how, sys.argv[1:], console.note)
    except Stopped as stopped:
        raise typer.Exit(stopped.exit_code) from None
    return True
