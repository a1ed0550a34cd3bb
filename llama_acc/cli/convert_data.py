"""`llama-acc convert-data`: from the form data is published in to the one `finetune` takes, and checks of that."""

import re
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_acc.cli import console, options
from llama_acc.core.errors import RunError, UserError, did_you_mean
from llama_acc.core.units import count_text, size_text

if TYPE_CHECKING:
    from llama_acc.core.data.convert.run import Conversion, Found, Progress, Request

HELP = """Convert data to what `finetune` takes, and check it.

Reads .json, .jsonl, .csv and .tsv, also with .gz, .zst or .zip behind, and .parquet, of any size. Without INPUT, what
`llama-acc download` has brought is converted.

Examples:

  llama-acc convert-data gorilla huggingface_train.json --output gorilla.json

  llama-acc convert-data sharegpt dump.json --output chats.jsonl.zst --tokenizer Llama-2-7b --max-tokens 4096

  llama-acc convert-data csv questions.csv --map instruction=question --map output=answer --output questions.jsonl

  llama-acc convert-data auto unknown.jsonl --preview 3

  zcat dump.jsonl.gz | llama-acc convert-data openai - --output - | head

  llama-acc convert-data check chats.jsonl.zst --tokenizer Llama-2-7b --max-tokens 4096 --preview 3
"""
_FORMAT_HELP = {
    "gorilla": ("Gorilla's APIBench, by LLaMA2-Accessory's rule.", "huggingface_train.json --output gorilla.json"),
    "llava": (
        "LLaVA-Instruct: questions and answers about images, one item each.",
        "llava_instruct_150k.json --output llava.jsonl",
    ),
    "sharegpt": (
        "ShareGPT: HTML to Markdown, roles by one name, long dialogues split.",
        "dump.json --output chats.jsonl.zst --language en --tokenizer Llama-2-7b --max-tokens 4096",
    ),
    "wizardlm": (
        "WizardLM's Evol-Instruct, both versions.",
        "evol_instruct_v2.json --output wizardlm.jsonl",
    ),
    "lima": ("LIMA, as lists of texts or in Vicuna's format.", "train.jsonl --output lima.jsonl"),
    "alpaca": ("Alpaca: instruction, input, output.", "alpaca_data.json --output alpaca.jsonl"),
    "openai": ("OpenAI's messages; system texts stay, and what is not to be trained on.", "chats.jsonl --preview 3"),
    "moss": ("MOSS 003's dialogues without tools.", "moss-003-sft-no-tools.jsonl --output moss.jsonl.zst"),
    "csv": (
        "A table: which column is what, --map says.",
        "faq.tsv --map instruction=question --map output=answer --output faq.jsonl",
    ),
    "jsonl": (
        "JSON of any fields: which is what, --map says.",
        "faq.jsonl.gz --map instruction=question --map output=answer --output faq.json",
    ),
    "auto": ("Any of these: recognises the format, and says how it knew.", "unknown.jsonl --preview 3"),
}
FORMAT_HELP = {
    format: f"{what}\n\nExample:\n\n  llama-acc convert-data {format} {rest}\n"
    for format, (what, rest) in _FORMAT_HELP.items()
}

app = typer.Typer(no_args_is_help=True)


class OnError(str, Enum):
    """What to do about rows that are wrong."""

    stop = "stop"
    skip = "skip"


def _mapping(values: list[str]) -> list[str]:
    from llama_acc.core.data.convert.mapped import FIELDS

    names = [value.partition("=")[0] for value in values]
    for value, name in zip(values, names, strict=True):
        if not value.partition("=")[2]:
            raise typer.BadParameter(f"{value!r} is not FIELD=COLUMN, such as instruction=question.")
        if name not in FIELDS:
            hint = did_you_mean(name, FIELDS) or f"it is one of {', '.join(FIELDS)}."
            raise typer.BadParameter(f"unknown field {name!r}: {hint}")
        if names.count(name) > 1:
            raise typer.BadParameter(f"{name} is given twice.")
    return values


