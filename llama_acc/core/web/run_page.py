"""A page of runs over each other: their curves, what they answered to sample prompts, and how their recipes differ. It
follows those that are running. Imports no torch.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_yaml
from llama_acc.core.train.runs import METRICS, SAMPLES, Run, find_runs, flat, is_sample, read_lines, read_metrics
from llama_acc.core.web.site import in_html

_CURVES = {
    "loss": "Training loss per label token",
    "validation_loss": "Validation loss per label token",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "peak_memory_gib": "Peak memory in GiB",
}
_POINTS = 400  # of a curve; each is the mean of its part of the steps
_SAMPLED = 20  # so many different answers to a prompt are shown, the last ones
_FIRST = 6  # so many runs are shown at first, those that wrote last
_EVERY = 2.0  # seconds


def run_page(folders: Sequence[Path]) -> gr.Blocks:
    """The page of the runs in and below these folders; there is one."""
    names = [run.folder for run in find_runs(*folders)]
    # What tells them from each other.
    above = os.path.commonpath([str(Path(name).absolute().parent) for name in names])
    titles = {name: os.path.relpath(name, above) for name in names}
    page = gr.Blocks(title="llama-acc runs", analytics_enabled=False, fill_width=True)
    with page:
        choices = [(title, name) for name, title in titles.items()]
        chosen = gr.CheckboxGroup(choices, value=names[:_FIRST], label="Runs", elem_id="runs", min_width=280)
        state = gr.HTML()
        with gr.Tab("Curves"), gr.Row():
            curves = [
                gr.LinePlot(
                    x="step",
                    y=key,
                    color="run",
                    title=title,
                    x_title="optimizer step",
                    y_title=" ",
                    height=260,
                    min_width=330,
                    tooltip="all",
                    buttons=["fullscreen"],
                    elem_classes="curve",
                )
                for key, title in _CURVES.items()
            ]
        with gr.Tab("Sample answers"):
            samples = gr.HTML()
        with gr.Tab("Recipes"):
            recipes = gr.HTML()
        shown = gr.State()

        def show(chosen: list[str], before: Any) -> list[Any]:
            """All of it, unless nothing has changed since it was shown."""
            now = [chosen, *_stamps(chosen)]
            if now == before:
                return [gr.skip()] * (len(_CURVES) + 4)
            runs = {titles[name]: Path(name) for name in chosen}
            lines = {title: read_metrics(folder / METRICS)[0] for title, folder in runs.items()}
            plots = [curve(lines, key) for key in _CURVES]
            states = [run for run in find_runs(*folders) if run.folder in chosen]
            return [now, state_table(states, titles), *plots, sample_table(runs), recipe_table(runs)]

        for event in (page.load, chosen.change, gr.Timer(_EVERY).tick):
            event(show, [chosen, shown], [shown, state, *curves, samples, recipes], show_progress="hidden")
    return page


def _stamps(names: Iterable[str]) -> Iterator[list[int]]:
    for path in (Path(name) / file for name in names for file in (METRICS, SAMPLES, "report.md")):
        status = path.stat() if path.is_file() else None
        yield [] if status is None else [status.st_size, status.st_mtime_ns]


def curve(lines: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> pd.DataFrame:
    """A value over the steps of each run, thinned out; values that are not finite are left out."""
    rows = []
    for run, of_run in lines.items():
        points = [(line["step"], line[key]) for line in of_run if math.isfinite(line.get(key, math.nan))]
        size = -(-len(points) // _POINTS) or 1
        for start in range(0, len(points), size):
            part = points[start : start + size]
            rows.append((part[-1][0], sum(value for _, value in part) / len(part), run))
    return pd.DataFrame(rows, columns=["step", key, "run"])


def state_table(runs: Iterable[Run], titles: Mapping[str, str]) -> str:
    """How far runs are, as `llama-acc runs` says it."""
    rows = [["run", "recipe", "base", "method", "state", "step", "loss", "validation"]]
    for run in runs:
        step = None if run.step is None else f"{run.step:,}/{run.total_steps:,}"
        losses = (None if loss is None else f"{loss:.4f}" for loss in (run.loss, run.validation_loss))
        state = run.state if run.problem is None else f"{run.state}: {run.problem}"
        cells = [titles.get(run.folder), run.recipe, run.base, run.method, state, step, *losses]
        rows.append(["-" if cell is None else cell for cell in cells])
    return _table(rows)


def sample_table(runs: Mapping[str, Path]) -> str:
    """What each run answered to each prompt since which step, the last answer first."""
    answers: dict[str, dict[int, dict[str, str]]] = {}
    for title, folder in runs.items():
        for line in read_lines(folder / SAMPLES, is_sample)[0]:
            answers.setdefault(line["prompt"], {}).setdefault(line["step"], {})[title] = line["answer"]
    rows = []
    for prompt, by_step in answers.items():
        changed: list[list[str]] = []
        for step, said in sorted(by_step.items()):
            cells = [said.get(title, "") for title in runs]
            if not changed or changed[-1][1:] != cells:
                changed.append([f"{step:,}", *cells])
        rows += [["" if place else prompt, *row] for place, row in enumerate(changed[: -_SAMPLED - 1 : -1])]
    return _table([["prompt", "since step", *runs], *rows]) if rows else _table([["No run has sample prompts."]])


def recipe_table(runs: Mapping[str, Path]) -> str:
    """The keys in which the recipes of runs differ; of a single run, all of them."""
    recipes = []
    for folder in runs.values():
        try:
            values = flat(read_yaml(folder / "recipe.yaml"))
            recipes.append({key: str(value) for key, value in values.items()})
        except UserError as error:
            recipes.append({"damaged": error.message})
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [[key, *(recipe.get(key, "-") for recipe in recipes)] for key in keys]
    rows = [row for row in rows if len(runs) == 1 or len({*row[1:]}) > 1]
    return _table([["key", *runs], *rows]) if rows else _table([["The recipes are the same."]])


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; nothing in it is markup."""
    lines = []
    for place, row in enumerate(rows):
        kind = "td" if place else "th"
        lines.append("".join(f"<{kind}>{in_html(cell)}</{kind}>" for cell in row))
    return f'<div class="scrolled"><table class="sheet">{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
