"""Datasets as the tests load them: rows of each kind, files of them, and what is in what was loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_acc.core.data.dataset import Dataset, load_dataset
from llama_acc.core.data.sources import Source
from llama_acc.core.errors import UserError
from llama_acc.core.tokenizer import Tokenizer

BAD: list[Any] = [7, {"instruction": "x"}, {"instruction": 1, "output": 2}]


def singles(count: int, output: str = "the answer") -> list[Any]:
    return [{"instruction": f"question {i}", "output": output} for i in range(count)]


def good(count: int) -> list[Any]:
    return [{"instruction": f"go {i}", "output": f"the answer is {i}"} for i in range(count)]


def mixed(count: int) -> list[Any]:
    """Every fourth row is none."""
    return [BAD[i // 4 % 3] if i % 4 == 3 else row for i, row in enumerate(good(count))]


def talks(count: int) -> list[Any]:
    return [
        {"conversations": [{"from": "human", "value": f"{i}"}, {"from": "gpt", "value": "ok"}]} for i in range(count)
    ]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl" and not isinstance(content, str)
    text = (
        "\n".join(map(json.dumps, content)) if lines else content if isinstance(content, str) else json.dumps(content)
    )
    path.write_text(text, encoding="utf-8")
    return path


def load(tokenizer: Tokenizer, *sources: Source | Path | str, max_tokens: int = 512, **options: Any) -> Dataset:
    seed = options.pop("seed", 0)
    given = [source if isinstance(source, Source) else Source(str(source)) for source in sources]
    return load_dataset(given, tokenizer, max_tokens, seed, **options)


def plain(tokenizer: Tokenizer, *paths: Path, ratio: float = 1.0, **options: Any) -> Dataset:
    """In the format `none`, leaving out what is wrong."""
    sources = [Source(str(path), template="none", ratio=ratio) for path in paths]
    return load(tokenizer, *sources, max_tokens=64, **{"on_error": "skip", **options})


def texts(dataset: Dataset, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(dataset.document(i)[0]) for i in range(len(dataset))]


def origins(*datasets: Dataset) -> list[str]:
    return [dataset.origin(i) for dataset in datasets for i in range(len(dataset))]


def refused(tokenizer: Tokenizer, *sources: Source | Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load(tokenizer, *sources, **options)
    return caught.value
