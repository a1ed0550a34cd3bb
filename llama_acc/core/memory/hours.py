"""How long a data set takes on a kind of GPU: the simulation counts the work, an efficiency makes time of it."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object
from llama_acc.core.memory.gpus import Kind
from llama_acc.core.memory.simulate import Setup, simulate_training
from llama_acc.core.recipe import Recipe

EFFICIENCY = 0.4
"""The share of a GPU's rate that training is taken to reach where nothing was measured."""
_LENGTHS = (128, 384)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of training on documents, of all ranks of a model-parallel group.

    A document of T tokens with L labels takes a*T + b*T^2 + c*L: matrices, attention, the head.

    Attributes:
        by_token: a.
        by_pair: b.
        by_label: c.
    """

    by_token: float
    by_pair: float
    by_label: float

    def of(self, tokens: float, squares: float, labels: float) -> float:
        """Of documents with so many tokens and labels in all, and this sum of squared lengths."""
        return self.by_token * tokens + self.by_pair * squares + self.by_label * labels


@dataclass(frozen=True)
class Texts:
    """What a data set is in numbers.

    Attributes:
        items: documents.
        tokens: of all of them.
        labels: tokens that are trained.
        squares: sum of the squared lengths.
        origin: where these numbers are from, in words: lengths are those of a template and a tokenizer, or assumed.
    """

    items: int
    tokens: float
    labels: float
    squares: float
    origin: str = ""


def assumed_texts(length: int, items: int = 1000) -> Texts:
    """Documents that are all as long as they may be, every token of them trained, where no data is named."""
    origin = f"assumed: {items:,} items of {length:,} tokens, all trained; --data-json FILE takes those of your data"
    return Texts(items, items * length, items * length, float(items * length**2), origin)


def work_of(setup: Setup) -> Work:
    """Counts the work of a run by simulating it with two lengths."""
    short, long = _LENGTHS
    counts = []
    for length in _LENGTHS:
        flops = simulate_training(replace(setup, lengths=(length,), labels=length, micro_batches=1)).flops
        of_loss = sum(count for moment, count in flops.items() if moment.name == "loss")
        counts.append((sum(flops.values()) - of_loss, of_loss / length))
    (few, head), (many, _) = counts
    by_pair = (many / long - few / short) / (long - short)
    size = setup.recipe.parallel.model_parallel_size
    return Work(size * (few / short - by_pair * short), size * by_pair, size * head)


def gpu_hours(work: Work, texts: Texts, epochs: float, kind: Kind, efficiency: float) -> float:
    """Hours of all GPUs together."""
    return work.of(texts.tokens, texts.squares, texts.labels) * epochs / (kind.bf16 * efficiency) / 3600


def read_texts(path: Path) -> Texts:
    """The numbers of a run's data.json.

    Raises:
        UserError: it is no such file.
    """
    try:
        report = read_object(path)
        squares = report["items"] * _mean_square(report["lengths"])
        return Texts(report["items"], report["tokens"], report["label_tokens"], squares, _origin(path, report))
    except (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is not the data.json of a run: {error}",
            "`llama-acc finetune --recipe NAME --dry-run --output DIR` writes one",
        ) from None


def _origin(path: Path, report: Mapping[str, Any]) -> str:
    """With which template and tokenizer the lengths were counted, as far as the run's folder says."""
    template, recipe = report.get("template"), path.with_name("recipe.yaml")
    names = template if isinstance(template, list) else [template or "not said"]
    tokenizer = "not said"
    if recipe.is_file():
        model = Recipe.load(recipe).model
        tokenizer = str(model.tokenizer or ", ".join(map(str, model.pretrained_list())) or "not said")
    return f"{path}, counted with template {', '.join(names)} and tokenizer {tokenizer}; others give other lengths"


def _mean_square(lengths: Mapping[str, Any]) -> float:
    """The mean squared length from quantiles: lengths are taken to grow evenly from one to the next."""
    places = {"min": 0.0, "max": 1.0}
    points = sorted((places[name] if name in places else int(name[1:]) / 100, float(n)) for name, n in lengths.items())
    pairs = itertools.pairwise(points)
    return sum((q2 - q1) * (n1 * n1 + n1 * n2 + n2 * n2) / 3 for (q1, n1), (q2, n2) in pairs)