def _languages(values: list[str]) -> list[str]:
    if not values:
        return values
    from llama_acc.core.data.language import known_languages

    known = known_languages()
    for value in values:
        if not re.fullmatch("[a-z]{2}", value):
            raise typer.BadParameter(f"{value!r} is not an ISO 639-1 code, such as en.")
        if value not in known:
            raise typer.BadParameter(f"no text is told to be in {value!r}. Languages: {', '.join(known)}.")
    return values


Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT",
        help="Files, folders, globs, names of downloads, or - for standard input.",
        callback=lambda values: options.given(values or []),
        show_default=False,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="A .jsonl or .json file, perhaps with .gz or .zst behind; - for standard output.",
        callback=options.given,
    ),
]
Preview = Annotated[
    int, typer.Option("--preview", metavar="N", min=0, help="Show N items as the model will see them; write nothing.")
]
WhatIfWrong = Annotated[
    OnError, typer.Option("--on-error", help="Rows that are wrong: an error, or left out and counted.")
]
AllForms = Annotated[bool, typer.Option("--all-forms", help="Also rows of the form {'Instruction': ...}.")]
Dialogues = Annotated[bool, typer.Option("--dialogues", help="Whole dialogues, not one item for each question.")]
Reference = Annotated[
    bool, typer.Option("--reference", help="Exactly what LLaMA2-Accessory's tool writes, without new lines in texts.")
]
KeepHtml = Annotated[bool, typer.Option("--keep-html", help="Leave HTML as it is.")]
Languages = Annotated[
    list[str],
    typer.Option("--language", metavar="CODE", help="Only dialogues in it (en, de, ...). Repeat.", callback=_languages),
]
TokenizerFile = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="FILE",
        help="The model's, or its folder; with --max-tokens.",
        callback=options.given,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", metavar="N", min=1, help="Split dialogues, so that each has at most N tokens."),
]
Mapping = Annotated[
    list[str],
    typer.Option("--map", metavar="FIELD=COLUMN", help="instruction=question, say. Repeat.", callback=_mapping),
]


def gorilla(
    inputs: Inputs = None,
    output: Output = None,
    preview: Preview = 0,
    on_error: WhatIfWrong = OnError.stop,
    all_forms: AllForms = False,
) -> None:
    """Convert Gorilla's APIBench."""
    _convert("gorilla", inputs, output, preview, on_error, all_forms=all_forms)


def llava(
    inputs: Inputs = None,
    output: Output = None,
    preview: Preview = 0,
    on_error: WhatIfWrong = OnError.stop,
    dialogues: Dialogues = False,
    reference: Reference = False,
) -> None:
    """Convert LLaVA-Instruct."""
    if dialogues and reference:
        raise UserError("--dialogues and --reference do not go together", "the reference makes pairs only")
    _convert("llava", inputs, output, preview, on_error, dialogues=dialogues, reference=reference)


def sharegpt(
    inputs: Inputs = None,
    output: Output = None,
    preview: Preview = 0,
    on_error: WhatIfWrong = OnError.stop,
    keep_html: KeepHtml = False,
    language: Languages = [],  # noqa: B006
    tokenizer: TokenizerFile = None,
    max_tokens: MaxTokens = None,
) -> None:
    """Convert ShareGPT's conversations."""
    given = {"keep_html": keep_html, "languages": tuple(language), **_limit(tokenizer, max_tokens)}
    _convert("sharegpt", inputs, output, preview, on_error, **given)


def mapped(format: str) -> Callable[..., None]:
    """The command of a format whose columns `--map` names."""

    def command(
        inputs: Inputs = None,
        output: Output = None,
        preview: Preview = 0,
        on_error: WhatIfWrong = OnError.stop,
        map: Mapping = [],  # noqa: B006
    ) -> None:
        _convert(format, inputs, output, preview, on_error, mapping=_pairs(map))

    return command


def auto(
    inputs: Inputs = None,
    output: Output = None,
    preview: Preview = 0,
    on_error: WhatIfWrong = OnError.stop,
    all_forms: AllForms = False,
    dialogues: Dialogues = False,
    keep_html: KeepHtml = False,
    language: Languages = [],  # noqa: B006
    tokenizer: TokenizerFile = None,
    max_tokens: MaxTokens = None,
    map: Mapping = [],  # noqa: B006
) -> None:
    """Convert whatever it is."""
    given = {"all_forms": all_forms, "dialogues": dialogues, "keep_html": keep_html, "languages": tuple(language)}
    _convert("auto", inputs, output, preview, on_error, **given, **_limit(tokenizer, max_tokens), mapping=_pairs(map))


def plain(format: str) -> Callable[..., None]:
    """The command of a format that has no options of its own."""

    def command(
        inputs: Inputs = None,
        output: Output = None,
        preview: Preview = 0,
        on_error: WhatIfWrong = OnError.stop,
    ) -> None:
        _convert(format, inputs, output, preview, on_error)

    return command


COMMANDS: dict[str, Callable[..., None]] = {
    "gorilla": gorilla,
    "llava": llava,
    "sharegpt": sharegpt,
    **{format: plain(format) for format in ("wizardlm", "lima", "alpaca", "openai", "moss")},
    **{format: mapped(format) for format in ("csv", "jsonl")},
    "auto": auto,
}


