"""`llama-acc caption`: what a model says of images."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import typer

from llama_acc.cli import console, options
from llama_acc.cli.loading import Which, check_split, launch_ranks, shared_model
from llama_acc.core.distributed import Launch, environment
from llama_acc.core.errors import UserError
from llama_acc.core.units import count_text
from llama_acc.core.visible import visible

if TYPE_CHECKING:
    from llama_acc.core.data.image_files import Named
    from llama_acc.core.generate.caption import Captioned
    from llama_acc.core.generate.engine import Prompt
    from llama_acc.core.generate.load import LoadedModel

HELP = """Say what is to be seen on images. A run's folder means its latest checkpoint.

Ends with 2 if an image failed; the others are captioned all the same.

Examples:

  llama-acc caption --ckpt runs/caption-quickstart drawn:held-out --html captions.html

  llama-acc caption --ckpt runs/stage-one photo.jpg --prompt "The author"

  llama-acc caption --ckpt runs/stage-two photos/ 'more/*.png' --instruction "What is unusual here?" --json

  find . -name '*.jpg' | llama-acc caption --ckpt runs/stage-one -

  llama-acc caption --ckpt runs/stage-one --quantize nf4 photos/
"""

_DEFAULT_INSTRUCTION = "Describe the image."
_THUMBNAIL = 320  # pixels of a picture's longer side on the page


@dataclass(frozen=True)
class _Wanted:
    """Flags that say how captions are made and where they go."""

    max_new_tokens: int
    batch_size: int
    max_pixels: int
    as_json: bool
    html: Path | None


def caption(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="Files, folders, globs, .tar shards, drawn:held-out; - reads a list from standard input.",
            callback=options.given,
            show_default=False,
        ),
    ],
    ckpt: options.Checkpoints,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="The beginning of each caption, to be continued.")
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", metavar="TEXT", help="Ask this of each image, in the checkpoint's own format."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page of the images with their captions.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each image, one to a line.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of a caption.")] = 128,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images that are captioned at a time; memory grows with it.")
    ] = 16,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", min=1, help="Larger images are refused: they may fill the memory.")
    ] = 100_000_000,
    template: options.Template = "auto",
    tokenizer: options.TokenizerFile = None,
    quant: options.Quantize = None,
    device: options.Device = None,
    verify: options.Verify = False,
    nproc: options.Nproc = None,
) -> None:
    """Say what is to be seen on images."""
    if prompt is not None and instruction is not None:
        raise UserError(
            "--prompt and --instruction do not go together",
            "--prompt begins a caption (stage one), --instruction asks a question (stage two)",
        )
    if html is not None and not html.expanduser().parent.is_dir():
        raise UserError(f"cannot write {html}: there is no folder {html.parent}", f"mkdir -p {html.parent}")
    launch_ranks(Launch(nproc), device, lambda count: check_split(ckpt, count))
    # Standard input is that of the first process.
    named = _named(images) if environment.is_main() else []
    wanted = _Wanted(max_new_tokens, batch_size, max_pixels, as_json, None if html is None else html.expanduser())
    failed = 0
    with shared_model(Which(ckpt, device, tokenizer, template, verify, quant)) as loaded:
        if environment.is_main():
            asked = _asked(loaded, prompt, instruction)
            question = f", asked: {instruction}" if instruction else f", begun with: {prompt}" if prompt else ""
            about = f"{' + '.join(ckpt)}, prompt format {loaded.template.name}{question}"
            failed = _caption(loaded, named, asked, wanted, about)
    if failed:
        raise UserError(f"{failed:,} of {count_text(len(named), 'image')} failed")


def _named(images: Sequence[str]) -> "list[Named]":
    from llama_acc.core.data.image_files import find_images

    names = (line for name in images for line in (_standard_input() if name == "-" else [name]))
    named = list(find_images(names))
    if not named:
        raise UserError("standard input names no image", "give paths, one to a line")
    return named


def _standard_input() -> list[str]:
    # As file names are: whatever bytes they are made of.
    text = os.fsdecode(sys.stdin.buffer.read())
    return [line for line in text.splitlines() if line.strip()]


def _asked(loaded: "LoadedModel", prompt: str | None, instruction: str | None) -> "Prompt":
    from llama_acc.core.generate.caption import caption_prompt, follows_instructions, instruction_prompt

    if prompt is None and instruction is None and follows_instructions(loaded):
        instruction = _DEFAULT_INSTRUCTION
        console.note(f"the checkpoint follows instructions (template {loaded.template.name}): asking {instruction!r}")
    if instruction is not None:
        return instruction_prompt(loaded, instruction)
    return caption_prompt(loaded, prompt or "")


def _caption(loaded: "LoadedModel", named: "Sequence[Named]", asked: "Prompt", wanted: _Wanted, about: str) -> int:
    """Captions images and shows the captions. Returns how many images failed."""
    from llama_acc.core.data.image_workers import ImageWorkers, default_workers
    from llama_acc.core.generate.caption import captions

    with ImageWorkers(min(default_workers(), len(named))) as workers:
        if len(named) == 1 and not wanted.as_json and wanted.html is None:
            _stream(loaded, named[0], asked, wanted)
            return 0
        found = captions(
            loaded,
            named,
            asked,
            max_new_tokens=wanted.max_new_tokens,
            batch_size=wanted.batch_size,
            max_pixels=wanted.max_pixels,
            workers=workers,
        )
        count = _Count()
        shown = _shown(found, named, wanted.as_json, count)
        if wanted.html is None:
            for _ in shown:
                pass
        else:
            _write_page(wanted.html, count_text(len(named), "image"), about, _cards(shown, wanted.max_pixels))
    if count.expected:
        share = 100 * count.exact / count.expected
        console.note(f"{count.exact:,} of {count_text(count.expected, 'caption')} exactly as expected ({share:.1f}%)")
    return count.failed


@dataclass
class _Count:
    """What came of the images."""

    failed: int = 0
    expected: int = 0
    exact: int = 0

    def add(self, found: "Captioned") -> None:
        self.failed += found.problem is not None
        self.expected += found.image.caption is not None
        self.exact += found.problem is None and found.text == found.image.caption


def _stream(loaded: "LoadedModel", image: "Named", asked: "Prompt", wanted: _Wanted) -> None:
    """One image: its caption alone, as it is written.

    Raises:
        UserError: the image cannot be used.
    """
    from llama_acc.core.data.images import ImageJob, pixels_or_problem
    from llama_acc.core.generate.caption import evaluation_transform, stream_caption

    job = ImageJob(image.reference, evaluation_transform(loaded), max_pixels=wanted.max_pixels)
    pixels = image.problem or pixels_or_problem(job)
    if isinstance(pixels, str):
        raise UserError(f"{image.name}: {pixels}")
    console.stream(stream_caption(loaded, pixels, asked, wanted.max_new_tokens))


def _shown(
    found: "Iterator[Captioned]", named: "Sequence[Named]", as_json: bool, count: _Count
) -> "Iterator[Captioned]":
    """Prints each caption when it is there, and passes it on."""
    width = max(len(image.name) for image in named)
    # Rows on a terminal are progress enough.
    watch = contextlib.nullcontext() if sys.stdout.isatty() else console.CountProgress("captioned", "image")
    with watch as progress:
        for done, one in enumerate(found, start=1):
            count.add(one)
            if as_json:
                typer.echo(json.dumps(_object(one)))
            elif one.problem is None:
                _print_row(one, width if len(named) > 1 else 0)
            if one.problem is not None:
                console.error(f"{one.image.name}: {one.problem}")
            if progress is not None:
                progress.tell(done, len(named))
            yield one


def _print_row(one: "Captioned", width: int) -> None:
    from rich.text import Text

    name = f"{visible(one.image.name):<{width}}  " if width else ""
    console.out.print(Text.assemble((name, "bold"), visible(" ".join(one.text.split()))))


def _object(one: "Captioned") -> dict[str, str]:
    said = {"caption": one.text} if one.problem is None else {"error": one.problem}
    expected = {} if one.image.caption is None else {"expected": one.image.caption}
    return {"image": one.image.name, **said, **expected}


def _cards(shown: "Iterator[Captioned]", max_pixels: int) -> "Iterator[tuple[Captioned, bytes]]":
    from llama_acc.core.data.images import ImageError, thumbnail

    for one in shown:
        picture = b""
        if one.problem is None:
            with contextlib.suppress(ImageError):  # it was there a moment ago
                picture = thumbnail(one.image.reference, _THUMBNAIL, max_pixels)
        yield one, picture


def _write_page(path: Path, title: str, note: str, cards: "Iterator[tuple[Captioned, bytes]]") -> None:
    """Writes the page, whole or not at all."""
    from llama_acc.core.generate.caption import caption_page

    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for part in caption_page(title, note, cards):
                file.write(part)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "choose another --html FILE") from error
    finally:
        temporary.unlink(missing_ok=True)
    console.note(f"wrote {path}")
