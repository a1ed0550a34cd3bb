"""Perplexity: how well a checkpoint predicts the labelled tokens of data, in the prompt format it was trained with."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llama_acc.core.data.batches import build, micro_batches
from llama_acc.core.data.chat_template import ChatTemplate
from llama_acc.core.data.dataset import Dataset, FileProgress, load_dataset
from llama_acc.core.data.sources import Fetch, Source
from llama_acc.core.data.templates import TEMPLATES, get_template
from llama_acc.core.errors import RunError, UserError
from llama_acc.core.generate.load import LoadedModel
from llama_acc.core.hub import fetch_data
from llama_acc.core.train.step import forward


@dataclass(frozen=True)
class Perplexity:
    """What a model thinks of data, and how much that is; counts are those of the data report."""

    loss: float  # mean cross-entropy per label token, in nats; a run's validation_loss
    items: int  # of all files; those measured, and the dropped ones
    tokens: int  # of the items measured
    label_tokens: int  # those of them that are to be predicted
    truncated: int  # items that were longer than the most tokens allowed, and were cut
    dropped: int  # items that have nothing to predict within these

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def read_data(
    loaded: LoadedModel,
    paths: Sequence[str],
    max_tokens: int | None,
    progress: FileProgress,
    fetch: Fetch = fetch_data,
) -> Dataset:
    """Files, folders, globs, downloaded names or addresses, encoded in the model's prompt format.

    Longer items than `max_tokens` (None: the model's context) are cut, and counted.

    Raises:
        UserError: data is missing or wrong, or the format cannot say what is to be predicted.
        RunError: the network failed.
    """
    context = loaded.model.config.max_seq_len
    if max_tokens is not None and max_tokens > context:
        raise UserError(f"max-tokens ({max_tokens}) is more than the model's context ({context})")
    template = loaded.template
    if not isinstance(template, ChatTemplate):  # data is written in formats by name: those that are shipped
        shipped = [get_template(template.name, loaded.tokenizer)] if template.name in TEMPLATES else []
        if template not in [*shipped, *(form.with_strict_stops() for form in shipped)]:
            raise UserError(
                f"the checkpoint's prompt format {template.name!r} is not one that comes with llama-acc",
                f"give --template: {', '.join(TEMPLATES)}",
            )
    sources = [Source(path, template=template.name) for path in paths]
    return load_dataset(sources, loaded.tokenizer, max_tokens or context, seed=0, progress=progress, fetch=fetch)


@torch.inference_mode()
def measure(loaded: LoadedModel, data: Dataset, batch_size: int, progress: Callable[[int, int], None]) -> Perplexity:
    """The perplexity of data, on one process; `progress` gets (items measured, items in all) after each batch.

    Raises:
        RunError: the loss is not a finite number.
    """
    report = data.report()
    counts = {name: report[name] for name in ("items", "tokens", "label_tokens", "truncated", "dropped")}
    loss, done = 0.0, 0
    for items in micro_batches(range(len(data)), data.lengths, batch_size):
        loss += forward(loaded.model, build(data, items), 1.0 / data.label_weight, loaded.device).item()
        done += len(items)
        progress(done, len(data))
    if not math.isfinite(loss):
        raise RunError(f"the loss over the data is {loss}", "the checkpoint may hold values that are not finite")
    return Perplexity(loss, **counts)
