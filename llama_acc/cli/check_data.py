"""`llama-acc convert-data check`."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text
from typer import Argument, Option

from llama_acc.cli import console, options
from llama_acc.core.errors import UserError
from llama_acc.core.text import count_text

if TYPE_CHECKING:
    from llama_acc.core.data.check import FileReport


_SHOWN = 5  # findings of a kind that are shown without --all
_BAR = 40  # width of the longest bar


def check(
    files: Annotated[list[str], Argument(metavar="FILE...", help="Data: files, folders, globs or downloaded names.")],
    tokenizer: Annotated[str | None, Option(metavar="FILE|DIR", help="The model's: lengths in tokens.")] = None,
    max_tokens: Annotated[
        int | None, Option(metavar="N", min=2, help="What data.max_tokens would be: longer items are cut.")
    ] = None,
    template: options.Template = "auto",
    format: Annotated[
        str, Option(metavar="KIND", help="auto, single_turn, dialogue, single_turn_llava, text.")
    ] = "auto",
    preview: Annotated[int, Option(metavar="N", min=0, help="Show the first N items as the model will see them.")] = 0,
    plot: options.Plot = None,
    image_root: Annotated[
        str | None, Option(metavar="DIR", help="Where the images' relative paths begin; else beside the data.")
    ] = None,
    image_positions: Annotated[
        int, Option(metavar="N", min=0, help="Positions that an image takes in the model: 34 with a Q-Former.")
    ] = 0,
    no_images: Annotated[bool, Option("--no-images", help="Do not open the items' images.")] = False,
    all_findings: Annotated[bool, Option("--all", help="List all findings, not the first of each kind.")] = False,
    as_json: options.Json = False,
) -> None:
    """Read every item of data files, report errors and warnings, and show items as a model will see them.

    Ends with 2 if anything would stop a run.

    Examples:

      llama-acc convert-data check alpaca.json

      llama-acc convert-data check data/*.jsonl --tokenizer Llama-2-7b --max-tokens 2048 --plot lengths.png

      llama-acc convert-data check lima.json --tokenizer Llama-2-7b --preview 5
    """
    console.working("loading the checks")
    from llama_acc.cli.download import fetch_shown
    from llama_acc.core.catalogue import named_model
    from llama_acc.core.data.check import check_files, plot_lengths
    from llama_acc.core.data.findings import EXAMPLES
    from llama_acc.core.data.preview import first_items
    from llama_acc.core.data.sources import Source, expand
    from llama_acc.core.recipe import ImagesSection
    from llama_acc.core.tokenizer import load_tokenizer

    if max_tokens is not None and tokenizer is None:
        raise UserError("--max-tokens counts tokens: it needs --tokenizer", "give the model's: --tokenizer Llama-2-7b")
    known = tokenizer if tokenizer is None or Path(tokenizer).expanduser().exists() else named_model(tokenizer)
    loaded = None if tokenizer is None else load_tokenizer(known or tokenizer)
    sources = [Source(file, format, template, root=image_root) for file in files]
    specs = expand(sources, fetch=fetch_shown, missing_hint="name a file, a folder, a glob or a download")
    with console.Progress() as progress:
        reports = check_files(
            specs,
            loaded,
            max_tokens,
            image_positions=image_positions,
            max_pixels=None if no_images else ImagesSection().max_pixels,
            most=None if all_findings else EXAMPLES,
            progress=lambda path, done: progress(f"checking {path.name}", done, path.stat().st_size),
        )
    shown = first_items(specs, preview, loaded, max_tokens, image_positions)
    if plot is not None:
        plot_lengths(reports, max_tokens, plot)
        console.note(f"wrote {plot}")
    if as_json:
        result = {"fatal": sum(r.fatal for r in reports), "files": [r.to_json() for r in reports]}
        if preview:
            result["preview"] = [
                {**one._asdict(), "pieces": [piece._asdict() for piece in one.pieces]} for one in shown
            ]
        typer.echo(json.dumps(result, indent=1))
    else:
        for number, report in enumerate(reports):
            if number:
                console.out.print()
            _print_report(report, None if all_findings else _SHOWN)
        if shown:
            console.out.print()
        console.show_items(shown)
    _end(reports)


def _print_report(report: "FileReport", most: int | None) -> None:
    """Prints what was found in a file, at most so many findings of a kind."""
    from llama_acc.core.data.check import histogram
    from llama_acc.core.data.checks import quantiles
    from llama_acc.core.data.findings import KINDS
    from llama_acc.core.data.keys import unused_text

    stats, findings = report.stats, report.findings
    names = {"single_turn": "single-turn item", "dialogue": "dialogue", "text": "document"}
    name = names[report.kind] if report.kind is not None and stats.items else "row"
    facts = [count_text(stats.rows, name)] if report.kind is not None else []
    if report.template is not None:
        facts.append(f"prompt format {report.template}")
    if stats.language is not None:
        facts.append(f"language {stats.language}")
    elif stats.languages:
        facts.append("languages " + ", ".join(f"{name} {count:,}" for name, count in stats.languages.items()))
    if report.images:
        facts.append(count_text(report.images, "image"))
    _print((str(report.path), "bold"), *(f"  {fact}" for fact in facts))
    if report.error is not None:
        _print(("  cannot be read: ", "bold red"), report.error)
        if report.hint is not None:
            _print(f"      {report.hint}")
    elif not findings.counts.total():
        _print(("  nothing wrong was found", "green"))
    for kind, about in sorted(KINDS.items(), key=lambda pair: not pair[1].fatal):
        if count := findings.counts[kind]:
            word = ("  error: ", "bold red") if about.fatal else ("  warning: ", "yellow")
            _print(word, (f"{about.title}: {count:,}", "bold"))
            places = findings.places[kind][:most]
            for finding in places:
                _print(f"      {finding}")
            if left := count - len(places):
                _print((f"      ... and {left:,} more{'' if most is None else ' (--all lists them)'}", "dim"))
    if report.unused_keys:
        _print(("  not used: ", "bold"), unused_text(report.unused_keys))
    if not report.lengths:
        return
    figures = ", ".join(f"{name} {value:,}" for name, value in quantiles(report.lengths).items())
    max_tokens, unit = report.max_tokens, "characters" if report.tokenizer is None else "tokens"
    _print((f"  lengths in {unit}: ", "bold"), figures)
    bars = histogram(report.lengths)
    width, digits = max(len(name) for name, _, _ in bars), max(len(f"{count:,}") for _, _, count in bars)
    for name, begin, count in bars:
        blocks = "█" * max(round(_BAR * count / max(count for _, _, count in bars)), count > 0)
        style = "yellow" if max_tokens is not None and begin >= max_tokens else "green"
        _print(f"      {name:>{width}}  {count:>{digits},}  ", (blocks, style))
    rows = [
        ("left out", report.wrong, "an error above: stops a run, or is left out (data.on_error=skip)"),
        ("left out", findings.counts["blank"], "blank"),
    ]
    if report.tokenizer is not None:
        counts = report.counts
        lost = (
            f"{count_text(counts['truncated_tokens'], 'token')}, {counts['truncated_label_tokens']:,} of them trained"
        )
        kept = f"{count_text(counts['tokens'], 'token')}, {counts['label_tokens']:,} of them trained"
        rows += [
            ("dropped", counts["dropped_without_reply"], "nothing in them is trained"),
            ("dropped", counts["dropped_without_room"], f"the prompt alone fills {max_tokens or 0:,} tokens"),
            ("cut", counts["truncated"], f"longer than {max_tokens or 0:,} tokens; they lose {lost}"),
            ("trained on", stats.items - counts["dropped"], kept),
        ]
    rows = [row for row in rows if row[1]]
    if rows:
        _print(("  what becomes of the items:", "bold"))
    digits = max((len(f"{count:,}") for _, count, _ in rows), default=0)
    for name, count, why in rows:
        _print(f"      {name:<10}  {count:>{digits},}  {why}")


def _print(*parts: str | tuple[str, str]) -> None:
    console.out.print(Text.assemble(*parts))


def _end(reports: "list[FileReport]") -> None:
    """Raises what ends the command with 2, if anything would stop a run."""
    from llama_acc.core.data.findings import KINDS, other_form

    if broken := sum(report.error is not None for report in reports):
        raise UserError(
            f"{broken} of {count_text(len(reports), 'file')} cannot be read to the end", "mend or leave out: see above"
        )
    rows, wrong = sum(report.stats.rows for report in reports), sum(report.wrong for report in reports)
    if wrong:
        hint = "mend them, or let a run leave them out: data.on_error=skip"
        kinds = {kind for report in reports for kind in report.findings.counts if KINDS[kind].fatal}
        if kinds == {"image_file"}:
            hint = "say where the images are: --image-root DIR, in a recipe data.sources.root"
        elif wrong == rows:
            hint = other_form(kinds, shlex.quote(str(reports[0].path)))
        raise UserError(f"{wrong:,} of {count_text(rows, 'item')} cannot be trained on", hint)
