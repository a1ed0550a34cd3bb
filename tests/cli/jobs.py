"""Commands in several processes: who their workers are, and whether they are gone."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.core.ranks import free_port

PATIENCE = 120.0  # seconds; only a test that has failed waits so long


def start_job(
    *words: object, launcher: tuple[str, ...] = (), folder: Path, **variables: str
) -> "subprocess.Popen[str]":
    """Starts `llama-acc WORDS`, by `python -m LAUNCHER` if one is given."""
    python = (sys.executable, "-m", *launcher) if launcher else (sys.executable,)
    return subprocess.Popen(
        [str(word) for word in (*python, "-m", "llama_acc", *words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        cwd=folder,
    )


def start_slurm_job(*words: object, ranks: int, folder: Path, **variables: str) -> "list[subprocess.Popen[str]]":
    """Starts `llama-acc WORDS` in that many processes, as `srun` does on one machine."""
    shared = {
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": str(ranks),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
        **variables,
    }
    places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(ranks)]
    return [start_job(*words, folder=folder, **shared, **place) for place in places]


def workers_of(process: "subprocess.Popen[str]") -> dict[int, int]:
    """Process ids of a launcher's running workers, by rank."""
    found = {}
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for pid in children.read_text().split():
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [word.removeprefix(b"RANK=") for word in words if word.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0])] = int(pid)
    return found


def gone(pids: list[int]) -> bool:
    """Whether all these processes end."""
    deadline = time.monotonic() + 30
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(_is_running, pids))


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
