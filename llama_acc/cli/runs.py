"""`llama-acc runs`."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from llama_acc.cli import console, options
from llama_acc.core.errors import UserError


def runs(
    folder: Annotated[Path, Argument(help="They are looked for here and below.")] = Path("runs"),
    as_json: options.Json = False,
) -> None:
    """List runs: what they train, how far they are, and whether they are running; the newest first.

    Examples:

      llama-acc runs

      llama-acc runs /data/experiments --json
    """
    from llama_acc.core.train.runs import find_runs

    found = find_runs(folder)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in found], indent=1))
        return
    if not found:
        raise UserError(f"there is no run in {folder} or below", "a run is what `llama-acc finetune` leaves")
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
