"""`llama-acc download`."""

import contextlib
import json
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_acc.cli import console, options
from llama_acc.core.errors import LlamaAccError, UserError
from llama_acc.core.text import count_text, escape_control_chars, size_text

if TYPE_CHECKING:
    from llama_acc.core.catalogue import Entry
    from llama_acc.core.hub import Downloaded, Progress

HELP = """Download models and data: by a name of the catalogue, or by an address.

What is there is not fetched again.

Examples:

  llama-acc download --list

  llama-acc download alpaca llama2-7b

  llama-acc download hf:TinyLlama/TinyLlama-1.1B-Chat-v1.0

  llama-acc download 'hf:datasets/stingning/ultrachat/train_*.jsonl' --to data

  llama-acc download https://example.org/questions.jsonl
"""
_SECONDS_BETWEEN_LINES = 5.0
CONVERTED_AT_ONCE = 2**29
"""Bytes that are converted without being asked: a few seconds' work, and what was downloaded stays."""


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
            raise UserError("--list shows the whole catalogue: leave the names out")
        _list(as_json)
        return
    if not names:
        raise UserError("download what? Give a name or an address", "`llama-acc download --list` shows the names")
    _fetch(names, None if to is None else Path(to).expanduser(), token, as_json)


def _list(as_json: bool) -> None:
    from llama_acc.core.catalogue import catalogue
    from llama_acc.core.downloads import folder_of, is_here

    entries = list(catalogue().values())
    if as_json:
        known = [
            {**entry.model_dump(exclude_none=True), "here": is_here(entry), "folder": str(folder_of(entry))}
            for entry in entries
        ]
        typer.echo(json.dumps(known, indent=1))
        return
    here = ["yes" if is_here(entry) else "gated" if entry.gated else "" for entry in entries]
    rows = [(e.name, e.size or "", state, e.license, e.what) for e, state in zip(entries, here, strict=True)]
    header = ("name", "size", "here", "license", "what")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for number, (name, size, *others, what) in enumerate([header, *rows]):
        cells = [name.ljust(widths[0]), size.rjust(widths[1])]
        cells += [cell.ljust(width) for cell, width in zip(others, widths[2:-1], strict=True)]
        console.out.print("  ".join([*cells, what]), style="" if number else "bold", markup=False)


def _fetch(names: list[str], to: Path | None, token: str | None, as_json: bool) -> None:
    from llama_acc.core.downloads import resolve
    from llama_acc.core.hub import RESUME_HINT, Downloader

    done: list[tuple[Downloaded, Path | None]] = []
    codes: list[int] = []
    requests = resolve(names, to)
    if token is not None and not any(request.asks_the_hub for request in requests):
        console.note("--token is not used: it is for Hugging Face, and nothing here is fetched from there")
    with progress_shown() as progress:
        downloader = Downloader(progress, console.note, token)
        for request in requests:
            is_converted = request.entry is not None and request.entry.convert is not None
            try:
                one = downloader.download(
                    request,
                    lambda size, also=is_converted: size if also and size <= CONVERTED_AT_ONCE else 0,  # type: ignore[misc]
                )
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


def _finish(done: "Downloaded", progress: "Progress") -> Path | None:
    """Add a checkpoint's meta.json, and convert data that `finetune` cannot read as it is; the converted file."""
    from llama_acc.core.atomic import write_text_whole
    from llama_acc.core.downloads import converted_file

    entry = done.request.entry
    if entry is not None and entry.llama_type is not None and not (done.folder / "meta.json").exists():
        write_text_whole(done.folder / "meta.json", json.dumps({"llama_type": entry.llama_type}))
    if entry is None or entry.convert is None:
        return None
    target = converted_file(entry.name) if done.request.to is None else done.request.to / f"{entry.name}.jsonl"
    size = sum(path.stat().st_size for path in done.files)
    if target.exists() or size > CONVERTED_AT_ONCE:
        return target if target.exists() else None
    if size > (free := shutil.disk_usage(done.folder).free):
        needed = f"that takes about {size_text(size)}, and {size_text(free)} are free"
        console.note(f"{entry.name} was not converted: {needed}")
        return None
    return _convert(entry, done, target, progress)


def _convert(entry: "Entry", done: "Downloaded", target: Path, progress: "Progress") -> Path | None:
    """Convert it; what cannot be is reported, and is no failure of the download."""
    from llama_acc.core.data.convert.formats import Options
    from llama_acc.core.data.convert.run import Conversion, convert
    from llama_acc.core.hub import locked

    assert entry.convert is not None
    with locked(done.folder, console.note):  # of two downloads of the same, one converts it
        if target.exists():
            return target
        try:
            made = Conversion(
                entry.convert,
                done.files,
                Options(all_forms=entry.all_forms),
                progress=lambda name, n, of: progress(f"converting {Path(name).name}", n, of),
            )
            convert(made, target)
        except UserError as error:
            console.note(f"{entry.name} could not be converted: {error}")
            return None
    skipped = f", {count_text(sum(made.skipped.values()), 'row')} gave none" if made.skipped else ""
    console.note(f"converted to {count_text(made.items, 'item')}{skipped}: {target}")
    return target


