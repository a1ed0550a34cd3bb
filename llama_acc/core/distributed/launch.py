"""Several processes from one command: torch's elastic launcher starts this same command once for each rank.

What it leaves open is settled here, by its public interfaces: where ranks write, which rank's error is the cause, what
is worth a restart, whom a machine waits for, and what Ctrl-C means.
"""

import contextlib
import dataclasses
import fcntl
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import termios
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from llama_acc.core.distributed import Launch
from llama_acc.core.distributed.environment import (
    JOIN_TIMEOUT,
    LAUNCHER,
    START,
    STOP_FILE,
    connect,
    in_background,
    wait_until,
)
from llama_acc.core.errors import LlamaAccError, RunError, UserError
from llama_acc.core.interrupt import EXIT_CODES, held_back

_POLL, _ASK_OTHERS_EVERY = 0.1, 2.0  # seconds
_SAVE_TIMEOUT = 120  # seconds for the ranks to save, once they were asked to stop
_KILLED_AFTER = 25  # seconds: torch kills what outlives the rank that failed by 30
_TAIL_LINES = 20
_SIOCGIFADDR = 0x8915  # netdevice(7)
_STOPPED = {*EXIT_CODES.values(), *(-number for number in EXIT_CODES)}


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


def launch(how: Launch, processes: int, arguments: Sequence[str], tell: Callable[[str], None]) -> int:
    """Runs `llama-acc ARGUMENTS` in every process, until all have ended.

    Args:
        how: the flags.
        processes: on this machine.
        arguments: the words after `llama-acc`.
        tell: is given a line for the user where other machines are long in coming, and at a restart.

    Returns:
        0, or 130 or 143 if Ctrl-C or SIGTERM, which all processes were told of, ended it.

    Raises:
        UserError, RunError: what ended the rank that failed first; or the machines did not find each other.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_TIMEOUT))
    logging.disable()
    try:
        with tempfile.TemporaryDirectory(prefix="llama-acc-", ignore_cleanup_errors=True) as scratch:
            kept = None if how.log_ranks is None else Path(how.log_ranks).expanduser().absolute()
            logs = _Logs(Path(scratch), kept)
            os.environ.update({LAUNCHER: str(os.getpid()), STOP_FILE: str(Path(scratch) / "stop")})
            with _signals_as_exceptions(Path(scratch)):
                return _run(how, processes, arguments, logs, tell)
    finally:
        logging.disable(logging.NOTSET)
        for name in (LAUNCHER, STOP_FILE, START):
            os.environ.pop(name, None)


def _run(how: Launch, processes: int, arguments: Sequence[str], logs: "_Logs", tell: Callable[[str], None]) -> int:
    own = _own_address(how.rdzv_endpoint)
    network = _network_of(own) if how.nnodes > 1 else None
    if network is not None:
        # Left alone, gloo takes the network that this machine's name stands for, which often is the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
    try:
        with contextlib.closing(_create_rendezvous(how, own, tell)) as rendezvous:
            config = LaunchConfig(
                min_nodes=how.nnodes,
                max_nodes=how.nnodes,
                nproc_per_node=processes,
                logs_specs=logs,
                run_id=rendezvous.get_run_id(),
                role="",
                rdzv_backend=_BACKEND,
                rdzv_configs={"rendezvous": rendezvous},
                max_restarts=0,  # torch would also repeat what cannot succeed
                monitor_interval=_POLL,
                log_line_prefix_template="$role_name",  # none
                local_addr=own,
                signals_to_handle="SIGHUP,SIGQUIT",
            )
            # torch fills "$name" in.
            words = ["-m", "llama_acc", *(word.replace("$", "$$") for word in arguments)]
            return _start(config, words, how, logs, tell)
    except SignalException as received:
        # What kept a rank from saving is worth more than the signal.
        told = {rank: end for rank, end in logs.failures().items() if _kind(end) in ("error", "crash")}
        if told:
            raise _error(*first_failure(told), logs, how.nnodes) from None
        return 128 + received.sigval


def _start(config: LaunchConfig, words: list[str], how: Launch, logs: "_Logs", tell: Callable[[str], None]) -> int:
    """Starts the ranks, and again where one crashed."""
    for restart in range(1, how.max_restarts + 2):
        try:
            elastic_launch(config, sys.executable)(*words)
            return 0
        except ChildFailedError as failed:
            rank, failure = first_failure(failed.failures)
        if _kind(failure) == "stopped":
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        error = _error(rank, failure, logs, how.nnodes)
        if restart > how.max_restarts or _kind(failure) == "error":
            raise error
        again = f"restarting from the last whole checkpoint ({restart} of {how.max_restarts})"
        tell(f"{error.message}; {again}")
    raise AssertionError


@contextlib.contextmanager
def _signals_as_exceptions(scratch: Path) -> Iterator[None]:
    """Raises SignalException at Ctrl-C and SIGTERM: torch tells the ranks, and waits. A second one ends this process,
    and with it the ranks, at once.

    The main thread holds both back, so that ranks begin with them held back too (a Python that just begins would end
    with a traceback); another thread, which does nothing, lets them in.
    """
    try:
        terminal = termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError):  # it is no terminal
        terminal = None

    def restore_terminal() -> None:
        if terminal is not None:  # rank 0 may have been killed while a line was being typed
            termios.tcsetattr(sys.stdin, termios.TCSANOW, terminal)

    def stop(number: int, frame: FrameType | None) -> None:
        if Path(os.environ[STOP_FILE]).exists():
            restore_terminal()
            shutil.rmtree(scratch, ignore_errors=True)
            os._exit(128 + number)
        Path(os.environ[STOP_FILE]).touch()
        raise SignalException(f"got signal {number}", signal.Signals(number))

    previous = {number: signal.signal(number, stop) for number in EXIT_CODES}
    ended = threading.Event()
    threading.Thread(target=ended.wait, daemon=True).start()
    try:
        with held_back():
            yield
    finally:
        ended.set()
        for number, before in previous.items():
            signal.signal(number, before)
        restore_terminal()


class _Logs(DefaultLogsSpecs):
    """Where ranks write: rank 0 to the terminal, the others to files."""

    def __init__(self, scratch: Path, kept: Path | None) -> None:
        super().__init__(log_dir=str(scratch))
        self._kept = kept
        self._stderrs: dict[int, Path] = {}
        self._error_files: dict[int, str] = {}

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """By local rank, where output and errors go. Called by torch at every start."""
        logs = super().reify(envs)
        outs, errs, shown_outs, shown_errs = dict(logs.stdouts), dict(logs.stderrs), dict[int, str](), dict[int, str]()
        restarts = int(os.environ[START]) - 1
        for place, env in envs.items():
            rank = int(env["RANK"])
            self._error_files[rank] = logs.error_files[place]
            if rank == 0 and self._kept is None:
                continue
            folder = self._kept or Path(logs.error_files[place]).parent
            folder.mkdir(parents=True, exist_ok=True)
            path = str(folder / (f"rank-{rank}" + (f".restart-{restarts}" if restarts else "")))
            outs[place], errs[place] = f"{path}.out", f"{path}.err"
            if rank == 0:
                shown_outs[place], shown_errs[place] = outs[place], errs[place]
            else:
                self._stderrs[rank] = Path(errs[place])
        return dataclasses.replace(logs, stdouts=outs, stderrs=errs, tee_stdouts=shown_outs, tee_stderrs=shown_errs)

    def tail(self, rank: int) -> str:
        """The last lines a rank wrote to its standard error, if the user has not seen them."""
        path = self._stderrs.get(rank)
        if path is None or not path.is_file():
            return ""
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])

    def failures(self) -> dict[int, ProcessFailure]:
        """What ranks of this machine have recorded of their end, by rank."""
        files = {rank: file for rank, file in self._error_files.items() if Path(file).is_file()}
        return {rank: ProcessFailure(local_rank=0, pid=0, exitcode=1, error_file=file) for rank, file in files.items()}


def _kind(failure: ProcessFailure) -> str:
    """How a rank ended: what it has recorded itself, else "stopped" (by SIGINT or SIGTERM) or "killed"."""
    kind: str | None = failure.error_file_data.get("kind")
    return kind or ("stopped" if failure.exitcode in _STOPPED else "killed")


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank whose end is the cause of the others'.

    A rank that was killed leaves no record, and the others notice at once: they come after it. So do those that torch
    ended then, by SIGTERM and half a minute later by SIGKILL.
    """
    began = min(failure.timestamp for failure in failures.values())

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, bool, float, int]:
        rank, failure = item
        kind, when = _kind(failure), failure.error_file_data.get("time", failure.timestamp)
        return kind == "stopped", kind == "killed" and when > began + _KILLED_AFTER, kind == "lost", when, rank

    return min(failures.items(), key=order)


