"""After the last byte: data that `finetune` cannot read as it is gets converted, a checkpoint its meta.json."""

import json
import shutil
from pathlib import Path

from llama_acc.core.checkpoint.files import write_text_whole
from llama_acc.core.data.convert.rules import Options
from llama_acc.core.data.convert.run import Request, convert
from llama_acc.core.download.catalogue import Entry
from llama_acc.core.download.job import alone
from llama_acc.core.download.names import converted_file
from llama_acc.core.download.transfer import Watch
from llama_acc.core.errors import UserError
from llama_acc.core.units import count_text, size_text

CONVERTED_AT_ONCE = 2**29
"""Bytes that are converted without being asked: a few seconds' work, and what was downloaded stays."""


def bytes_to_convert(entry: Entry | None, size: int) -> int:
    """About how many bytes what is converted at once takes beside what is downloaded; 0 if nothing is."""
    return 0 if entry is None or entry.convert is None or size > CONVERTED_AT_ONCE else size


def finish(entry: Entry, folder: Path, files: tuple[Path, ...], to: Path | None, watch: Watch) -> Path | None:
    """Does what is left to do, unless it was done before.

    Args:
        entry: what was downloaded.
        folder: where it is.
        files: all of it.
        to: the folder the user wanted it in, in place of LLAMA_ACC_HOME.
        watch: is told of it.

    Returns:
        The converted data, if there is any.
    """
    if entry.llama_type is not None and not (folder / "meta.json").exists():
        write_text_whole(folder / "meta.json", json.dumps({"llama_type": entry.llama_type}))
    if entry.convert is None:
        return None
    target = converted_file(entry.name) if to is None else to / f"{entry.name}.jsonl"
    if target.exists():
        return target
    size = sum(path.stat().st_size for path in files)
    if size > CONVERTED_AT_ONCE:
        return None
    if size > (free := shutil.disk_usage(folder).free):
        watch.note(
            f"{entry.name} was not converted: that takes about {size_text(size)}, and {size_text(free)} are free"
        )
        return None
    with alone(folder, watch):  # of two downloads of the same, one converts it
        return target if target.exists() else _converted(entry, files, target, watch)


def _converted(entry: Entry, files: tuple[Path, ...], target: Path, watch: Watch) -> Path | None:
    """Converts it; what cannot be is told, and is no failure of the download."""
    assert entry.convert is not None
    request = Request(entry.convert, files, options=Options(all_forms=entry.all_forms))
    try:
        made = convert(
            request, target, lambda name, done, total: watch.working("converting", Path(name).name, done, total)
        )
    except UserError as error:
        watch.note(f"{entry.name} could not be converted: {error}")
        return None
    skipped = f", {count_text(sum(made.skipped.values()), 'row')} gave none" if made.skipped else ""
    watch.note(f"converted to {count_text(made.items, 'item')}{skipped}: {target}")
    return target
