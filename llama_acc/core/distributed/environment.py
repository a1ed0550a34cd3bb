"""What a process knows of the others before it joins them, and the record it leaves of its end. Imports no torch.

A launcher (this toolkit's, torchrun, Slurm) says in the environment which of how many processes this is: RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from llama_acc.core.errors import LlamaAccError, UserError

_Result = TypeVar("_Result")
LAUNCHER = "LLAMA_ACC_LAUNCHER"
"""Set by `launch.py` in the workers' environment: its process id."""
STOP_FILE = "LLAMA_ACC_STOP_FILE"
"""Set likewise: a file that is there once the user has asked the launcher to stop."""
START = "LLAMA_ACC_START"
"""Set likewise: how often the workers were started, this time included."""
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", LAUNCHER)
"""What makes a process one of several."""
JOIN_TIMEOUT = 1800.0
"""Seconds for all processes of a job to come; torch's own default."""

_SLURM_JOINED = "LLAMA_ACC_SLURM"
_PR_SET_PDEATHSIG = 1
_FIRST_PORT, _PORTS = 15000, 10000
_SAY_AFTER, _SAY_AGAIN, _POLL = 5.0, 60.0, 0.05  # seconds
# How gloo, NCCL and torch's store say that another process went away.
_LOST = re.compile(
    r"closed by (the )?(remote )?peer|reset by peer|broken pipe|connection (was )?(closed|refused|aborted)|"
    r"ncclRemoteError|remote process exited|socket (timeout|closed|error)|timed? ?out|aborted communicators|"
    r"TCPStore|DistStoreError|DistNetworkError|peer",
    re.IGNORECASE,
)


def rank() -> int:
    """This process's number among all, 0 if it is alone."""
    return _number("RANK") if world_size() > 1 else 0


def world_size() -> int:
    """How many processes run together. RANK and WORLD_SIZE say so; one of them without the other says nothing."""
    return _number("WORLD_SIZE", least=1) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else 1


def local_rank() -> int:
    """This process's number on its machine."""
    return _number("LOCAL_RANK") if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process speaks for all."""
    return rank() == 0


def _number(name: str, least: int = 0) -> int:
    text = os.environ.get(name, "0")
    if not text.isdecimal() or int(text) < least:
        raise _misplaced(f"the environment variable {name} is {text!r}, no number of a process")
    return int(text)


def stand_alone() -> None:
    """Makes this process one on its own, whatever a launcher, or a shell within a job, has left in the environment."""
    for name in VARIABLES:
        os.environ.pop(name, None)


def run_alone() -> str:
    """Returns what to type to run without the other processes."""
    names = ("SLURM_PROCID",) if _SLURM_JOINED in os.environ else ("RANK", "WORLD_SIZE")
    return f"to run alone, put this before the command: env {' '.join(f'-u {name}' for name in names)}"


def _misplaced(message: str) -> UserError:
    """An error of the environment, which this process tells for itself."""
    error = UserError(message, run_alone())
    stand_alone()
    return error


def check_place() -> tuple[str, int]:
    """The host and port where all processes of this one's job meet.

    Raises:
        UserError: the environment does not say, or RANK is none of WORLD_SIZE.
    """
    place = f"RANK={rank()} and WORLD_SIZE={world_size()} say that this process is one of several"
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise _misplaced(f"{place}; where they meet is not said: {' and '.join(missing)} not set")
    if rank() >= world_size():
        raise _misplaced(f"RANK={rank()} is none of the {world_size()} processes that WORLD_SIZE counts")
    port = _number("MASTER_PORT", least=1)
    if port >= 2**16:
        raise _misplaced(f"MASTER_PORT={port} is no port")
    return os.environ["MASTER_ADDR"], port


def wait_until(
    happened: Callable[[], bool],
    describe: Callable[[], str],
    tell: Callable[[str], None],
    timeout: float = JOIN_TIMEOUT,
) -> bool:
    """Waits for other processes, of whom `describe` says who and where, and tells the user so after five seconds and
    then every minute. Signals are seen at once. Returns whether it happened within `timeout` seconds."""
    start = time.monotonic()
    next_line = _SAY_AFTER
    while not happened():
        waited = time.monotonic() - start
        if waited >= timeout:
            return False
        if waited >= next_line:
            tell(f"waiting for {describe()}, for {waited:.0f} s now")
            next_line = waited + _SAY_AGAIN
        time.sleep(_POLL)
    return True


def in_background(work: Callable[[], _Result]) -> "Future[_Result]":
    """Does some work in a thread that does not outlive the process, for what is deaf to signals."""
    future = Future[_Result]()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def answers(host: str, port: int) -> bool:
    """Whether somebody listens at a port."""
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except (OSError, UnicodeError):  # the second: a name that is none
        return False
    return True


def is_launched() -> bool:
    """Whether this toolkit's launcher started this process."""
    return LAUNCHER in os.environ


