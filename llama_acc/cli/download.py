"""`llama-acc download`."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_acc.cli import console, options
from llama_acc.core.errors import LlamaAccError, UserError

if TYPE_CHECKING:
    from llama_acc.core.download.catalogue import Entry
    from llama_acc.core.download.downloads import Downloaded

HELP = """Download models and data: by a name of the catalogue, or by an address.

What was interrupted goes on where it stopped; what is there is not fetched again.

Examples:

  llama-acc download --list

  llama-acc download alpaca llama2-7b

  llama-acc download hf:TinyLlama/TinyLlama-1.1B-Chat-v1.0

  llama-acc download 'hf:datasets/stingning/ultrachat/train_*.jsonl' --to data

  llama-acc download https://example.org/questions.jsonl
"""


def download(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME...",
            help="A name (--list), hf:OWNER/NAME, hf:OWNER/NAME/FILE, or https://...",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="DIR", help="Where to, in place of LLAMA_ACC_HOME.", callback=options.given),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            metavar="T",
            help="For gated and private repositories of Hugging Face; HF_TOKEN does not show in the process list.",
            callback=options.given,
        ),
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show the catalogue.")] = False,
    as_json: options.Json = False,
) -> None:
    """Download models and data."""
    if list_all:
        if names:
            raise UserError("--list shows the whole catalogue: leave the names out", f"type: {_download(names)}")
        _list(as_json)
        return
    if not names:
        raise UserError("download what? Give a name or an address", "`llama-acc download --list` shows the names")
    _fetch(names, None if to is None else Path(to).expanduser(), token, as_json)


def _list(as_json: bool) -> None:
    from llama_acc.core.download.catalogue import catalogue

    entries = list(catalogue().values())
    if as_json:
        typer.echo(json.dumps([_facts(entry) for entry in entries], indent=1))
        return
    rows = [(entry.name, entry.size or "", _here(entry), entry.licence, entry.what) for entry in entries]
    header = ("name", "size", "here", "licence", "what")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for number, (name, size, *others, what) in enumerate([header, *rows]):
        cells = [name.ljust(widths[0]), size.rjust(widths[1])]
        cells += [cell.ljust(width) for cell, width in zip(others, widths[2:-1], strict=True)]
        console.out.print("  ".join([*cells, what]), style="" if number else "bold", markup=False)


def _here(entry: "Entry") -> str:
    from llama_acc.core.download.names import is_here

    return "yes" if is_here(entry) else "gated" if entry.gated else ""


def _facts(entry: "Entry") -> dict[str, Any]:
    from llama_acc.core.download.names import folder_of, is_here

    known = entry.model_dump(exclude_none=True)
    return {**known, "here": is_here(entry), "folder": str(folder_of(entry))}


def _fetch(names: list[str], to: Path | None, token: str | None, as_json: bool) -> None:
    from llama_acc.cli.download_progress import DownloadProgress
    from llama_acc.core.download.downloads import Downloader, asks_the_hub, understand
    from llama_acc.core.download.transfer import GO_ON

    done: list[Downloaded] = []
    codes: list[int] = []
    wanted = understand(names, to)
    if token is not None and not any(map(asks_the_hub, wanted)):
        console.note("--token is not used: it is for Hugging Face, and nothing here is fetched from there")
    with DownloadProgress() as progress:
        downloader = Downloader(token, progress)
        for one in wanted:
            try:
                done.append(downloader.download(one))
            except LlamaAccError as error:
                if len(wanted) == 1:
                    raise
                # At once: being off-line is told in time, however many names there are.
                console.error(f"{one.name}: {error.message}", error.hint)
                codes.append(error.exit_code)
            except KeyboardInterrupt:
                console.note(GO_ON)
                raise
    _tell(done, as_json)
    if codes:
        raise typer.Exit(max(codes))  # a failure that may pass does not hide one that will not


def _tell(done: "list[Downloaded]", as_json: bool) -> None:
    from llama_acc.core.download.next_step import next_command, remarks

    if as_json:
        found = [
            {
                "name": one.wanted.name,
                "folder": str(one.folder),
                "files": [str(path) for path in one.files],
                "fetched": [str(path) for path in one.fetched],
                "converted": None if one.converted is None else str(one.converted),
                "next": next_command(one),
            }
            for one in done
        ]
        typer.echo(json.dumps(found, indent=1))
    for one in done:
        console.note(_what_happened(one))
        for remark in remarks(one):
            console.note(remark)
        command = next_command(one)
        if command is not None and not as_json:
            console.note("now type:")
            typer.echo(command)


def _what_happened(one: "Downloaded") -> str:
    count = len(one.files)
    where = str(one.files[0]) if count == 1 else f"{one.folder} ({count} files)"
    return f"{one.wanted.name} is in {where}" if one.fetched else f"{one.wanted.name} was there already: {where}"


def _download(names: list[str]) -> str:
    return shlex.join(["llama-acc", "download", *names])
