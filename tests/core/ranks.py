"""Functions run by several real processes at once, joined by gloo over the loopback."""

import importlib
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

PATIENCE = 300.0  # seconds; only a test that has failed waits so long

# Ranks are forked from a process that has imported what most of them need: each would take seconds for it.
multiprocessing.set_forkserver_preload(["tests.core.train.parallel_work", "torch.distributed.fsdp", "transformers"])
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

    With `variables`, which are set in their environment, too, they are started anew: libraries read some at once.
    """
    everywhere = {
        **os.environ,
        **variables,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": variables.get("OMP_NUM_THREADS", "1"),
    }
    context: Any = multiprocessing.get_context("spawn" if variables else "forkserver")
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.json" for rank in range(count)]
        processes = []
        for rank, result in enumerate(results):
            environment = {**everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(context.Process(target=_work, args=(function, arguments, environment, result)))
            with mock.patch.dict(os.environ, environment):
                processes[-1].start()
        try:
            for process in processes:
                process.join(PATIENCE)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        logs = [result.with_suffix(".log").read_text() for result in results]
        assert codes == [0] * count, "\n".join(f"rank {i} ({codes[i]}):\n{log}" for i, log in enumerate(logs))
        return [json.loads(path.read_text()) for path in results]


def _work(function: str, arguments: Mapping[str, Any], environment: Mapping[str, str], result: Path) -> None:
    """What a rank does."""
    log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.fsync = lambda descriptor: None  # see tests/conftest.py
    module, _, name = function.partition(":")
    result.write_text(json.dumps(getattr(importlib.import_module(module), name)(**arguments)))


def next_port() -> None:
    """The next process group of this process meets at another port: the last one's may not be free yet."""
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
