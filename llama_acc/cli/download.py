"""`llama-acc download`."""

import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from llama_acc.cli import console, options
from llama_acc.core.errors import LlamaAccError, UserError
from llama_acc.core.text import count_text

if TYPE_CHECKING:
    from llama_acc.core.hub import Downloaded
    from llama_acc.core.hugging_face import Progress

CONVERTED_AT_ONCE = 2**29
"""Bytes that are converted without being asked: a few seconds' work, and what was downloaded stays."""


def download(
    names: Annotated[
        list[str] | None,
        Argument(
            metavar="NAME...",
            help="A name (--list), hf:OWNER/NAME, hf:OWNER/NAME/FILE, or https://...",
            show_default=False,
        ),
    ] = None,
    to: Annotated[str | None, Option(metavar="DIR", help="Where to, in place of LLAMA_ACC_HOME.")] = None,
    token: Annotated[
        str | None,
        Option(
            metavar="T",
            help="For gated and private repositories of Hugging Face; HF_TOKEN does not show in the process list.",
        ),
    ] = None,
    list_all: Annotated[bool, Option("--list", help="Show the catalogue.")] = False,
    as_json: options.Json = False,
) -> None:
    """Download models and data: by a name of the catalogue, or by an address.

    What is there is not fetched again.

    Examples:

      llama-acc download --list

      llama-acc download alpaca llama2-7b

      llama-acc download hf:TinyLlama/TinyLlama-1.1B-Chat-v1.0

      llama-acc download 'hf:datasets/stingning/ultrachat/train_*.jsonl' --to data

      llama-acc download https://example.org/questions.jsonl
    """
    from llama_acc.core.catalogue import HubAddress, parse_address, resolve
    from llama_acc.core.hub import Downloader
    from llama_acc.core.hugging_face import RESUME_HINT

    if list_all and names:
        raise UserError("--list shows the whole catalogue: leave the names out")
    if list_all:
        _list(as_json)
        return
    if not names:
        raise UserError("download what? Give a name or an address", "`llama-acc download --list` shows the names")
    done: list[tuple[Downloaded, Path | None]] = []
    codes: list[int] = []
    requests = resolve(names, None if to is None else Path(to).expanduser())
    addresses = [parse_address(file.get) for request in requests for file in request.files]
    if token is not None and not any(isinstance(address, HubAddress) for address in addresses):
        console.note("--token is not used: it is for Hugging Face, and nothing here is fetched from there")
    with console.Progress() as progress:
        downloader = Downloader(progress, console.note, token)
        for request in requests:
            try:
                one = downloader.download(request)
                done.append((one, _finish(one, progress)))
            except LlamaAccError as error:
                if len(requests) == 1:
                    raise
                # At once: being off-line is told in time, however many names there are.
                console.error(f"{request.name}: {error.message}", error.hint)
                codes.append(error.exit_code)
            except KeyboardInterrupt:
                console.note(RESUME_HINT)
                raise
    _report(done, as_json)
    if codes:
        raise typer.Exit(max(codes))  # a failure that may pass does not hide one that will not


def _list(as_json: bool) -> None:
    from llama_acc.core.catalogue import catalogue

    entries = list(catalogue().values())
    if as_json:
        known = [
            {**entry.model_dump(exclude_none=True), "here": entry.is_here, "folder": str(entry.folder)}
            for entry in entries
        ]
        typer.echo(json.dumps(known, indent=1))
        return
    rows = [["name", "size", "here", "license", "what"]]
    rows += [[e.name, e.size or "", "yes" if e.is_here else "gated" * e.gated, e.license, e.what] for e in entries]
    console.table(rows, "<><")


def _finish(done: "Downloaded", progress: "Progress") -> Path | None:
    """Add a checkpoint's meta.json, and convert data that `finetune` cannot read as it is; the converted file.

    What cannot be converted is reported, and is no failure of the download.
    """
    from llama_acc.core.atomic import write_text_whole
    from llama_acc.core.catalogue import converted_file
    from llama_acc.core.hub import locked

    entry, to = done.request.entry, done.request.to
    if entry is not None and entry.llama_type is not None and not (done.folder / "meta.json").exists():
        write_text_whole(done.folder / "meta.json", json.dumps({"llama_type": entry.llama_type}))
    if entry is None or entry.convert is None:
        return None
    from llama_acc.core.data.convert.formats import Options
    from llama_acc.core.data.convert.run import Conversion, convert

    target = converted_file(entry.name) if to is None else to / f"{entry.name}.jsonl"
    size = sum(path.stat().st_size for path in done.files)
    with locked(done.folder, console.note):  # of two downloads of the same, one converts it
        if target.exists():
            return target
        if size > CONVERTED_AT_ONCE:
            return None
        try:
            made = Conversion(
                entry.convert,
                done.files,
                Options(all_forms=entry.all_forms),
                progress=lambda name, n, of: progress(f"converting {Path(name).name}", n, of),
            )
            convert(made, target)
        except LlamaAccError as error:
            console.note(f"{entry.name} could not be converted: {error}")
            return None
    skipped = f", {count_text(sum(made.skipped.values()), 'row')} gave none" if made.skipped else ""
    console.note(f"converted to {count_text(made.items, 'item')}{skipped}: {target}")
    return target


