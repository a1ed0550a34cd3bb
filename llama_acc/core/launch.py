"""Several processes from one command: torch's elastic agent starts this same command once for each rank.

What the agent leaves open is decided here: which rank's error is the cause and is shown, when the others are ended,
what is worth a restart, and what Ctrl-C means.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import termios
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from llama_acc.core.errors import LlamaAccError, RunError, UserError
from llama_acc.core.train.interrupt import EXIT_CODES
from llama_acc.core.worker import LAUNCHER, Ending

_POLL = 0.1  # seconds
_ASK_OTHERS_EVERY = 2.0
# A rank that ended in order leaves the others time to do the same: to save, to write the report.
_GRACE = {"stopped": 120.0, "error": 20.0, "crash": 5.0, "lost": 5.0}
_TAIL_LINES = 20
_SIOCGIFADDR = 0x8915  # netdevice(7)
_PATIENCE = 900  # seconds, for the other machines to come


@dataclasses.dataclass(frozen=True)
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


class WorkerError(LlamaAccError):
    """The error that ended a job, as the rank that had it told it."""

    def __init__(self, message: str, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class Stopped(Exception):
    """The job was ended by a signal, in order. `exit_code` is what the command returns."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


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


def launch(how: Launch, arguments: Sequence[str]) -> None:
    """Runs `llama-acc ARGUMENTS` in every process; returns when all have succeeded.

    Raises:
        WorkerError: one failed.
        Stopped: by Ctrl-C or SIGTERM, which all processes were told of.
        RunError: the machines did not find each other.
    """
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // how.processes)))
    network = _network_of(_own_address(how)) if how.nodes > 1 else None
    if network is not None:
        # Left alone, gloo takes the network that this machine's name stands for, which often is the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
    logs, terminal = _Logs(how.log_ranks), _terminal_settings()
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        _run(how, arguments, logs)
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


def _run(how: Launch, arguments: Sequence[str], logs: "_Logs") -> None:
    handler = _meet(how)
    spec = WorkerSpec(
        role="",
        local_world_size=how.processes,
        entrypoint=sys.executable,
        # The agent fills "$name" in.
        args=("-m", "llama_acc", *(word.replace("$", "$$") for word in arguments)),
        rdzv_handler=handler,
        max_restarts=how.max_restarts,
        monitor_interval=_POLL,
        local_addr=_own_address(how),
    )
    agent = _Agent(spec, logs, several_nodes=how.nodes > 1)
    previous = {number: signal.signal(number, agent.stop) for number in EXIT_CODES}
    try:
        result = agent.run()
    except (RendezvousClosedError, RendezvousError) as error:
        raise _did_not_meet(how, error) from error
    except SignalException as error:
        raise Stopped(128 + error.sigval) from error
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
        handler.shutdown()
    if result is not None and result.is_failed():
        agent.raise_cause(result.failures)


def _meet(how: Launch) -> RendezvousHandler:
    """Serves the meeting, or connects to it.

    torch takes a machine for the host if the endpoint is its name; an address of one of its networks must do as well.
    """
    endpoint, run_id = how.endpoint or "localhost:0", "llama-acc" if how.endpoint else uuid.uuid4().hex
    serves = how.endpoint is None or _own_address(how) == _resolved(how.endpoint)[1][0]
    for is_host in dict.fromkeys((serves, False)):
        meeting = RendezvousParameters(
            "c10d", endpoint, run_id, how.nodes, how.nodes, _own_address(how), timeout=_PATIENCE, is_host=is_host
        )
        try:
            return rendezvous.get_rendezvous_handler(meeting)
        except RendezvousConnectionError as error:
            # The port may be taken by the same command: two on one machine.
            failure = error
    raise _did_not_meet(how, failure)


def _resolved(endpoint: str) -> tuple[socket.AddressFamily, Any]:
    host, _, port = endpoint.rpartition(":")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--rdzv-endpoint {endpoint}: {reason}", "give HOST:PORT") from None
    return family, address