def start_number() -> int:
    """How often a launcher has started this process's like, this time included: above 1 after one of them died."""
    return max(int(os.environ.get(START, "1")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + 1)


def is_stopped_by_user() -> bool:
    """Whether a signal that came is the user's; a launcher sends SIGTERM to the others of a rank that failed, too."""
    return not is_launched() or Path(os.environ[STOP_FILE]).exists()


def kill_on_parent_exit() -> None:
    """Has the system kill this process when its launcher is killed: nothing must go on unseen."""
    if not is_launched() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it died before the line above
        os._exit(1)


def record_exit(error: BaseException, message: str, hint: str | None, exit_code: int) -> bool:
    """Leaves word of this worker's end for the launcher. False if there is none of this toolkit.

    It is torch's error file (`torch.distributed.elastic.multiprocessing.errors`), with more keys: `kind` is "error" for
    what was foreseen and a restart would not mend, "lost" where the error only says that another rank went away,
    "crash" for anything else.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not is_launched() or not path:
        return False
    is_lost = world_size() > 1 and isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    kind = "error" if isinstance(error, LlamaAccError) else "lost" if is_lost else "crash"
    now = time.time()
    record = {"rank": rank(), "hint": hint, "exit_code": exit_code, "kind": kind, "time": now}
    torch_part = {"message": message, "extraInfo": {"timestamp": str(int(now))}}
    Path(path).write_text(json.dumps({"message": torch_part, **record}), encoding="utf-8")
    return True


def join_slurm() -> str | None:
    """Under `srun` with several tasks, says in torch's variables what Slurm says in its own.

    The names are those of srun's manual, "OUTPUT ENVIRONMENT VARIABLES". SLURM_STEP_NUM_TASKS is only there inside a
    step, so a command in a batch script, outside srun, stays alone. So does one that is typed in the shell of
    `srun --pty`: that is task 0, whatever runs in it inherits its variables, and the other tasks have ended. Such a
    step has SLURM_PTY_*; SLURM_TASK_PID is the process that srun itself has started.

    Returns:
        A line for the user where a step of several tasks is not joined.
    """
    own = os.environ
    tasks, number = own.get("SLURM_STEP_NUM_TASKS", "1"), own.get("SLURM_PROCID", "")
    if "RANK" in own or not (tasks.isdecimal() and number.isdecimal()) or int(tasks) == 1:
        return None
    has_terminal = any(name.startswith("SLURM_PTY_") for name in own)
    if has_terminal and number == "0" and own.get("SLURM_TASK_PID") != str(os.getpid()):
        return f"this is the shell of a Slurm step: running alone, not as one of its {tasks} tasks; srun starts all"
    own["RANK"], own["WORLD_SIZE"] = number, tasks
    own["LOCAL_RANK"] = own.get("SLURM_LOCALID", "0")
    # Tasks on each node in Slurm's short form: "4(x2),3" is 4, 4, 3.
    short = re.findall(r"(\d+)(?:\(x(\d+)\))?", own.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    counts = [count for count, times in short for _ in range(int(times or 1))]
    own["LOCAL_WORLD_SIZE"] = counts[min(int(own.get("SLURM_NODEID", "0")), len(counts) - 1)]
    own.setdefault("MASTER_ADDR", first_host(own.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    own.setdefault("MASTER_PORT", str(_FIRST_PORT + int(own.get("SLURM_JOB_ID", "0")) % _PORTS))
    own[_SLURM_JOINED] = "1"
    return None


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: "gpu[07-09,12],login" begins with gpu07."""
    name, bracket, rest = re.match(r"([^,\[]*)(\[?)(.*)", nodes).groups()  # type: ignore[union-attr]
    if not bracket:
        return name
    ranges, _, after = rest.partition("]")
    return name + re.split(r"[-,]", ranges)[0] + re.split(r",", after)[0]