def _report(done: "list[tuple[Downloaded, Path | None]]", as_json: bool) -> None:
    commands = [_next_command(one, converted) for one, converted in done]
    if as_json:
        found = [
            {
                "name": one.request.name,
                "folder": str(one.folder),
                "files": [str(path) for path in one.files],
                "fetched": [str(path) for path in one.fetched],
                "converted": None if converted is None else str(converted),
                "next": command,
            }
            for (one, converted), command in zip(done, commands, strict=True)
        ]
        typer.echo(json.dumps(found, indent=1))
    for (one, _), command in zip(done, commands, strict=True):
        count = len(one.files)
        where = str(one.files[0]) if count == 1 else f"{one.folder} ({count} files)"
        console.note(f"{one.request.name} {'is in' if one.fetched else 'was there already:'} {where}")
        for remark in _remarks(one):
            console.note(remark)
        if command is not None and not as_json:
            console.note("now type:")
            console.command(command)


def _remarks(done: "Downloaded") -> Iterator[str]:
    """What else there is to know, and what the next command still lacks."""
    from llama_acc.core.catalogue import catalogue
    from llama_acc.core.recipe import Recipe

    entry = done.request.entry
    if entry is not None and entry.note:
        yield entry.note
    if entry is not None and entry.kind == "vision":
        yield f"give it beside a language model: --pretrained llama2-13b --pretrained {_model_place(done)}"
    if entry is not None and not done.is_model and entry.recipe is not None:
        base = catalogue().get(next(iter(Recipe.load(entry.recipe).model.pretrained_list()), ""))
        if base is not None and not base.is_here:
            yield f"the recipe starts from {base.name}, which is not here yet: llama-acc download {base.name}"


def _next_command(done: "Downloaded", converted: Path | None) -> str | None:
    """The command that uses what was downloaded; None where there is no one such command."""
    from llama_acc.core.checkpoint.layout import inspect
    from llama_acc.core.data.read import SUFFIXES, data_suffix
    from llama_acc.core.recipe import Recipe

    entry, to, place = done.request.entry, done.request.to, _model_place(done)
    words: list[str] = []
    if done.is_model:
        with contextlib.suppress(UserError):  # no checkpoint, or a part of one
            inspect(done.folder)
            words = ["chat", "--ckpt", place]
        if words and entry is not None and entry.template is not None:
            is_caption = entry.template == "caption"
            words = ["caption", "--ckpt", place, "IMAGE"] if is_caption else [*words, "--template", entry.template]
        elif words and entry is not None and entry.recipe is not None:
            words = ["finetune", "--recipe", entry.recipe, "--pretrained", place]
        words = [] if entry is not None and entry.kind == "vision" else words
    elif entry is None:
        readable = [path for path in done.files if data_suffix(path) in SUFFIXES]
        folders = {path.parent for path in readable}
        places = readable if len(readable) == 1 or len(folders) > 1 else folders
        words = ["convert-data", "check", *map(str, places)] if readable else []
    elif entry.kind != "images" and entry.convert and not converted:
        output = ["--output", str(done.folder / f"{entry.name}.jsonl")]
        raw = [entry.name] if to is None else [*map(str, done.files), *output]
        words = ["convert-data", entry.convert, *raw, *["--all-forms"] * entry.all_forms]
    elif entry.kind != "images" and entry.recipe is not None:
        recipe = Recipe.load(entry.recipe)
        bases, sources = recipe.model.pretrained_list(), [source.path for source in recipe.data.sources]
        # One part of the recipe's data is found by its name.
        is_part = to is None and len(sources) > 1 and entry.name in sources
        data = [] if is_part else ["--data", entry.name if to is None else str(converted or done.folder)]
        words = ["finetune", "--recipe", entry.recipe, *(["--pretrained", bases[0]] if bases else []), *data]
    return shlex.join(["llama-acc", *words]) if words else None


def _model_place(done: "Downloaded") -> str:
    entry = done.request.entry
    return str(done.folder) if done.request.to is not None or entry is None else entry.name


def fetch_shown(address: str) -> list[Path]:
    """The files that an address means; what is not there yet is fetched with bars."""
    from llama_acc.core.hub import fetch_data

    with console.Progress() as progress:
        return fetch_data(address, progress, console.note)
