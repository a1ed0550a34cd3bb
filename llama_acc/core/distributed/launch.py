"""Several processes from one command: torch's elastic agent starts this same command once for each rank."""

import logging
import os
import signal
import sys
import termios
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

from llama_acc.core.distributed.agent import POLL, Agent, Logs, Stopped
from llama_acc.core.distributed.environment import LAUNCHER
from llama_acc.core.distributed.meeting import did_not_meet, meet, network_of, own_address, saying_who_is_missing
from llama_acc.core.errors import UserError
from llama_acc.core.interrupt import EXIT_CODES


@dataclass(frozen=True)
class Launch:
    """How many processes, and where.

    Attributes:
        processes: on this machine.
        nodes: number of machines; the same command is started on each.
        endpoint: HOST:PORT where machines meet; it is served by the one whose name or address this is.
        max_restarts: how often all processes are started anew after one died.
        log_ranks: a folder for every rank's output; None = only rank 0's output is shown, the others' is not kept.
    """

    processes: int
    nodes: int = 1
    endpoint: str | None = None
    max_restarts: int = 0
    log_ranks: Path | None = None

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.processes * self.nodes


def processes_here(wanted: str, on_gpu: bool | None) -> int:
    """Number of processes `--nproc` asks for.

    Args:
        wanted: a number, or "auto": one for each GPU, or one.
        on_gpu: whether each needs a GPU of its own; None = if there is one.

    Raises:
        UserError: more than there are GPUs.
    """
    gpus = torch.cuda.device_count() if on_gpu is not False else 0
    if wanted == "auto":
        return max(1, gpus)
    count = int(wanted)
    if count > gpus and (gpus or on_gpu):
        raise UserError(f"--nproc {count} needs {count} GPUs, there are {gpus}", "lower it, or use --device cpu")
    return count


def launch(how: Launch, arguments: Sequence[str], tell: Callable[[str], None]) -> None:
    """Runs `llama-acc ARGUMENTS` in every process; returns when all have succeeded.

    `tell` is given a line for the user where other machines are long in coming.

    Raises:
        WorkerError: one failed.
        Stopped: by Ctrl-C or SIGTERM, which all processes were told of.
        RunError: the machines did not find each other.
    """
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // how.processes)))
    network = network_of(own_address(how.endpoint)) if how.nodes > 1 else None
    if network is not None:
        # Left alone, gloo takes the network that this machine's name stands for, which often is the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
    logs, terminal = Logs(how.log_ranks), _terminal_settings()
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        _run(how, arguments, logs, tell)
    finally:
        logs.clear()
        if terminal is not None:  # rank 0 may have been killed while a line was being typed
            termios.tcsetattr(sys.stdin, termios.TCSANOW, terminal)
        del os.environ[LAUNCHER]


def _terminal_settings() -> list[Any] | None:
    try:
        return termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError):  # it is no terminal
        return None


def _run(how: Launch, arguments: Sequence[str], logs: Logs, tell: Callable[[str], None]) -> None:
    handler = meet(how.nodes, how.endpoint, tell)
    spec = WorkerSpec(
        role="",
        local_world_size=how.processes,
        entrypoint=sys.executable,
        # The agent fills "$name" in.
        args=("-m", "llama_acc", *(word.replace("$", "$$") for word in arguments)),
        rdzv_handler=handler,
        max_restarts=how.max_restarts,
        monitor_interval=POLL,
        local_addr=own_address(how.endpoint),
    )
    agent = Agent(spec, logs, how.nodes > 1, partial(saying_who_is_missing, how.nodes, how.endpoint, tell))
    previous = {number: signal.signal(number, agent.stop) for number in EXIT_CODES}
    try:
        result = agent.run()
    except (RendezvousClosedError, RendezvousError) as error:
        raise did_not_meet(how.nodes, how.endpoint, error) from error
    except SignalException as error:
        raise Stopped(128 + error.sigval) from error
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
        handler.shutdown()
    if result is not None and result.is_failed():
        agent.raise_cause(result.failures)
