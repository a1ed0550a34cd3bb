"""What lies beside a checkpoint's weights and goes with them. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_acc.core.checkpoint.layout import Layout, without_towers
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object
from llama_acc.core.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from llama_acc.core.tokenizer_folder import HUGGING_FACE_FILE, SENTENCEPIECE_FILE

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.json",
    "merges.txt",
)
_OTHERS = ("generation_config.json", "template.json", "recipe.yaml")


def companions(layouts: Sequence[Layout]) -> list[Path]:
    """The files that go with checkpoints laid over each other: tokenizer, prompt format, recipe; the last ones found.

    A tokenizer's files belong together, so they come from one folder; Meta's may lie one level up.
    """
    layouts = without_towers(layouts)
    found = {name: layout.folder / name for layout in layouts for name in _OTHERS if (layout.folder / name).is_file()}
    return [*_tokenizer_files([layout.folder for layout in layouts]), *found.values()]


def _tokenizer_files(folders: Sequence[Path]) -> list[Path]:
    path = _main_file(folders)
    if path is None or path.parent not in folders:
        return [] if path is None else [path]
    folder = path.parent
    return sorted({path for pattern in _TOKENIZER for path in folder.glob(pattern) if path.is_file()})


def _main_file(folders: Sequence[Path]) -> Path | None:
    """The last tokenizer, rather beside weights than one level up."""
    names = (SENTENCEPIECE_FILE, HUGGING_FACE_FILE)
    beside = [folder for folder in folders if any((folder / name).is_file() for name in names)]
    return next((path for folder in reversed(beside or folders) if (path := find_tokenizer(folder)) is not None), None)


def tokenizer_of(layouts: Sequence[Layout]) -> Tokenizer | None:
    """The tokenizer that goes with checkpoints laid over each other; None: there is none, or none that is read here."""
    path = _main_file([layout.folder for layout in without_towers(layouts)])
    try:
        return None if path is None else load_tokenizer(path)
    except UserError:
        return None  # of a kind that is not read here: it can still go with the weights


def special_ids(layouts: Sequence[Layout], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` for a config.json: the tokenizer's, else what a Hugging Face folder says."""
    if tokenizer is not None:
        ends = [tokenizer.eos_id, *sorted(tokenizer.said.end_ids - {tokenizer.eos_id})]
        return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    for layout in reversed(without_towers(layouts)):
        if layout.format == "huggingface" and layout.params_path is not None:
            values = read_object(layout.params_path)
            return {key: values[key] for key in ("bos_token_id", "eos_token_id") if key in values}
    return {}
