"""What a process knows of the others before it joins them, and how it tells its end. Imports no torch.

A launcher (this toolkit's, torchrun, Slurm) says in the environment which of how many processes this is: RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

import ctypes
import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass

from llama_acc.core.errors import LlamaAccError

LAUNCHER = "LLAMA_ACC_LAUNCHER"
"""Set by `launch.py` in the workers' environment: its process id."""

_PR_SET_PDEATHSIG = 1
_FIRST_PORT, _PORTS = 15000, 10000
# How gloo, NCCL and torch's store say that another process went away.
_LOST = re.compile(
    r"closed by (the )?(remote )?peer|reset by peer|broken pipe|connection (was )?(closed|refused|aborted)|"
    r"ncclRemoteError|remote process exited|socket (timeout|closed|error)|timed? ?out|aborted communicators|"
    r"TCPStore|DistStoreError|DistNetworkError|peer",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Ending:
    """How a worker ended: what it leaves for its launcher.

    Attributes:
        message: what is wrong.
        hint: what to try.
        exit_code: of the process.
        kind: "error": foreseen, a restart would not help; "crash": anything else; "lost": another rank went away.
        time: seconds since 1970.
    """

    message: str
    hint: str | None
    exit_code: int
    kind: str
    time: float


def rank() -> int:
    """This process's number among all, 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes run together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process speaks for all."""
    return rank() == 0


def is_launched() -> bool:
    """Whether this toolkit's launcher started this process."""
    return LAUNCHER in os.environ


def was_restarted() -> bool:
    """Whether a launcher started this process anew, after one of its kind died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def die_with_launcher() -> None:
    """Has the system kill this process when its launcher is killed: nothing must go on unseen."""
    if not is_launched() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it died before the line above
        os._exit(1)


def lost_another_rank(error: BaseException) -> bool:
    """Whether an error only says that another process went away."""
    return world_size() > 1 and isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def set_teller(error: Exception, rank: int) -> None:
    """Notes that all ranks end with an error which this one of them had."""
    vars(error)["told_by"] = rank


def teller(error: Exception) -> int | None:
    """The rank that had the error all ranks end with; None = it is this rank's own."""
    rank: int | None = vars(error).get("told_by")
    return rank


def record_end(error: BaseException, message: str, hint: str | None, exit_code: int) -> bool:
    """Leaves word of this worker's end for the launcher. False if there is none of this toolkit."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not is_launched() or not path:
        return False
    kind = "error" if isinstance(error, LlamaAccError) else "lost" if lost_another_rank(error) else "crash"
    now = time.time()
    ending = Ending(message, hint, exit_code, kind, now)
    with open(path, "w", encoding="utf-8") as file:
        # The form that torch's elastic agent reads.
        told = {"message": message, "extraInfo": {"timestamp": str(int(now))}}
        json.dump({"message": told, "ending": asdict(ending)}, file)
    return True


def join_slurm() -> None:
    """Under `srun` with several tasks, says in torch's variables what Slurm says in its own.

    The names are those of srun's manual, "OUTPUT ENVIRONMENT VARIABLES". SLURM_STEP_NUM_TASKS is only there inside a
    step, so a command in a batch script, outside srun, stays alone.
    """
    own = os.environ
    if "RANK" in own or int(own.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or "SLURM_PROCID" not in own:
        return
    own["RANK"], own["WORLD_SIZE"] = own["SLURM_PROCID"], own["SLURM_STEP_NUM_TASKS"]
    own["LOCAL_RANK"] = own.get("SLURM_LOCALID", "0")
    node = int(own.get("SLURM_NODEID", "0"))
    own["LOCAL_WORLD_SIZE"] = str(_repeated(own.get("SLURM_STEP_TASKS_PER_NODE", "1"))[node])
    own.setdefault("MASTER_ADDR", first_host(own.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    own.setdefault("MASTER_PORT", str(_FIRST_PORT + int(own.get("SLURM_JOB_ID", "0")) % _PORTS))


def _repeated(counts: str) -> list[int]:
    """Slurm's short form: "4(x2),3" is 4, 4, 3."""
    numbers = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        numbers += [int(count)] * int(times or 1)
    return numbers


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: "gpu[07-09,12],login" begins with gpu07."""
    name, bracket, rest = re.match(r"([^,\[]*)(\[?)(.*)", nodes).groups()  # type: ignore[union-attr]
    if not bracket:
        return name
    ranges, _, after = rest.partition("]")
    return name + re.split(r"[-,]", ranges)[0] + re.split(r",", after)[0]
