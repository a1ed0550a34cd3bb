"""What the words on the command line stand for: files, folders, globs, downloads, standard input."""

from collections.abc import Sequence
from pathlib import Path

from llama_acc.core.catalogue import catalogue
from llama_acc.core.data.convert.formats import AUTO
from llama_acc.core.data.readers import data_files
from llama_acc.core.downloads import converted_file, is_here, raw_files
from llama_acc.core.errors import UserError

STDIN = Path("-")


def inputs_of(words: Sequence[str], format: str) -> list[Path]:
    """The files to convert.

    Args:
        words: files, folders, globs, names of downloads, or `-`; none: the download of the format's name.
        format: of them.

    Raises:
        UserError: something is not there.
    """
    if not words:
        return raw_files(_download_for(format))
    if list(words).count("-") > 1:
        raise UserError("standard input (-) can be read only once")
    return [path for word in words for path in _files(word)]


def default_output(words: Sequence[str], format: str, inputs: Sequence[Path]) -> Path | None:
    """Where `--data NAME` finds what one download is converted to; None if something else is converted."""
    if len(words) > 1 or (words and not _is_download(words[0])):
        return None
    output = converted_file(words[0] if words else _download_for(format))
    # Beside its source it would be read a second time.
    return None if any(path.parent == output.parent for path in inputs) else output


def _download_for(format: str) -> str:
    """The name of the download of a format: its own, or that of the only one there is in it."""
    entries = catalogue()
    if format in entries:
        return format
    names = [name for name, entry in entries.items() if entry.convert == format and format != AUTO]
    here = [name for name in names if is_here(entries[name])]
    if len(here) == 1:
        return here[0]
    if here:
        raise UserError(f"several downloads are in the format {format}: {', '.join(here)}", "name one of them")
    if names:
        orders = " or ".join(f"llama-acc download {name}" for name in names)
        raise UserError(
            f"no data in the format {format} has been downloaded", f"name the files to convert, or: {orders}"
        )
    raise UserError("there is nothing to convert", "name files to convert, or - for standard input")


def _files(word: str) -> list[Path]:
    if word == "-":
        return [STDIN]
    path = Path(word).expanduser()
    if path.exists() and not path.is_dir():
        return [path]  # whatever its name ends in
    return raw_files(word) if _is_download(word) else data_files(path)


def _is_download(word: str) -> bool:
    """Whether a word names a download: nothing here is called so."""
    return word in catalogue() and not Path(word).exists()
