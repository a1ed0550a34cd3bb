"""The command line as a test uses it: within this process where that is enough, in one of its own where it matters."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from typer.testing import CliRunner

from llama_acc.cli.app import app
from tests.core.ranks import free_port
from tests.undrawn import undrawn

COMMAND = [sys.executable, "-m", "llama_acc"]
# 32 items, four optimizer steps an epoch; a whole run takes a fraction of a second.
TINY = "model.params={dim: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, multiple_of: 16, max_seq_len: 256}"
QUICKSTART = ("finetune", "--recipe", "quickstart", "--device", "cpu", TINY, "train.warmup_epochs=0.5")
DRY = (*QUICKSTART, "--dry-run")
PATIENCE = 120.0  # seconds; only a test that has failed waits so long


class Result(Protocol):
    """What a command left."""

    exit_code: int
    stdout: str
    stderr: str
    output: str


def invoke(*arguments: object, input: str | bytes | None = None) -> Result:
    """Runs `llama-acc` in this process."""
    with undrawn() if "finetune" in arguments else nullcontext():
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input, env={"COLUMNS": "300"})


def complete(*arguments: object, input: str | bytes | None = None) -> Result:
    """Runs `llama-acc` in this process, which ends it with 0."""
    result = invoke(*arguments, input=input)
    assert result.exit_code == 0, result.stderr
    return result


class Started(subprocess.Popen[str]):
    """A process that does not outlive a test that fails: leaving its `with` would wait for it."""

    def __exit__(self, kind: type[BaseException] | None, *exc_info: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *exc_info)


def start(*arguments: object, launcher: Sequence[str] = (), **options: Any) -> "subprocess.Popen[str]":
    """Starts the real command, by `python -m LAUNCHER` if one is given. Its streams are pipes unless `options` say
    otherwise."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, *(["-m", *launcher] if launcher else []), *COMMAND[1:], *map(str, arguments)]
    return Started(command, **{**streams, "env": environment(), "encoding": "utf-8", **options})


def start_slurm_job(*arguments: object, ranks: int, **variables: str) -> "list[subprocess.Popen[str]]":
    """Starts the real command in that many processes, as `srun` does on one machine."""
    shared = {
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": str(ranks),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
        **variables,
    }
    places = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(ranks)]
    return [start(*arguments, env=environment(**shared, **place)) for place in places]


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


def run(*arguments: object, input: str | None = None, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Runs the real command to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        encoding="utf-8",
        env=environment(**variables),
        timeout=PATIENCE,
    )


def environment(**variables: str) -> dict[str, str]:
    """This process's, for a command that computes with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", **variables}


def words(text: str) -> str:
    """A message without the frame and the line breaks it is shown in."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text).strip()


def wait_until(happened: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Waits for something a running command does."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, f"it ended first: {process.communicate()}"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def lines_of(output: Path) -> int:
    """How many lines metrics.jsonl has so far."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics(output: Path) -> list[dict[str, Any]]:
    """The log, without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = ("tokens_per_second", "peak_memory_gib")
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def refused(result: Result, *parts: str, output: Path | None = None) -> None:
    """Asserts that it ended with 2, said all of `parts` on standard error only, and trained nothing."""
    said = words(result.stderr)
    assert result.exit_code == 2, (result.exit_code, said)
    assert result.stdout == ""
    assert "Traceback" not in said
    for part in parts:
        assert part in said, said
    if output is not None:
        assert not (output / "metrics.jsonl").exists()
        assert not (output / "latest").exists()