def _own_address(how: Launch) -> str:
    """The address other machines reach this one at: the one it uses to reach the endpoint."""
    if how.endpoint is None:
        return "127.0.0.1"
    family, address = _resolved(how.endpoint)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)  # of a datagram socket: nothing is sent
        except OSError as error:
            raise UserError(f"--rdzv-endpoint {how.endpoint}: {error.strerror}", "is the network up?") from None
        return str(probe.getsockname()[0])


def _network_of(address: str) -> str | None:
    """The name of the network interface that has an IPv4 address, such as eth0."""
    for _, name in socket.if_nameindex() if sys.platform == "linux" else []:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _did_not_meet(how: Launch, error: Exception) -> RunError:
    if isinstance(error, RendezvousClosedError):
        return RunError("the job ended on another machine", "its error is in the output of that machine")
    return RunError(
        f"{how.nodes} machines did not meet at {how.endpoint}: {error}",
        "start the same command on every machine; the port must be free and reachable from all of them",
    )


class _Logs(DefaultLogsSpecs):
    """Where ranks write: rank 0 to the terminal, the others to files."""

    def __init__(self, folder: Path | None) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="llama-acc-"))
        self._folder = folder
        self._errors: dict[int, Path] = {}
        super().__init__(log_dir=str(self._scratch))

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """By local rank, where output and errors go. Called by the agent at every start."""
        told = super().reify(envs)
        outs, errs, own_outs, own_errs = dict(told.stdouts), dict(told.stderrs), dict[int, str](), dict[int, str]()
        for place, env in envs.items():
            rank, restart = int(env["RANK"]), int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
            if rank == 0 and self._folder is None:
                continue
            folder = self._folder or Path(told.error_files[place]).parent
            folder.mkdir(parents=True, exist_ok=True)
            name = f"rank-{rank}" + (f".restart-{restart}" if restart else "")
            outs[place], errs[place] = str(folder / f"{name}.out"), str(folder / f"{name}.err")
            self._errors[rank] = Path(errs[place])
            if rank == 0:
                own_outs[place], own_errs[place] = outs[place], errs[place]
        return dataclasses.replace(told, stdouts=outs, stderrs=errs, tee_stdouts=own_outs, tee_stderrs=own_errs)

    def tail(self, rank: int) -> str:
        """The last lines a rank wrote to its standard error, if the user has not seen them."""
        path = self._errors.get(rank)
        if rank == 0 or path is None or not path.is_file():
            return ""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])

    def clear(self) -> None:
        """Removes what is not kept."""
        shutil.rmtree(self._scratch, ignore_errors=True)


