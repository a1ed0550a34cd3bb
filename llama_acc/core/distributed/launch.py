"""Several processes from one command: torch's elastic launcher starts this same command once for each rank.

What it leaves open is settled here: which rank's error is the cause, what is worth a restart, whom a machine waits for,
and what Ctrl-C means.
"""

import contextlib
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from llama_acc.core.distributed import Launch
from llama_acc.core.distributed.environment import JOIN_TIMEOUT, LAUNCHER, START, STOP_FILE, answers, wait_until
from llama_acc.core.errors import LlamaAccError, RunError, UserError
from llama_acc.core.interrupt import EXIT_CODES, held_back

_SAVE_TIMEOUT = 120  # seconds for the ranks to save, once they were asked to stop
_REJOIN_TIMEOUT = 180  # seconds for all machines to start their ranks anew, once one has
_TAIL_LINES = 20
_SIOCGIFADDR = 0x8915  # netdevice(7)
_STOPPED = {*EXIT_CODES.values(), *(-number for number in EXIT_CODES)}


def processes_here(wanted: str, on_gpu: bool | None) -> int:
    """Number of processes `--nproc` asks for: a number, or "auto", which is one for each GPU, or one.

    `on_gpu`: whether each needs a GPU of its own; None = if there is one.
    """
    gpus = torch.cuda.device_count() if on_gpu is not False else 0
    if wanted == "auto":
        return max(1, gpus)
    count = int(wanted)
    if count > gpus and (gpus or on_gpu):
        raise UserError(f"--nproc {count} needs {count} GPUs, there are {gpus}", "lower it, or use --device cpu")
    return count


