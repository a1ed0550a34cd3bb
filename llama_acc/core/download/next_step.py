"""What to type after a download."""

import shlex
from importlib.util import find_spec
from pathlib import Path

from llama_acc.core.checkpoint.layout import inspect
from llama_acc.core.data.files import data_suffix
from llama_acc.core.data.parquet import PARQUET_SUFFIX
from llama_acc.core.data.rows import SUFFIXES
from llama_acc.core.download.catalogue import Entry, catalogue
from llama_acc.core.download.downloads import Downloaded
from llama_acc.core.download.names import is_here
from llama_acc.core.errors import UserError
from llama_acc.core.recipe import Recipe

_DEFAULT_RECIPE = "alpaca"


def next_command(done: Downloaded) -> str | None:
    """The command that uses what was downloaded; None where there is no one such command."""
    entry = done.wanted.entry
    if done.is_model:
        return _with_model(done, entry)
    if entry is not None and entry.kind == "images":
        return None
    if entry is not None and entry.convert and not done.converted:
        return entry.conversion if done.wanted.to is None else _conversion(done, entry.convert)
    if entry is None:
        return _check(done)
    if entry.recipe is None:
        return None
    return _finetune(entry.recipe, _pretrained(entry.recipe), _data(entry.recipe, done, entry))


def remarks(done: Downloaded) -> list[str]:
    """What else there is to know, and what the next command still lacks."""
    entry = done.wanted.entry
    found = [entry.note] if entry is not None and entry.note else []
    if entry is not None and entry.kind == "vision":
        found.append(
            f"give it beside a language model: --pretrained llama2-13b --pretrained {_model_place(done, entry)}"
        )
    is_data = entry is None or entry.kind == "data"
    if is_data and any(data_suffix(path) == PARQUET_SUFFIX for path in done.files) and find_spec("pyarrow") is None:
        found.append("its files are Parquet, which pyarrow reads; it is not installed: pip install pyarrow")
    missing = _missing_base(done, entry)
    if missing is not None:
        found.append(f"the recipe starts from {missing}, which is not here yet: llama-acc download {missing}")
    return found


def _check(done: Downloaded) -> str | None:
    """What shows whether data of which nothing is known can be trained on."""
    readable = [path for path in done.files if data_suffix(path) in SUFFIXES]
    if not readable:
        return None
    folders = {path.parent for path in readable}
    places = readable if len(readable) == 1 or len(folders) > 1 else list(folders)
    return shlex.join(["llama-acc", "convert-data", "check", *map(str, places)])


def _with_model(done: Downloaded, entry: Entry | None) -> str | None:
    if (entry is not None and entry.kind == "vision") or not _can_be_loaded(done.folder):
        return None
    where = _model_place(done, entry)
    if entry is not None and entry.template == "caption":
        return shlex.join(["llama-acc", "caption", "--ckpt", where, "IMAGE"])
    if entry is not None and entry.template is not None:
        return shlex.join(["llama-acc", "chat", "--ckpt", where, "--template", entry.template])
    if entry is None or entry.recipe is None:
        return shlex.join(["llama-acc", "chat", "--ckpt", where])
    return _finetune(entry.recipe, where, None)


def _can_be_loaded(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of a format we read."""
    try:
        inspect(folder)
    except UserError:
        return False
    return True


def _finetune(recipe: str, pretrained: str | None, data: str | None) -> str:
    words = ["llama-acc", "finetune", "--recipe", recipe]
    words += ["--pretrained", pretrained] if pretrained else []
    words += ["--data", data] if data else []
    return shlex.join(words)


def _pretrained(recipe: str) -> str | None:
    names = Recipe.load(recipe).model.pretrained_list()
    return names[0] if names else None


def _data(recipe: str, done: Downloaded, entry: Entry) -> str | None:
    """What stands for the recipe's data; None where it is only one part of that, and found by its name."""
    if done.wanted.to is not None:
        return str(done.converted or done.folder)
    sources = [source.path for source in Recipe.load(recipe).data.sources]
    return None if len(sources) > 1 and entry.name in sources else entry.name


def _conversion(done: Downloaded, format: str) -> str:
    output = done.folder / f"{done.wanted.name}.jsonl"
    return shlex.join(["llama-acc", "convert-data", format, *map(str, done.files), "--output", str(output)])


def _model_place(done: Downloaded, entry: Entry | None) -> str:
    return str(done.folder) if done.wanted.to is not None or entry is None else entry.name


def _missing_base(done: Downloaded, entry: Entry | None) -> str | None:
    """The model the next command starts from, if it can be downloaded and is not here."""
    if done.is_model or entry is None or entry.recipe is None:
        return None
    base = catalogue().get(_pretrained(entry.recipe) or "")
    return None if base is None or is_here(base) else base.name
