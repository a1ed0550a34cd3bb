"""`llama-acc caption`: what a model says of images."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text
from typer import Argument, Option

from llama_acc.cli import console, options
from llama_acc.cli.options import ModelOptions, launch_model, load_distributed
from llama_acc.core.atomic import whole_file
from llama_acc.core.distributed import environment
from llama_acc.core.errors import UserError
from llama_acc.core.text import count_text, escape_control_chars

if TYPE_CHECKING:
    from llama_acc.core.data.image_files import Named
    from llama_acc.core.generate.caption import Captioned
    from llama_acc.core.generate.engine import Prompt
    from llama_acc.core.generate.load import LoadedModel


_DEFAULT_INSTRUCTION = "Describe the image."


def caption(
    images: Annotated[
        list[str],
        Argument(
            metavar="IMAGE...",
            help="Files, folders, globs, .tar shards; - reads a list from standard input.",
            show_default=False,
        ),
    ],
    ckpt: options.Checkpoints,
    prompt: Annotated[
        str | None, Option(metavar="TEXT", help="The beginning of each caption, to be continued.")
    ] = None,
    instruction: Annotated[
        str | None, Option(metavar="TEXT", help="Ask this of each image, in the checkpoint's own format.")
    ] = None,
    html: Annotated[Path | None, Option(metavar="FILE", help="Write a page of the images with their captions.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print a JSON object for each image, one to a line.")] = False,
    max_new_tokens: Annotated[int, Option(min=1, help="Most tokens of a caption.")] = 128,
    batch_size: Annotated[int, Option(min=1, help="Images that are captioned at a time; memory grows with it.")] = 16,
    max_pixels: Annotated[
        int, Option(min=1, help="Larger images are refused: they may fill the memory.")
    ] = 100_000_000,
    template: options.Template = "auto",
    tokenizer: options.TokenizerFile = None,
    quantize: options.Quantize = None,
    stream: options.Stream = False,
    device: options.Device = None,
    verify: options.Verify = False,
    nproc: options.Nproc = None,
) -> None:
    """Generate captions for images. A run's folder means its latest checkpoint.

    Ends with 2 if an image failed; the others are captioned all the same.

    Examples:

      llama-acc caption --ckpt runs/caption-quickstart shipped:caption-quickstart/held-out.tar --html captions.html

      llama-acc caption --ckpt runs/stage-one photo.jpg --prompt "The author"

      llama-acc caption --ckpt runs/stage-two photos/ 'more/*.png' --instruction "What is unusual here?" --json

      find . -name '*.jpg' | llama-acc caption --ckpt runs/stage-one -

      llama-acc caption --ckpt runs/stage-one --quantize nf4 photos/
    """
    if prompt is not None and instruction is not None:
        raise UserError(
            "--prompt and --instruction do not go together",
            "--prompt begins a caption (stage one), --instruction asks a question (stage two)",
        )
    html = None if html is None else html.expanduser()
    if html is not None:
        options.check_writable(html)
    launch_model(nproc, device, ckpt)
    # Standard input is that of the first process.
    named = _named(images) if environment.is_main() else []
    problems: list[str] = []
    with load_distributed(ModelOptions(ckpt, device, tokenizer, template, verify, quantize, stream=stream)) as loaded:
        if environment.is_main():
            from llama_acc.core.data.image_files import ImageWorkers, default_workers
            from llama_acc.core.generate.caption import caption_page, captions, load_image, stream_caption

            asked = _asked(loaded, prompt, instruction)
            with ImageWorkers(min(default_workers(), len(named))) as workers:
                if len(named) == 1 and not as_json and html is None:
                    if (problem := named[0].problem) is not None:
                        raise UserError(f"{named[0].name}: {problem}")
                    pixels = load_image(loaded, named[0].reference, named[0].name, max_pixels)
                    return console.stream(stream_caption(loaded, pixels, asked, max_new_tokens))
                found = captions(
                    loaded,
                    named,
                    asked,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    max_pixels=max_pixels,
                    workers=workers,
                )
                shown = _shown(found, named, as_json, problems)
                if html is None:
                    for _ in shown:
                        pass
                else:
                    question = f", asked: {instruction}" if instruction else f", begun with: {prompt}" if prompt else ""
                    about = f"{' + '.join(ckpt)}, prompt format {loaded.template.name}{question}"
                    title = count_text(len(named), "image")
                    with whole_file(html) as file:
                        parts = caption_page(title, about, shown, max_pixels)
                        file.writelines(part.encode(errors="backslashreplace") for part in parts)
                    console.note(f"wrote {html}")
            if problems:
                raise UserError(f"{len(problems):,} of {count_text(len(named), 'image')} failed")
    return None


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


def _shown(
    found: "Iterator[Captioned]", named: "Sequence[Named]", as_json: bool, problems: list[str]
) -> "Iterator[Captioned]":
    """Prints each caption when it is there, and passes it on; adds what failed to the problems."""
    width = max(len(image.name) for image in named) if len(named) > 1 else 0
    expected = exact = 0
    with console.Progress("image") as progress:
        for done, one in enumerate(found, start=1):
            name, problem = one.image.name, one.problem
            expected += one.image.caption is not None
            exact += problem is None and one.text == one.image.caption
            if as_json:
                result = {"caption": one.text} if problem is None else {"error": problem}
                right = {} if one.image.caption is None else {"expected": one.image.caption}
                typer.echo(json.dumps({"image": name, **result, **right}))
            elif problem is None:
                start = (f"{escape_control_chars(name):<{width}}  ", "bold") if width else ""
                console.out.print(Text.assemble(start, escape_control_chars(" ".join(one.text.split()))))
            if problem is not None:
                problems.append(problem)
                console.error(f"{name}: {problem}")
            if not sys.stdout.isatty():  # rows on a terminal are progress enough
                progress("captioned", done, len(named))
            yield one
    if expected:
        share = f"{100 * exact / expected:.1f}%"
        console.note(f"{exact:,} of {count_text(expected, 'caption')} exactly as expected ({share})")