def launch(how: Launch, processes: int, arguments: Sequence[str], tell: Callable[[str], None]) -> int:
    """Runs `llama-acc ARGUMENTS` in so many processes on this machine, until all have ended.

    `tell` is given a line for the user where other machines are waited for, and at a restart.

    Returns:
        0, or 130 or 143 if Ctrl-C or SIGTERM, which all processes were told of, ended it.

    Raises:
        UserError, RunError: what ended the rank that failed first; or the machines did not find each other.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_TIMEOUT))
    logging.disable()
    scratch = Path(tempfile.mkdtemp(prefix="llama-acc-"))
    logs = scratch
    try:
        if how.log_ranks is not None:
            kept = Path(how.log_ranks).expanduser()
            kept.mkdir(parents=True, exist_ok=True)
            logs = Path(tempfile.mkdtemp(prefix=f"{socket.gethostname()}-", dir=kept))
        os.environ.update({LAUNCHER: str(os.getpid()), STOP_FILE: str(scratch / "stop")})
        with _signals_as_exceptions(scratch):
            return _run(how, processes, arguments, logs, tell)
    except SignalException as received:
        # What kept a rank from saving is worth more than the signal.
        records = logs.glob(f"llama-acc-{os.environ.get(START)}_*/attempt_0/*/error.json")
        found = [ProcessFailure(0, 0, 1, str(file)) for file in records]
        ends = {end.error_file_data["rank"]: end for end in found if _kind(end) in ("error", "crash")}
        if ends:
            raise _error(*first_failure(ends), "", how.nnodes) from None
        return 128 + received.sigval
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        logging.disable(logging.NOTSET)
        for name in (LAUNCHER, STOP_FILE, START):
            os.environ.pop(name, None)


def _run(how: Launch, processes: int, arguments: Sequence[str], logs: Path, tell: Callable[[str], None]) -> int:
    """Starts the ranks, and again where one crashed."""
    endpoint, own, store = "localhost:0", "127.0.0.1", None
    if how.rdzv_endpoint is not None:
        endpoint, own = how.rdzv_endpoint, _own_address(how.rdzv_endpoint)
        store = _serve(endpoint, own)
        if network := _network_of(own):
            # Left alone, gloo takes the network that this machine's name stands for, which often is the loopback.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
    serves = how.rdzv_endpoint is None or store is not None
    for start in range(1, how.max_restarts + 2):
        os.environ[START] = str(start)
        timeout = JOIN_TIMEOUT if start == 1 else _REJOIN_TIMEOUT
        if how.nnodes > 1:
            tell(f"waiting for all of {how.nnodes} machines to meet at {endpoint}")
        if not serves:
            there = partial(answers, *_parts(endpoint))
            wait_until(there, lambda: f"the machine of {endpoint} to answer", tell, timeout)
        config = LaunchConfig(
            min_nodes=how.nnodes,
            max_nodes=how.nnodes,
            nproc_per_node=processes,
            # Rank 0 writes to the terminal.
            logs_specs=DefaultLogsSpecs(
                str(logs),
                redirects=dict.fromkeys(range(1, processes), Std.ALL),
                tee={0: Std.ALL if how.log_ranks else Std.NONE},
            ),
            run_id=f"llama-acc-{start}",
            role="",
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            rdzv_configs={"is_host": serves, "join_timeout": int(timeout)},
            max_restarts=0,  # torch would also repeat what cannot succeed
            monitor_interval=0.1,
            log_line_prefix_template="$role_name",  # none
            local_addr=own,
            signals_to_handle="SIGHUP,SIGQUIT",
        )
        # torch fills "$name" in.
        words = ["-m", "llama_acc", *(word.replace("$", "$$") for word in arguments)]
        try:
            elastic_launch(config, sys.executable)(*words)
            return 0
        except ChildFailedError as failed:
            rank, failure = first_failure(failed.failures)
        except RendezvousError as problem:
            raise RunError(
                f"{how.nnodes} machines did not meet at {endpoint}: {problem}",
                "start the same command on every machine; the port must be free and reachable from all of them; if "
                "the job ended on another machine, its error is in the output of that one",
            ) from problem
        if _kind(failure) == "stopped":
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        error = _error(rank, failure, _last_words(logs, start, failure), how.nnodes)
        if start > how.max_restarts or _kind(failure) == "error":
            raise error
        tell(f"{error.message}; restarting from the last whole checkpoint ({start} of {how.max_restarts})")
    raise AssertionError


def _last_words(logs: Path, start: int, failure: ProcessFailure) -> str:
    """The end of what a rank wrote to its standard error; nothing where the user has seen it."""
    files = logs.glob(f"llama-acc-{start}_*/attempt_0/{failure.local_rank}/stderr.log") if failure.local_rank else ()
    lines = [line for file in files for line in file.read_text("utf-8", "replace").splitlines()]
    return "\n".join(lines[-_TAIL_LINES:])


@contextlib.contextmanager
def _signals_as_exceptions(scratch: Path) -> Iterator[None]:
    """Raises SignalException at Ctrl-C and SIGTERM: torch tells the ranks, and waits. A second one ends this process,
    and with it the ranks, at once.

    The main thread holds both back, so that ranks begin with them held back too (a Python that just begins would end
    with a traceback); another thread, which does nothing, lets them in.
    """
    terminal = termios.tcgetattr(0) if os.isatty(0) else None

    def restore_terminal() -> None:
        if terminal is not None:  # rank 0 may have been killed while a line was being typed
            termios.tcsetattr(0, termios.TCSANOW, terminal)

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


def _kind(failure: ProcessFailure) -> str:
    """How a rank ended: what it has recorded itself, else "stopped" (by SIGINT or SIGTERM) or "killed"."""
    kind: str | None = failure.error_file_data.get("kind")
    return kind or ("stopped" if failure.exitcode in _STOPPED else "killed")


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank whose end is the cause of the others'.

    A rank that was killed leaves no record, and the others notice at once: they come after it. So do those that torch
    ended then.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, float, int]:
        rank, failure = item
        kind, when = _kind(failure), failure.error_file_data.get("time", failure.timestamp)
        return kind == "stopped", kind == "lost", when, rank

    return min(failures.items(), key=order)


def _error(rank: int, failure: ProcessFailure, tail: str, nodes: int) -> LlamaAccError:
    """What to tell of the failure of a rank; `tail` is what it wrote last."""
    record, kind = failure.error_file_data, _kind(failure)
    if kind == "killed":
        last_words = f"; its last words:\n{tail}" if tail and failure.exitcode != -signal.SIGKILL else ""
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


def _serve(endpoint: str, own: str) -> TCPStore | None:
    """Serves the rendezvous as long as the result is kept, if the endpoint is an address of this machine.

    torch would serve it anew at every start, and takes a machine for the host only if the endpoint is its name.
    """
    if own != _resolve(endpoint)[1][0]:
        return None
    host, port = _parts(endpoint)
    with contextlib.suppress(RuntimeError):  # the same command has the port: two on one machine
        return TCPStore(host, port, is_master=True, wait_for_workers=False, multi_tenant=True)
    return None


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


def _own_address(endpoint: str) -> str:
    """The address other machines reach this one at: the one it uses to reach the endpoint."""
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
