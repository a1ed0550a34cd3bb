"""The text that rounding is calibrated with: some items of the data that a model is to be trained on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_acc.core.checkpoint.layout import inspect, locate
from llama_acc.core.data.load import FileProgress, load_dataset
from llama_acc.core.data.sources import Source
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import find_tokenizer, load_tokenizer


def calibration_text(
    checkpoint: str, files: Sequence[str], template: str, items: int, max_tokens: int, progress: FileProgress
) -> list[list[int]]:
    """The tokens of items, prompts and answers, each item by itself.

    Args:
        checkpoint: whose tokenizer is used.
        files: data files, folders, globs or downloaded names.
        template: the prompt format; "auto" = the one that `finetune` takes for such data.
        items: how many; a fixed random choice where there are more.
        max_tokens: longer items are cut.
        progress: told how far the encoding of a file is.

    Raises:
        UserError: data is missing or wrong, or there is no tokenizer.
    """
    folder = inspect(locate(checkpoint)).folder
    path = find_tokenizer(folder)
    if path is None:
        raise UserError(
            f"there is no tokenizer in {folder}, and calibrating needs one",
            "put tokenizer.model or tokenizer.json beside the weights",
        )
    sources = [Source(file, template=template) for file in files]
    data = load_dataset(sources, load_tokenizer(Path(path)), max_tokens, seed=0, progress=progress)
    chosen = np.sort(np.random.default_rng(0).permutation(len(data))[:items])
    return [data.document(int(document))[0].tolist() for document in chosen]