def _report(done: "list[tuple[Downloaded, Path | None]]", as_json: bool) -> None:
    if as_json:
        found = [
            {
                "name": one.request.name,
                "folder": str(one.folder),
                "files": [str(path) for path in one.files],
                "fetched": [str(path) for path in one.fetched],
                "converted": None if converted is None else str(converted),
                "next": _next_command(one, converted),
            }
            for one, converted in done
        ]
        typer.echo(json.dumps(found, indent=1))
    for one, converted in done:
        count = len(one.files)
        where = str(one.files[0]) if count == 1 else f"{one.folder} ({count} files)"
        console.note(f"{one.request.name} {'is in' if one.fetched else 'was there already:'} {where}")
        for remark in _remarks(one):
            console.note(remark)
        command = _next_command(one, converted)
        if command is not None and not as_json:
            console.note("now type:")
            console.command(command)


def _remarks(done: "Downloaded") -> list[str]:
    """What else there is to know, and what the next command still lacks."""
    from llama_acc.core.catalogue import catalogue
    from llama_acc.core.data.parquet import PARQUET_SUFFIX
    from llama_acc.core.data.read import data_suffix
    from llama_acc.core.downloads import is_here

    entry = done.request.entry
    found = [entry.note] if entry is not None and entry.note else []
    if entry is not None and entry.kind == "vision":
        place = _model_place(done)
        found.append(f"give it beside a language model: --pretrained llama2-13b --pretrained {place}")
    is_data = entry is None or entry.kind == "data"
    if is_data and any(data_suffix(path) == PARQUET_SUFFIX for path in done.files) and find_spec("pyarrow") is None:
        found.append("its files are Parquet, which pyarrow reads; it is not installed: pip install pyarrow")
    if not done.is_model and entry is not None and entry.recipe is not None:
        base = catalogue().get(_base(entry.recipe) or "")
        if base is not None and not is_here(base):
            found.append(f"the recipe starts from {base.name}, which is not here yet: llama-acc download {base.name}")
    return found


def _next_command(done: "Downloaded", converted: Path | None) -> str | None:
    """The command that uses what was downloaded; None where there is no one such command."""
    entry, to = done.request.entry, done.request.to
    words: list[str] | None = None
    if done.is_model:
        words = _use_model(done)
    elif entry is None:
        words = _check(done)
    elif entry.kind != "images" and entry.convert and not converted:
        output = ["--output", str(done.folder / f"{entry.name}.jsonl")]
        raw = [entry.name] if to is None else [*map(str, done.files), *output]
        words = ["convert-data", entry.convert, *raw, *["--all-forms"] * entry.all_forms]
    elif entry.kind != "images" and entry.recipe is not None:
        base = _base(entry.recipe)
        words = ["finetune", "--recipe", entry.recipe, *(["--pretrained", base] if base else [])]
        words += ["--data", str(converted or done.folder)] if to is not None else _data_named(entry)
    return None if words is None else shlex.join(["llama-acc", *words])


def _use_model(done: "Downloaded") -> list[str] | None:
    from llama_acc.core.checkpoint.layout import inspect

    entry, place = done.request.entry, _model_place(done)
    try:
        inspect(done.folder)
    except UserError:
        return None
    if entry is not None and entry.kind == "vision":
        return None
    if entry is not None and entry.template == "caption":
        return ["caption", "--ckpt", place, "IMAGE"]
    if entry is not None and entry.template is not None:
        return ["chat", "--ckpt", place, "--template", entry.template]
    if entry is None or entry.recipe is None:
        return ["chat", "--ckpt", place]
    return ["finetune", "--recipe", entry.recipe, "--pretrained", place]


def _model_place(done: "Downloaded") -> str:
    entry = done.request.entry
    return str(done.folder) if done.request.to is not None or entry is None else entry.name


def _check(done: "Downloaded") -> list[str] | None:
    """What shows whether data of which nothing is known can be trained on."""
    from llama_acc.core.data.read import SUFFIXES, data_suffix

    readable = [path for path in done.files if data_suffix(path) in SUFFIXES]
    folders = {path.parent for path in readable}
    places = readable if len(readable) == 1 or len(folders) > 1 else list(folders)
    return ["convert-data", "check", *map(str, places)] if readable else None


def _base(recipe: str) -> str | None:
    from llama_acc.core.recipe import Recipe

    return next(iter(Recipe.load(recipe).model.pretrained_list()), None)


def _data_named(entry: "Entry") -> list[str]:
    """What stands for the recipe's data; nothing where it is only one part of that, and found by its name."""
    from llama_acc.core.recipe import Recipe

    assert entry.recipe is not None
    sources = [source.path for source in Recipe.load(entry.recipe).data.sources]
    return [] if len(sources) > 1 and entry.name in sources else ["--data", entry.name]


def fetch_shown(address: str) -> list[Path]:
    """The files that an address means; what is not there yet is fetched with bars."""
    from llama_acc.core.hub import fetch_data

    with progress_shown() as progress:
        return fetch_data(address, progress, console.note)


@contextlib.contextmanager
def progress_shown() -> "Iterator[Progress]":
    """Bytes, rate and time left of each file: bars on a terminal, a line every few seconds otherwise."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bars = Progress(
        TextColumn("{task.description}"),
        DownloadColumn(binary_units=True),
        BarColumn(bar_width=24),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console.err,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}
    lock, last_line = threading.Lock(), time.monotonic()

    def show(label: str, done: int, total: int | None) -> None:
        nonlocal last_line
        with lock:
            if console.err.is_terminal and not console.err.is_dumb_terminal:
                if label not in tasks:
                    console.working(None)
                    bars.start()
                    tasks[label] = bars.add_task(escape_control_chars(label), total=total)
                bars.update(tasks[label], completed=done, total=total, visible=done != total)
            elif time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                console.note(f"{label}: {size_text(done)}" + (f" of {size_text(total)}" if total else ""))

    try:
        yield show
    finally:
        if tasks:
            bars.stop()