def _error(rank: int, failure: ProcessFailure, logs: _Logs, nodes: int) -> LlamaAccError:
    """What to tell of the failure of a rank."""
    record, kind = failure.error_file_data, _kind(failure)
    if kind == "killed":
        tail = "" if failure.exitcode == -signal.SIGKILL else logs.tail(rank)
        last_words = f"; its last words:\n{tail}" if tail else ""
        return RunError(f"rank {rank} {how_it_ended(failure.exitcode)}{last_words}")
    message = record["message"]["message"]
    if kind == "lost":
        where = "; its error is in the output of another machine" if nodes > 1 else f": {message}"
        return RunError(f"rank {rank} lost another rank{where}")
    error = UserError if record["exit_code"] == UserError.exit_code else RunError
    # What was foreseen names its place, and mostly all ranks have found it.
    return error(message if kind == "error" else f"rank {rank} failed: {message}", record["hint"])


def how_it_ended(code: int) -> str:
    """A process's end as a predicate; below 0, its exit code is that of a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


class _Rendezvous(DynamicRendezvousHandler):
    """Where the machines of a job meet before every start of the ranks. torch's, which also says who is waited for, and
    lasts from the first start to the last.
    """

    how: Launch
    tell: Callable[[str], None]
    starts = 0
    next_question = 0.0

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits for all machines."""
        met = threading.Event()
        whom = f"all of {self.how.nnodes} machines to meet at {self.how.rdzv_endpoint}"
        if self.how.nnodes > 1:
            threading.Thread(target=wait_until, args=(met.is_set, lambda: whom, self.tell), daemon=True).start()
        try:
            info = super().next_rendezvous()
        except RendezvousError as error:
            raise _did_not_meet(self.how, error, self.starts > 0) from error
        finally:
            met.set()
        self.starts += 1
        os.environ[START] = str(self.starts)
        return info

    def num_nodes_waiting(self) -> int:
        """How many machines want to begin anew. torch asks all the time; it learns here if the job ended elsewhere."""
        try:
            if self.how.nnodes > 1 and time.monotonic() >= self.next_question:
                self.next_question = time.monotonic() + _ASK_OTHERS_EVERY
                if self.is_closed():
                    raise RendezvousClosedError
            return super().num_nodes_waiting()
        except RendezvousError as error:
            raise _did_not_meet(self.how, error, True) from error

    def get_backend(self) -> str:
        """The name under which the launcher finds it."""
        return _BACKEND

    def shutdown(self) -> bool:
        """Does nothing: torch calls it after every start."""
        return True

    def close(self) -> None:
        """Ends the job for all machines."""
        super().shutdown()


