"""A server in a thread of the test, as `llama-acc serve` runs it in its main thread."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from llama_acc.core.generate.engine import Engine
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.generate.service import Service
from llama_acc.core.serve.app import make_app
from llama_acc.core.serve.guard import Access

PATIENCE = 60.0  # seconds; only a test that has failed waits so long


@dataclass
class Running:
    """A server that answers."""

    url: str
    service: Service


@contextmanager
def serving(
    models: dict[str, LoadedModel],
    slots: int = 4,
    queue: int = 64,
    access: Access | None = None,
) -> Iterator[Running]:
    """Serves models on a free port of loopback."""
    service = Service(Engine(next(iter(models.values())), slots), queue)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(make_app(models, service, access or Access()), log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, args=([listener],))
    with service.running():
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
        finally:
            server.should_exit = True
            thread.join()


def until(condition: Callable[[], bool]) -> None:
    """Waits for something."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
