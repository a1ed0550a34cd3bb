"""`llama-acc push`: a run or a folder, to Hugging Face."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llama_acc.cli import console
from llama_acc.core.errors import LlamaAccError
from llama_acc.core.text import count_text, size_text

if TYPE_CHECKING:
    from llama_acc.core.push import Destination


def push(
    folder: Annotated[str, Argument(metavar="FOLDER", help="A run's folder, or a checkpoint's.", show_default=False)],
    name: Annotated[str, Argument(metavar="hf:OWNER/NAME", help="The repository.", show_default=False)],
    merge: Annotated[bool, Option("--merge", help="Push a whole model, LoRA pairs merged into it.")] = False,
    base: Annotated[
        str | None,
        Option(metavar="DIR|hf:OWNER/NAME", help="What it was trained on, where the run does not say so, or it moved."),
    ] = None,
    evaluation: Annotated[
        list[Path] | None, Option(metavar="FILE", help="Results for the model card, as --json prints them; may repeat.")
    ] = None,
    public: Annotated[bool, Option("--public", help="Everyone may see a repository that is made.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be pushed, and the model card.")] = False,
) -> None:
    """Push a model to Hugging Face, with a model card: an adapter as PEFT has it, or a whole model.

    A repository that is not there is made, and is private. The token is that of HF_TOKEN or `hf auth login`. An
    interrupted push is finished by the same command.

    Examples:

      llama-acc push runs/alpaca-lora hf:me/alpaca-lora

      llama-acc push runs/alpaca-lora hf:me/alpaca --merge --base Llama-2-7b-hf --public
    """
    console.working("loading PyTorch")
    from llama_acc.core.push import CARD_FILE, checkpoint_to_push, make_package, parse_repo

    repo, source = parse_repo(name), checkpoint_to_push(folder)
    found = None if dry_run else check_destination(name)
    # On the same disk, as a model may be larger than what /tmp has.
    place = source.parent if os.access(source.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".writing-push-", dir=place) as aside:
        with console.Progress() as progress:
            made = make_package(source, repo, Path(aside), base, merge, evaluation or (), progress)
        for note in made.notes:
            console.note(note)
        sizes = {
            file: len(what) if isinstance(what, bytes) else what.stat().st_size for file, what in made.files.items()
        }
        what = f"{count_text(len(sizes), 'file')} ({size_text(sum(sizes.values()))}) to hf:{repo}"
        if found is None:
            console.pairs([(file, size_text(size)) for file, size in sizes.items()], console.out)
            card = made.files[CARD_FILE]
            text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
            console.out.print(f"\n{text}", markup=False)
            console.note(f"this would push {what}, {'public' if public else 'private'} if it is not there yet")
            return
        destination, private = found
        console.note(f"pushing {what}, {'private' if private or (private is None and not public) else 'public'}")
        page = destination.push(made, public, bars=console.shows_bars())
    console.note(f"pushed to {page}; to fetch it:")
    console.command(f"llama-acc download hf:{repo}")


def check_destination(name: str) -> "tuple[Destination, bool | None]":
    """Where to push to, and whether it is private (None: not there yet); what will not do is refused."""
    from llama_acc.core.push import Destination, parse_repo

    destination = Destination(parse_repo(name), console.note)
    return destination, destination.check()


def push_run(output: Path, name: str) -> None:
    """Pushes a run that is done; what fails is finished by a command of its own."""
    try:
        push(str(output), name)
    except LlamaAccError as error:
        finish = f"the run is done and saved; push it with: llama-acc push {output} {name}"
        error.hint = f"{error.hint}; {finish}" if error.hint else finish
        raise