# The launcher makes its rendezvous by name.
_BACKEND = "llama-acc"
rendezvous_handler_registry.register(_BACKEND, lambda parameters: parameters.get("rendezvous"))


def _create_rendezvous(how: Launch, own: str, tell: Callable[[str], None]) -> _Rendezvous:
    """Serves the rendezvous, or connects to it.

    torch takes a machine for the host if the endpoint is its name; an address of one of its networks must do as well.
    """
    endpoint, run_id = how.rdzv_endpoint or "localhost:0", "llama-acc" if how.rdzv_endpoint else uuid.uuid4().hex

    def connected(is_host: bool) -> _Rendezvous:
        if not is_host:
            connect(*_parts(endpoint))
        parameters = RendezvousParameters("c10d", endpoint, run_id, how.nnodes, how.nnodes, own, is_host=is_host)
        backend, store = create_backend(parameters)
        timeout = RendezvousTimeout(join=timedelta(seconds=JOIN_TIMEOUT))
        return _Rendezvous.from_backend(run_id, store, backend, how.nnodes, how.nnodes, own, timeout)

    serves = how.rdzv_endpoint is None or own == _resolve(endpoint)[1][0]
    for is_host in dict.fromkeys((serves, False)):
        opening = in_background(partial(connected, is_host))
        wait_until(opening.done, lambda: f"the machine of {endpoint} to answer", tell)
        try:
            rendezvous = opening.result(timeout=0)
        except (RendezvousConnectionError, TimeoutError) as error:
            failure = error  # the port may be taken by the same command: two on one machine
        else:
            rendezvous.how, rendezvous.tell = how, tell
            return rendezvous
    raise _did_not_meet(how, failure, False)


def _did_not_meet(how: Launch, error: Exception, had_met: bool) -> RunError:
    if had_met or isinstance(error, RendezvousClosedError):
        return RunError("the job ended on another machine", "its error is in the output of that machine")
    return RunError(
        f"{how.nnodes} machines did not meet at {how.rdzv_endpoint}: {error}",
        "start the same command on every machine; the port must be free and reachable from all of them",
    )


def _resolve(endpoint: str) -> tuple[socket.AddressFamily, Any]:
    try:
        family, _, _, _, address = socket.getaddrinfo(*_parts(endpoint), type=socket.SOCK_DGRAM)[0]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--rdzv-endpoint {endpoint}: {reason}", "give HOST:PORT") from None
    return family, address


def _parts(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def _own_address(endpoint: str | None) -> str:
    """The address other machines reach this one at: the one it uses to reach the endpoint."""
    if endpoint is None:
        return "127.0.0.1"
    family, address = _resolve(endpoint)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)  # of a datagram socket: nothing is sent
        except OSError as error:
            raise UserError(f"--rdzv-endpoint {endpoint}: {error.strerror}", "is the network up?") from None
        return str(probe.getsockname()[0])


def _network_of(address: str) -> str | None:
    """The name of the network interface that has an IPv4 address, such as eth0."""
    for _, name in socket.if_nameindex() if sys.platform == "linux" else []:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
