"""`llama-acc convert-data`: from the form data is published in to the one `finetune` takes, and checks of that."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text
from typer import Argument, Option

from llama_acc.cli import console, options
from llama_acc.core.errors import RunError, UserError, did_you_mean, listed
from llama_acc.core.text import count_text, size_text

if TYPE_CHECKING:
    from llama_acc.core.data.check import FileReport
    from llama_acc.core.data.convert.run import Conversion

_SHOWN = 5  # findings of a kind that are shown without --all
_BAR = 40  # width of the longest bar


app = typer.Typer(
    no_args_is_help=True,
    help="""Convert data to what `finetune` takes, and check it.

Reads .json, .jsonl, .csv and .tsv, also with .gz, .zst or .zip behind, and .parquet, of any size. Without INPUT, what
`llama-acc download` has brought is converted.

Examples:

  llama-acc convert-data gorilla huggingface_train.json --output gorilla.json

  llama-acc convert-data sharegpt dump.json --output chats.jsonl.zst --tokenizer Llama-2-7b --max-tokens 4096

  llama-acc convert-data csv questions.csv --map instruction=question --map output=answer --output questions.jsonl

  llama-acc convert-data auto unknown.jsonl --preview 3

  zcat dump.jsonl.gz | llama-acc convert-data openai - --output - | head

  llama-acc convert-data check chats.jsonl.zst --tokenizer Llama-2-7b --max-tokens 4096 --preview 3
