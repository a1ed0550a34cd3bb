"""`llama-acc convert-data check`."""

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_acc.cli import console, options
from llama_acc.cli.check_report import print_reports
from llama_acc.cli.preview import show_items, to_json
from llama_acc.core.errors import UserError
from llama_acc.core.units import count_text

if TYPE_CHECKING:
    from llama_acc.core.data.check import FileReport
    from llama_acc.core.data.preview import Shown
    from llama_acc.core.data.sources import FileSpec
    from llama_acc.core.tokenizer import Tokenizer

HELP = """Read every item of data files, tell what is wrong or doubtful, and show items as a model will see them.

Ends with 2 if anything would stop a run.

Examples:

  llama-acc convert-data check alpaca.json

  llama-acc convert-data check data/*.jsonl --tokenizer Llama-2-7b --max-tokens 2048 --plot lengths.png

  llama-acc convert-data check lima.json --tokenizer Llama-2-7b --preview 5
"""

_SHOWN = 5
"""Findings of a kind that are shown without --all."""
_IN_PLOT = 8
"""Files that a picture shows apart."""


def check(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Data: files, folders, globs or downloaded names.", callback=options.given
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="FILE|DIR",
            help="The model's tokenizer or folder: lengths in tokens, what is cut.",
            callback=options.given,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", metavar="N", min=2, help="What data.max_tokens would be: longer items are cut."),
    ] = None,
    template: options.Template = "auto",
    format: Annotated[
        str,
        typer.Option("--format", metavar="KIND", help="Kind of items: auto, single_turn, dialogue, single_turn_llava."),
    ] = "auto",
    preview: Annotated[
        int, typer.Option("--preview", metavar="N", min=0, help="Show the first N items as the model will see them.")
    ] = 0,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw the lengths as a picture.", callback=options.given),
    ] = None,
    image_root: Annotated[
        str | None,
        typer.Option(
            "--image-root",
            metavar="DIR",
            help="Where the images' relative paths begin; without it, beside the data.",
            callback=options.given,
        ),
    ] = None,
    image_positions: Annotated[
        int,
        typer.Option(
            "--image-positions", metavar="N", min=0, help="Places that an image takes in the model: 34 with a Q-Former."
        ),
    ] = 0,
    no_images: Annotated[bool, typer.Option("--no-images", help="Do not open the items' images.")] = False,
    all_findings: Annotated[bool, typer.Option("--all", help="List all findings, not the first of each kind.")] = False,
    as_json: options.Json = False,
) -> None:
    """Check data files."""
    from llama_acc.cli.download import fetch_shown
    from llama_acc.core.data.check import check_files
    from llama_acc.core.data.sources import Source, expand
    from llama_acc.core.data.survey import EXAMPLES
    from llama_acc.core.recipe import Images

    if max_tokens is not None and tokenizer is None:
        raise UserError("--max-tokens counts tokens: it needs --tokenizer", "give the model's: --tokenizer Llama-2-7b")
    _check_plot(plot)
    loaded = None if tokenizer is None else _tokenizer(tokenizer)
    sources = [Source(file, format, template, root=image_root) for file in files]
    specs = expand(sources, fetch=fetch_shown, otherwise="name a file, a folder, a glob or a download")
    with console.ByteProgress() as progress:
        reports = check_files(
            specs,
            loaded,
            max_tokens,
            image_positions=image_positions,
            max_pixels=None if no_images else Images().max_pixels,
            most=None if all_findings else EXAMPLES,
            progress=lambda path, done: progress.tell(f"checking {path.name}", done, path.stat().st_size),
        )
    shown = _shown(specs, preview, loaded, max_tokens, image_positions)
    if plot is not None:
        _plot(reports, max_tokens, plot)
    if as_json:
        result = {"fatal": sum(r.fatal for r in reports), "files": [r.to_json() for r in reports]}
        typer.echo(json.dumps({**result, "preview": list(map(to_json, shown))} if preview else result, indent=1))
    else:
        print_reports(reports, None if all_findings else _SHOWN)
        if shown:
            console.out.print()
            show_items(shown)
    _end(reports)


def _check_plot(plot: Path | None) -> None:
    """Finds what could not be written in the end."""
    if plot is None:
        return
    if plot.suffix.lower() != ".png":
        raise UserError(f"{plot}: the picture is a PNG", f"--plot {plot.with_suffix('.png')}")
    if not plot.parent.is_dir():
        raise UserError(f"cannot write {plot}: there is no folder {plot.parent}")


def _tokenizer(name: str) -> "Tokenizer":
    from llama_acc.core.home import home
    from llama_acc.core.tokenizer import find_tokenizer, load_tokenizer

    path = Path(name).expanduser()
    downloaded = home() / "models" / name
    if not path.exists() and downloaded.is_dir():
        path = downloaded
    return load_tokenizer((find_tokenizer(path) if path.is_dir() else None) or path)


def _shown(
    specs: "list[FileSpec]",
    count: int,
    tokenizer: "Tokenizer | None",
    max_tokens: int | None,
    image_positions: int,
) -> "list[Shown]":
    """The first items that can be trained on, each in the format of its file."""
    from llama_acc.core.data.check import first_items
    from llama_acc.core.data.preview import shown_items
    from llama_acc.core.data.templates import format_for

    shown: list[Shown] = []
    for spec, kind, where, item in first_items(specs, count):
        template = format_for(spec.template, kind, tokenizer)
        one = [(f"{spec.path.name} {where}", item)]
        shown += shown_items(one, template, tokenizer, max_tokens, image_positions)
    return shown


def _plot(reports: "list[FileReport]", max_tokens: int | None, path: Path) -> None:
    from llama_acc.core.data.histogram import plot_lengths

    lengths = {str(report.path): report.lengths for report in reports if report.lengths}
    if not lengths:
        raise UserError("there is nothing to draw: no item could be read")
    if len(lengths) > _IN_PLOT:
        lengths = {f"{len(lengths)} files": sum(lengths.values(), Counter())}
    names = {name: Path(name).name for name in lengths}
    if len(set(names.values())) == len(names):
        lengths = {names[name]: counts for name, counts in lengths.items()}
    plot_lengths(lengths, reports[0].unit, max_tokens, path)
    console.note(f"wrote {path}")


def _end(reports: "list[FileReport]") -> None:
    """Raises what ends the command with 2, if anything would stop a run."""
    from llama_acc.core.data.findings import KINDS, other_form

    rows = sum(report.survey.rows for report in reports)
    wrong = sum(report.wrong for report in reports)
    broken = [report for report in reports if report.error is not None]
    if broken:
        raise UserError(
            f"{len(broken)} of {count_text(len(reports), 'file')} cannot be read to the end",
            "mend or leave out: see above",
        )
    if wrong:
        hint = "mend them, or let a run leave them out: data.on_error=skip"
        kinds = {kind for report in reports for kind in report.findings.counts if KINDS[kind].fatal}
        if kinds == {"image_file"}:
            hint = "say where the images are: --image-root DIR, in a recipe data.sources.root"
        elif wrong == rows:
            hint = other_form(kinds, shlex.quote(str(reports[0].path)))
        raise UserError(f"{wrong:,} of {count_text(rows, 'item')} cannot be trained on", hint)