def _limit(tokenizer: str | None, max_tokens: int | None) -> dict[str, Any]:
    if (tokenizer is None) != (max_tokens is None):
        raise UserError("--tokenizer and --max-tokens go together", "dialogues are split by the model's tokens")
    if tokenizer is None:
        return {}
    from llama_acc.core.tokenizer import load_tokenizer

    return {"tokenizer": load_tokenizer(tokenizer), "max_tokens": max_tokens}


def _pairs(mapping: list[str]) -> dict[str, str]:
    return {name: column for name, _, column in (pair.partition("=") for pair in mapping)}


def _convert(
    format: str, words: list[str] | None, output: str | None, preview: int, on_error: OnError, **given: Any
) -> None:
    from llama_acc.core.data.convert.inputs import inputs_of
    from llama_acc.core.data.convert.rules import Options
    from llama_acc.core.data.convert.run import Request

    inputs = inputs_of(words or [], format)
    request = Request(format, inputs, sys.stdin.buffer, Options(**given), on_error is OnError.skip)
    if preview:
        if output is not None:
            console.note(f"a preview: {output} is not written")
        _show(request, preview)
    elif (target := _target(output, words or [], request)) is None:
        _to_stdout(request)
    else:
        _to_file(request, target)


def _target(output: str | None, words: list[str], request: "Request") -> Path | None:
    """The file to write; None: standard output."""
    from llama_acc.core.data.convert.inputs import default_output

    if output is not None:
        return None if output == "-" else Path(output).expanduser()
    target = default_output(words, request.format, request.inputs)
    if target is None and sys.stdout.isatty():
        raise UserError("where should the items go?", "add --output FILE, or --preview 3 to see some of them first")
    return target


def _to_file(request: "Request", output: Path) -> None:
    from llama_acc.core.data.convert.run import convert

    with console.ByteProgress() as progress:
        conversion = convert(request, output, _named(progress), _say_found)
    _say(conversion)
    console.out.print(f"{output}: {_counts(conversion)}, {size_text(output.stat().st_size)}", markup=False)


def _to_stdout(request: "Request") -> None:
    from llama_acc.core.data.convert.run import Conversion, write_items
    from llama_acc.core.data.convert.writing import LINES, Items

    with console.ByteProgress() as progress:
        conversion = Conversion(request, progress=_named(progress), on_found=_say_found)
        try:
            write_items(conversion, Items(sys.stdout.buffer, LINES))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RunError(f"cannot write to standard output: {error.strerror or error}") from error
    _say(conversion)
    console.note(_counts(conversion))


def _named(progress: console.ByteProgress) -> "Progress":
    return lambda file, done, total: progress.tell(Path(file).name, done, total)


def _show(request: "Request", count: int) -> None:
    from itertools import islice

    from llama_acc.cli.preview import show_items
    from llama_acc.core.data.convert.run import Conversion
    from llama_acc.core.data.items import item_of, kind_of
    from llama_acc.core.data.preview import shown_items
    from llama_acc.core.data.templates import template_for
    from llama_acc.core.errors import DataError

    conversion = Conversion(request, on_found=_say_found)
    items, problems, kind = [], [], "single_turn"
    for origin, record, _ in islice(conversion, count):
        kind = kind_of(record) or kind
        item, found = item_of(record, kind)
        problems += [f"{origin}: {finding}" for finding in found]
        if item is not None:
            items.append((origin, item))
    if problems:
        raise DataError(problems)
    conversion.check_that_something_came()
    _say(conversion)
    options = request.options
    show_items(shown_items(items, template_for("auto", kind, options.tokenizer), options.tokenizer, options.max_tokens))


def _say_found(found: "Found") -> None:
    console.note(f"{found.file}: {found.recognised.format}, as {found.recognised.why}")


def _say(conversion: "Conversion") -> None:
    """What became of rows that are not items as they were."""
    from llama_acc.core.data.keys import unused_text

    for reason, count in conversion.skipped.items():
        console.note(f"skipped {count_text(count, 'row')}: {reason}")
    for note, count in conversion.notes.items():
        console.note(f"{note}: {count:,}")
    if conversion.unused:
        console.note(f"not used: {unused_text(conversion.unused)}")
    if conversion.problems:
        from llama_acc.core.errors import listed

        console.note(f"left out {count_text(conversion.wrong, 'row')}, as wrong:\n{listed(conversion.problems)}")
    if not conversion.items:
        console.note("warning: there are no items to train on")


def _counts(conversion: "Conversion") -> str:
    return f"{count_text(conversion.items, 'item')} of {count_text(conversion.rows, 'row')}"