class _Agent(LocalElasticAgent):
    """The elastic agent, which ends the other ranks of one that failed soon but not at once."""

    def __init__(self, spec: WorkerSpec, logs: _Logs, several_nodes: bool) -> None:
        super().__init__(spec, logs, log_line_prefix_template="$role_name")
        self._logs, self._several_nodes = logs, several_nodes
        self._received: signal.Signals | None = None
        self._killed: set[int] = set()  # process ids
        self._next_question = 0.0

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handles Ctrl-C and SIGTERM: the workers are told once; the second time they are killed."""
        received = signal.Signals(number)
        alive = self._alive()
        if self._received is not None or not alive:
            for process in alive.values():
                process.kill()
            raise Stopped(EXIT_CODES[received])
        self._received = received
        for process in alive.values():
            process.send_signal(number)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meets the other machines, before every start of the workers."""
        handler = worker_group.spec.rdzv_handler
        assert isinstance(handler, DynamicRendezvousHandler)
        # The handler would serve the workers the same store again, with the addresses of those that died in it.
        handler._shared_tcp_store_server = handler._bootstrap_store_info = None
        super()._rendezvous(worker_group)

    def _alive(self) -> Mapping[int, Any]:
        """The running workers by local rank."""
        if self._pcontext is None:
            return {}
        assert isinstance(self._pcontext, SubprocessContext)
        handlers = self._pcontext.subprocess_handlers
        return {place: handler.proc for place, handler in handlers.items() if handler.proc.poll() is None}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ended = self._first_failure()
        if ended is not None:
            self._end_others(_GRACE[ended])
        elif self._others_left():
            self._end_others(_GRACE["lost"])
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and self._remaining_restarts:
            self._decide_restart(result.failures)
        return result

    def _first_failure(self) -> str | None:
        """How the first worker that is found to have failed did."""
        assert isinstance(self._pcontext, SubprocessContext)
        for place, handler in self._pcontext.subprocess_handlers.items():
            code = handler.proc.poll()
            if code:
                return self._kind(code, _ending(self._pcontext.error_files[place]))
        return None

    def _kind(self, code: int, ending: Ending | None) -> str:
        if self._received is not None and code in (*EXIT_CODES.values(), *(-number for number in EXIT_CODES)):
            return "stopped"
        return "stopped" if code in EXIT_CODES.values() else ending.kind if ending is not None else "crash"

    def _others_left(self) -> bool:
        """Whether the job ended on another machine, whose agent then has closed the meeting."""
        if not self._several_nodes or time.monotonic() < self._next_question:
            return False
        self._next_question = time.monotonic() + _ASK_OTHERS_EVERY
        return bool(self._worker_group.spec.rdzv_handler.is_closed())

    def _end_others(self, grace: float) -> None:
        """Waits for the other workers to end, then kills them."""
        deadline = time.monotonic() + grace
        while self._alive() and time.monotonic() < deadline:
            time.sleep(_POLL)
        for process in self._alive().values():
            self._killed.add(process.pid)
            process.kill()
            process.wait()

    def _decide_restart(self, failures: Mapping[int, ProcessFailure]) -> None:
        """Stops the agent from restarting what would fail again, and tells of a restart."""
        kinds = {self._kind(failure.exitcode, _ending(failure.error_file)) for failure in failures.values()}
        if kinds & {"error", "stopped"} or self._received is not None:
            self._remaining_restarts = 0
            return
        text = self._cause(failures)[0]
        done = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
        again = f"restarting from the last whole checkpoint ({done} of {self._worker_group.spec.max_restarts})"
        print(f"{text}; {again}", file=sys.stderr, flush=True)

    def _cause(self, failures: Mapping[int, ProcessFailure]) -> tuple[str, str | None, int]:
        """Message, hint and exit code of the failure that came first."""

        def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, float, int]:
            rank, failure = item
            ending = _ending(failure.error_file)
            # A rank that was killed leaves no word, and the others notice at once: it comes before them.
            told = ending.time if ending is not None else float(failure.timestamp)
            return failure.pid in self._killed, ending is not None and ending.kind == "lost", told, rank

        rank, failure = min(failures.items(), key=order)
        ending = _ending(failure.error_file)
        if ending is None:
            tail = "" if failure.exitcode in (-signal.SIGKILL, -signal.SIGTERM) else self._logs.tail(rank)
            last_words = f"; its last words:\n{tail}" if tail else ""
            return f"rank {rank} {_how_it_ended(failure.exitcode)}{last_words}", None, 1
        if ending.kind == "lost":
            where = "; its error is in the output of another machine" if self._several_nodes else f": {ending.message}"
            return f"rank {rank} lost another rank{where}", None, 1
        endings = [_ending(other.error_file) for other in failures.values()]
        agreed = len(failures) == self._worker_group.spec.local_world_size and all(
            other is not None and other.message == ending.message for other in endings
        )
        # Where rank 0 speaks for all, as in chat, the others end well.
        spoke = rank == 0 and len(failures) == 1 and ending.kind == "error"
        message = ending.message if agreed or spoke else f"rank {rank} failed: {ending.message}"
        return message, ending.hint, ending.exit_code

    def raise_cause(self, failures: Mapping[int, ProcessFailure]) -> NoReturn:
        """Raises what ended the job."""
        kinds = {self._kind(failure.exitcode, _ending(failure.error_file)) for failure in failures.values()}
        if kinds == {"stopped"}:
            code = next(iter(failures.values())).exitcode
            raise Stopped(EXIT_CODES[self._received] if self._received is not None else code)
        raise WorkerError(*self._cause(failures))


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _ending(path: str) -> Ending | None:
    try:
        return Ending(**json.loads(Path(path).read_text(encoding="utf-8"))["ending"])
    except (OSError, ValueError, KeyError):
        return None
