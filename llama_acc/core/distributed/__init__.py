"""Several processes: how they are started, what each knows of the others, and the groups they form."""

from collections.abc import Callable
from dataclasses import dataclass

from llama_acc.core.distributed import environment
from llama_acc.core.errors import UserError


@dataclass(frozen=True)
class Launch:
    """How many processes, and where: the flags as they were typed."""

    nproc: str | None = None  # on this machine: a number, or "auto": one for each GPU. None = not said: one
    nnodes: int = 1  # number of machines; the same command is started on each
    rdzv_endpoint: str | None = None
    """HOST:PORT where machines meet; it is served by the one whose name or address this is."""
    max_restarts: int = 0  # how often all processes are started anew after one died
    log_ranks: str | None = None
    """A folder for every rank's output; None = only rank 0's output is shown, the others' is not kept."""

    def world_size(self) -> int | None:
        """Number of processes in all, be there a device for each or not; None if it was left open."""
        if self.nproc != "auto":
            return None if self.nproc is None and self.nnodes == 1 else int(self.nproc or "1") * self.nnodes
        from llama_acc.core.distributed.launch import processes_here

        return processes_here("auto", None) * self.nnodes


def launch_if_asked(
    how: Launch, device: str | None, arguments: list[str], check: Callable[[int], None], tell: Callable[[str], None]
) -> int | None:
    """Runs `llama-acc ARGUMENTS` in several processes, if that is asked for and was not done yet.

    `check` is given their number in all before any is started, and raises what would end each of them; `tell`, a line
    for the user. Returns None if this process does the work itself; else the exit code: 0, or 130 or 143 after Ctrl-C
    or SIGTERM.

    Raises:
        UserError: flags that do not go together.
        UserError, RunError: what ended the process that failed first.
    """
    if how == Launch() or environment.is_launched():
        return None
    if environment.world_size() > 1:
        raise UserError(
            "this process was started by torchrun or Slurm as one of several, and is to start several itself",
            f"leave out --nproc, --nnodes, --rdzv-endpoint, --max-restarts and --log-ranks; {environment.run_alone()}",
        )
    if (how.nnodes > 1) != (how.rdzv_endpoint is not None):
        raise UserError(
            "--nnodes above 1 and --rdzv-endpoint go together",
            "on every machine: --nnodes 2 --rdzv-endpoint HOST:PORT, with the name and a free port of one of them",
        )
    if device is not None and ":" in device:
        raise UserError(f"--device {device} is one GPU, of several processes each takes its own", "say --device cuda")
    from llama_acc.core.distributed.launch import launch, processes_here

    processes = processes_here(how.nproc or "1", None if device is None else device == "cuda")
    check(processes * how.nnodes)
    if processes == 1 and how in (Launch("1"), Launch("auto")):
        return None
    return launch(how, processes, arguments, tell)