""",
)


def _mapping(values: list[str]) -> list[str]:
    from llama_acc.core.data.convert.formats import MAPPED

    names = [value.partition("=")[0] for value in values]
    for value, name in zip(values, names, strict=True):
        if not value.partition("=")[2]:
            raise typer.BadParameter(f"{value!r} is not FIELD=COLUMN, such as instruction=question.")
        if name not in MAPPED:
            hint = did_you_mean(name, MAPPED) or f"it is one of {', '.join(MAPPED)}."
            raise typer.BadParameter(f"unknown field {name!r}: {hint}")
        if names.count(name) > 1:
            raise typer.BadParameter(f"{name} is given twice.")
    return values


def _languages(values: list[str]) -> list[str]:
    if not values:
        return values
    from llama_acc.core.data.checks import known_languages

    known = known_languages()
    for value in values:
        if not re.fullmatch("[a-z]{2}", value):
            raise typer.BadParameter(f"{value!r} is not an ISO 639-1 code, such as en.")
        if value not in known:
            raise typer.BadParameter(f"{value!r} is no language that is recognized: {', '.join(known)}.")
    return values


_SHAREGPT = ("keep_html", "language", "tokenizer", "max_tokens")
# What each format is, the input of an example, and the options of its own.
_FORMATS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gorilla": ("Gorilla's APIBench, by LLaMA2-Accessory's rule.", "huggingface_train.json", ("all_forms",)),
    "llava": (
        "LLaVA-Instruct: questions and answers about images, one item each.",
        "llava_instruct_150k.json",
        ("dialogues", "reference"),
    ),
    "sharegpt": (
        "ShareGPT: HTML to Markdown, roles by one name, long dialogues split.",
        "dump.json --language en --tokenizer Llama-2-7b --max-tokens 4096",
        _SHAREGPT,
    ),
    "wizardlm": ("WizardLM's Evol-Instruct, both versions.", "evol_instruct_v2.json", ()),
    "lima": ("LIMA, as lists of texts or in Vicuna's format.", "train.jsonl", ()),
    "alpaca": ("Alpaca: instruction, input, output.", "alpaca_data.json", ()),
    "openai": ("OpenAI's messages; system texts stay, and what is not to be trained on.", "chats.jsonl", ()),
    "moss": ("MOSS 003's dialogues without tools.", "moss-003-sft-no-tools.jsonl", ()),
    "csv": (
        "A table: which column is what, --map says.",
        "faq.tsv --map instruction=question --map output=answer",
        ("map",),
    ),
    "jsonl": (
        "JSON of any fields: which is what, --map says.",
        "faq.jsonl.gz --map instruction=question --map output=answer",
        ("map",),
    ),
    "auto": (
        "Any of these: recognizes the format, and says how it knew.",
        "unknown.jsonl",
        ("all_forms", "dialogues", *_SHAREGPT, "map"),
    ),
}


def _command(format: str) -> Callable[..., None]:
    """`_convert` for one format, with the options that it has."""

    def command(**given: Any) -> None:
        _convert(format, **given)

    what, example, own = _FORMATS[format]
    command.__doc__ = f"{what}\n\nExample:\n\n  llama-acc convert-data {format} {example} --output {format}.json\n"
    known = list(signature(_convert).parameters.values())[1:]
    accepted = [one for one in known if one.name in ("inputs", "output", "preview", "on_error", *own)]
    vars(command)["__signature__"] = Signature(accepted)
    return command


def _convert(
    format: str,
    *,
    inputs: Annotated[
        list[str] | None,
        Argument(
            metavar="INPUT",
            help="Files, folders, globs, names of downloads, or - for standard input.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A .jsonl or .json file, perhaps with .gz or .zst behind; - for standard output.",
        ),
    ] = None,
    preview: Annotated[
        int, Option(metavar="N", min=0, help="Show N items as the model will see them; write nothing.")
    ] = 0,
    on_error: Annotated[
        Literal["stop", "skip"], Option(help="Rows that are wrong: an error, or left out and counted.")
    ] = "stop",
    all_forms: Annotated[bool, Option("--all-forms", help="Also rows of the form {'Instruction': ...}.")] = False,
    dialogues: Annotated[bool, Option("--dialogues", help="Whole dialogues, not one item for each question.")] = False,
    reference: Annotated[
        bool, Option("--reference", help="Exactly what LLaMA2-Accessory's tool writes, without new lines in texts.")
    ] = False,
    keep_html: Annotated[bool, Option("--keep-html", help="Leave HTML unchanged.")] = False,
    language: Annotated[
        list[str], Option(metavar="CODE", help="Only dialogues in it (en, de, ...). Repeat.", callback=_languages)
    ] = [],  # noqa: B006
    tokenizer: Annotated[
        str | None, Option(metavar="FILE", help="The model's, or its folder; with --max-tokens.")
    ] = None,
    max_tokens: Annotated[
        int | None, Option(metavar="N", min=1, help="Split dialogues, so that each has at most N tokens.")
    ] = None,
    map: Annotated[
        list[str], Option(metavar="FIELD=COLUMN", help="instruction=question, say. Repeat.", callback=_mapping)
    ] = [],  # noqa: B006
) -> None:
    from llama_acc.core.data.convert.formats import Options
    from llama_acc.core.data.convert.run import Conversion, convert, find_inputs, write_items

    if dialogues and reference:
        raise UserError("--dialogues and --reference do not go together", "the reference makes pairs only")
    if (tokenizer is None) != (max_tokens is None):
        raise UserError("--tokenizer and --max-tokens go together", "dialogues are split by the model's tokens")
    if tokenizer is not None:
        from llama_acc.core.tokenizer import load_tokenizer
    asked = Options(
        all_forms=all_forms,
        dialogues=dialogues,
        reference=reference,
        keep_html=keep_html,
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
        max_tokens=max_tokens,
        languages=tuple(language),
        mapping={name: column for name, _, column in (pair.partition("=") for pair in map)},
    )
    paths, target = find_inputs(inputs or [], format)
    if output is not None:
        target = None if output == "-" else Path(output).expanduser()
    if target is None and output is None and not preview and sys.stdout.isatty():
        raise UserError("where should the items go?", "add --output FILE, or --preview 3 to see some of them first")
    with console.Progress() as progress:
        conversion = Conversion(
            format,
            paths,
            asked,
            skip_problems=on_error == "skip",
            progress=None if preview else lambda file, done, total: progress(Path(file).name, done, total),
            note=console.note,
        )
        if preview:
            if output is not None:
                console.note(f"a preview: {output} is not written")
            _show(conversion, preview)
            return
        if target is not None:
            convert(conversion, target)
        else:
            try:
                write_items(conversion, sys.stdout.buffer)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise RunError(f"cannot write to standard output: {error.strerror or error}") from error
    _report(conversion)
    counts = f"{count_text(conversion.items, 'item')} of {count_text(conversion.rows, 'row')}"
    if target is None:
        console.note(counts)
    else:
        console.out.print(f"{target}: {counts}, {size_text(target.stat().st_size)}", markup=False)


def _show(conversion: "Conversion", count: int) -> None:
    from itertools import islice

    from llama_acc.core.data.chat_template import template_for
    from llama_acc.core.data.items import item_of, kind_of
    from llama_acc.core.data.preview import shown_items
    from llama_acc.core.errors import DataError

    items, problems, kind = [], [], "single_turn"
    for origin, record, _ in islice(conversion, count):
        kind = kind_of(record) or kind
        item, found = item_of(record, kind)
        problems += [f"{origin}: {finding}" for finding in found]
        if item is not None:
            items.append((origin, item))
    if problems:
        raise DataError(problems)
    conversion.require_items()
    _report(conversion)
    tokenizer, most = conversion.options.tokenizer, conversion.options.max_tokens
    console.show_items(shown_items(items, template_for("auto", kind, tokenizer), tokenizer, most))


def _report(conversion: "Conversion") -> None:
    """What became of rows that are not items unchanged."""
    from llama_acc.core.data.keys import unused_text

    for reason, count in conversion.skipped.items():
        console.note(f"skipped {count_text(count, 'row')}: {reason}")
    for note, count in conversion.notes.items():
        console.note(f"{note}: {count:,}")
    if conversion.unused:
        console.note(f"not used: {unused_text(conversion.unused)}")
    if conversion.problems:
        console.note(f"left out {count_text(conversion.wrong, 'row')}, as wrong:\n{listed(conversion.problems)}")
    if not conversion.items:
        console.note("warning: there are no items to train on")


# Checks


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


SUBCOMMANDS = {**{format: _command(format) for format in _FORMATS}, "check": check}
