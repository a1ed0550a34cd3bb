"""Functions run by several real processes at once, joined by gloo over the loopback."""

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds; only a test that has failed waits so long


_PORTS = iter(range(10_000 + os.getpid() % 500 * 40, 32_000, 40))


def free_port() -> int:
    """A port nobody listens on, with room for `next_port` after it.

    It is below those that the system gives out itself: those of gloo's own connections follow each other.
    """
    for port in _PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def run_ranks(count: int, function: str, *, variables: Mapping[str, str] = {}, **arguments: Any) -> list[Any]:
    """Calls `module:function(**arguments)` in that many processes; what each returns, by rank. All of it is JSON.

    `variables` are set in the processes' environment, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.json" for rank in range(count)]
        logs = [path.with_suffix(".log") for path in results]
        processes = []
        for rank in range(count):
            command = [sys.executable, "-m", __name__, function, json.dumps(arguments), str(results[rank])]
            with logs[rank].open("w") as log:
                processes.append(
                    subprocess.Popen(command, env={**_environment(rank, count), **variables}, stdout=log, stderr=log)
                )
        try:
            codes = [process.wait(PATIENCE) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert not any(codes), "\n".join(f"rank {i} ({codes[i]}):\n{log.read_text()}" for i, log in enumerate(logs))
        return [json.loads(path.read_text()) for path in results]


_PORT = 0


def _environment(rank: int, count: int) -> dict[str, str]:
    global _PORT
    _PORT = free_port() if rank == 0 else _PORT
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_PORT),
        "OMP_NUM_THREADS": "1",
    }


def next_port() -> None:
    """The next process group of this process meets at another port: the last one's may not be free yet."""
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    returned = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(returned))
