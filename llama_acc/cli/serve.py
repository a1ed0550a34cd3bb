"""`llama-acc serve`: a model for programs that speak OpenAI's protocol."""

import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llama_acc.cli import console, options
from llama_acc.cli.options import ModelOptions, launch_model, load_models_distributed
from llama_acc.cli.web import bound, is_loopback
from llama_acc.core.distributed import environment
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.text import count_text, escape_control_chars

if TYPE_CHECKING:
    from fastapi import FastAPI
    from uvicorn import Server

    from llama_acc.core.generate.service import Service

_KEY = "LLAMA_ACC_API_KEY"
_OPTIONS = "Who may ask"


def serve(
    ckpt: Annotated[
        list[str],
        Option(
            "--ckpt",
            metavar="[NAME=]DIR",
            help="Checkpoint or run folder; may repeat: a later one overrides, as in chat. With NAME=: one more model "
            "under that name, laid over the first checkpoint.",
        ),
    ],
    host: Annotated[str, Option(metavar="ADDRESS", help="Where to listen; any but loopback needs --api-key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    context: options.Context = None,
    slots: Annotated[
        int | None,
        Option(min=1, max=1024, help="Replies under way at a time; without it, as many as free memory holds."),
    ] = None,
    queue: Annotated[int, Option(min=0, help="Requests that may wait for a slot; others get 429.")] = 64,
    grace: Annotated[int, Option(min=0, metavar="SECONDS", help="For running answers, when it is stopped.")] = 30,
    api_key: Annotated[
        str | None,
        Option(
            envvar=_KEY,
            show_envvar=False,
            callback=options.matching("[!-~]+", "a key is of visible ASCII characters, without spaces."),
            help=f"What clients must bring. In a script, set {_KEY}: others may see a command's flags.",
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="Another name clients call it by; may repeat.", rich_help_panel=_OPTIONS),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        Option(
            metavar="URL",
            help="Pages from there may ask (CORS), such as https://chat.example.org; may repeat.",
            rich_help_panel=_OPTIONS,
        ),
    ] = None,
    template: options.Template = "auto",
    tokenizer: options.TokenizerFile = None,
    quantize: options.Quantize = None,
    stream: options.Stream = False,
    device: options.Device = None,
    verify: options.Verify = False,
    nproc: options.Nproc = None,
) -> None:
    """Serve a model to programs that speak OpenAI's protocol (extra: serve).

    Examples:

      llama-acc serve --ckpt runs/alpaca

      llama-acc serve --ckpt Llama-2-7b --ckpt alpaca=runs/alpaca-lora --ckpt lima=runs/lima-lora

      LLAMA_ACC_API_KEY=... llama-acc serve --ckpt runs/alpaca --host 0.0.0.0
    """
    checkpoints = _named(ckpt)
    if not is_loopback(host) and api_key is None:
        raise UserError(
            f"on {host} anybody in the network could ask: set a key",
            f"{_KEY}=... in the environment, or --api-key; clients send it as OpenAI's",
        )
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serve needs {error.name}", "pip install 'llama-acc[serve]'") from None
    first = next(iter(checkpoints.values()))
    launch_model(nproc, device, first)
    listener = bound(host, port) if environment.is_main() else None
    model = ModelOptions(first, device, tokenizer, template, verify, quantize, context, stream)
    with load_models_distributed(model, checkpoints) as models:
        if listener is None:
            return
        from llama_acc.core.generate.engine import Engine
        from llama_acc.core.generate.service import Service
        from llama_acc.core.serve.app import make_app
        from llama_acc.core.serve.guard import Access

        names = {"localhost", socket.gethostname(), host, *(allow_host or [])}
        access = Access(api_key, [name.lower() for name in names], allow_origin or [])
        engine = Engine(next(iter(models.values())), slots, context)
        service = Service(engine, queue)
        server = _server(make_app(models, service, access), service, grace)
        service.on_failure = lambda: setattr(server, "should_exit", True)
        address, port = listener.getsockname()[:2]
        where = f"http://{f'[{address}]' if ':' in address else address}:{port}/v1"
        what = ", ".join(map(escape_control_chars, models))
        room = f"{count_text(engine.slots, 'slot')} of {count_text(engine.context, 'token')}"
        listener.listen(128)  # who asks from here on waits until the server is ready
        console.note(f"serving {what} at {where} ({room}); Ctrl-C ends it")
        with service.running():
            server.run([listener])
        if service.failure is not None:
            raise RunError(f"the engine has failed: {service.failure}") from service.failure


def _named(ckpt: list[str]) -> dict[str, list[str]]:
    """The checkpoints of each model, by its name; the first one has the base."""
    base, named = [], dict[str, str]()
    for given in ckpt:
        name, equals, folder = given.partition("=")
        if not equals or Path(given).expanduser().exists():
            base.append(given)
        elif not name or not folder:
            raise UserError(f"--ckpt {given} should be NAME=DIR")
        elif name in named:
            raise UserError(f"--ckpt: the name {name} is there twice")
        else:
            named[name] = folder
    if not base and len(named) > 1:
        raise UserError("checkpoints with a name are laid over one without", "add --ckpt BASE in front")
    if not base:
        return {name: [folder] for name, folder in named.items()}
    own = Path(os.path.abspath(Path(base[-1]).expanduser())).name
    if own in named:
        raise UserError(f"--ckpt: the name {own} is that of {base[-1]} too", "choose another name")
    return {own: base} | {name: [base[0], folder] for name, folder in named.items()}


def _server(app: "FastAPI", service: "Service", grace: int) -> "Server":
    """One line on standard error for each request; replies that have not ended `grace` seconds after a signal are
    cancelled."""
    import asyncio

    from uvicorn import Config, Server

    class GracefulServer(Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(grace, service.close)
            await super().shutdown(sockets)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("uvicorn.access", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    # Some seconds more for what is then sent; see `Server.shutdown`.
    most = grace + 10
    config = Config(app, log_config=None, timeout_graceful_shutdown=most, server_header=False, lifespan="off")
    return GracefulServer(config)
