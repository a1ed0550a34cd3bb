"""Where servers listen, and pages for a browser, which are served until Ctrl-C."""

import ipaddress
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llama_acc.cli import console
from llama_acc.core.errors import UserError

if TYPE_CHECKING:
    from gradio import Blocks

    from llama_acc.core.generate.load import LoadedModel
    from llama_acc.core.generate.sampling import Sampling

_PANEL = "In a browser"
Web = Annotated[bool, Option("--web", help="As a page (pip install 'llama-acc[web]').", rich_help_panel=_PANEL)]
Host = Annotated[str, Option(metavar="ADDRESS", help="With --web: a loopback address.", rich_help_panel=_PANEL)]
Port = Annotated[int, Option(min=0, max=65535, help="With --web; 0 takes a free one.", rich_help_panel=_PANEL)]
HOST, PORT = "127.0.0.1", 7860
_TABS = 4  # answers under way at a time, if there is memory


def listen(host: str, port: int) -> socket.socket:
    """A socket for a page, before anything is loaded for minutes.

    Raises:
        UserError: the address is none of loopback, or taken; Gradio is not installed.
    """
    if not is_loopback(host):
        raise UserError(
            f"on {host} anybody in the network could use the page: it has no password",
            f"from elsewhere, ssh -L {port}:localhost:{port} leads to it; programs are served by `llama-acc serve`",
        )
    try:
        from gradio import Blocks  # noqa: F401
    except ImportError as error:
        raise UserError(f"--web needs {error.name}", "pip install 'llama-acc[web]'") from None
    return bound(host, port)


def serve_page(listener: socket.socket, make_page: "Callable[[], Blocks]") -> None:
    """Serves a page until a signal comes."""
    import uvicorn

    from llama_acc.core.web.site import make_app

    app = make_app(make_page())
    # What is open when the signal comes: each tab's connection, which would not end by itself.
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, server_header=False)
    address, port = listener.getsockname()[:2]
    listener.listen(128)  # who opens it from here on waits until the server is ready
    console.note(f"open http://{f'[{address}]' if ':' in address else address}:{port} in a browser; Ctrl-C ends it")
    uvicorn.Server(config).run([listener])


def serve_chat(
    listener: socket.socket, models: "Mapping[str, LoadedModel]", sampling: "Sampling", system: str | None
) -> None:
    """Serves a page to talk to models, each with an engine of its own; see `serve_page`."""
    from llama_acc.core.generate.engine import Engine, slots_for
    from llama_acc.core.generate.service import Service
    from llama_acc.core.web.chat_page import ChatPage, Served

    with ExitStack() as running:
        served = []
        for folder, loaded in models.items():
            engine = Engine(loaded, min(_TABS, slots_for(loaded, loaded.model.config.max_seq_len)))
            served.append(Served(folder, loaded, running.enter_context(Service(engine).running())))
        serve_page(listener, lambda: ChatPage(served, sampling, system).blocks)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket with that address, which does not listen yet."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror}", "choose another with --port"
        ) from None
    return listener
