"""`llama-acc runs`."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from llama_acc.cli import console, options, web
from llama_acc.core.errors import UserError


def runs(
    folders: Annotated[
        list[Path] | None,
        Argument(metavar="[FOLDER]...", help="Look here and below; without any, in runs."),
    ] = None,
    as_json: options.Json = False,
    as_page: web.Web = False,
    host: web.Host = web.HOST,
    port: web.Port = web.PORT,
) -> None:
    """List runs: what they train, how far they are, and whether they are running; the newest first.

    Examples:

      llama-acc runs

      llama-acc runs /data/experiments --json

      llama-acc runs --web runs/alpaca runs/alpaca-lora
    """
    from llama_acc.core.train.runs import find_runs

    folders = folders or [Path("runs")]
    found = find_runs(*folders)
    if as_json:
        return typer.echo(json.dumps([asdict(run) for run in found], indent=1))
    if not found:
        where = ", ".join(map(str, folders))
        raise UserError(f"there is no run in {where} or below", "a run is what `llama-acc finetune` leaves")
    if as_page:
        listener = web.listen(host, port)
        from llama_acc.core.web.run_page import run_page

        return web.serve_page(listener, lambda: run_page(folders))
    rows = [["run", "recipe", "base", "method", "state", "wrote", "step", "loss", "validation", "tokens/s"]]
    for run in found:
        step = None if run.step is None else f"{run.step:,}/{run.total_steps:,}"
        losses = (None if loss is None else f"{loss:.4f}" for loss in (run.loss, run.validation_loss))
        speed = None if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"
        ago = f"{console.duration(max(0.0, time.time() - run.seen))} ago"
        cells = [run.folder, run.recipe, run.base, run.method, run.state, ago, step, *losses, speed]
        rows.append(["-" if cell is None else cell for cell in cells])
    console.table(rows, "<<<<<>")
    for run in found:
        if run.problem is not None:
            console.note(f"{run.folder} is damaged: {run.problem}")
    return None
