"""What lies beside a checkpoint's weights and goes with them. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_acc.core.checkpoint.layout import Layout, without_towers
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object
from llama_acc.core.tokenizer import find_tokenizer, load_tokenizer
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
    for folder in reversed(folders):
        if any((folder / name).is_file() for name in (SENTENCEPIECE_FILE, HUGGING_FACE_FILE)):
            return sorted({path for pattern in _TOKENIZER for path in folder.glob(pattern) if path.is_file()})
    for folder in reversed(folders):
        if (path := find_tokenizer(folder)) is not None:
            return [path]
    return []


def special_ids(layouts: Sequence[Layout]) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id`: what a Hugging Face folder says, else the tokenizer; empty = not known."""
    keys = ("bos_token_id", "eos_token_id")
    for layout in reversed(without_towers(layouts)):
        if layout.format == "huggingface" and layout.params_path is not None:
            values = read_object(layout.params_path)
            return {key: values[key] for key in keys if key in values}
        if (path := find_tokenizer(layout.folder)) is not None:
            try:
                tokenizer = load_tokenizer(path)
            except UserError:
                return {}  # a tokenizer of a kind that is not read here can still go with the weights
            return dict(zip(keys, (tokenizer.bos_id, tokenizer.eos_id), strict=True))
    return {}
