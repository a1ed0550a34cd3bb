"""Documents given as tokens and labels, as micro-batches are built from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llama_acc.core.data.batches import MicroBatch, build
from llama_acc.core.data.encode import Labels
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.optimizer import ClippedAdamW
from llama_acc.core.train.step import StepResult, evaluate, train_step


class Labelled:
    """Documents as LLaMA2-Accessory has them: label i belongs to token i, -100 is none."""

    def __init__(self, documents: Sequence[dict[str, list[int]]], weights: Sequence[float] = ()) -> None:
        """`weights` are those of all labels of a document."""
        self.documents, self.weights = documents, weights

    def document(self, i: int) -> tuple[NDArray[np.int32], Labels]:
        tokens, labels = np.array(self.documents[i]["tokens"]), np.array(self.documents[i]["labels"])
        labelled = labels != -100
        assert (labels[labelled] == tokens[labelled]).all()
        if self.weights and self.weights[i] != 1:
            return tokens.astype(np.int32), (labelled * self.weights[i]).astype(np.float32)
        return tokens.astype(np.int32), labelled

    def documents_in(self, i: int) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        return [self.document(i)]

    def label_tokens(self) -> int:
        """How many tokens are predicted: the first of a document never is."""
        return sum(np.count_nonzero(self.document(i)[1][1:]) for i in range(len(self.documents)))

    def dealt(self, *sizes: int) -> list[MicroBatch]:
        """Micro-batches of these many documents, in order."""
        assert sum(sizes) == len(self.documents)
        starts = np.cumsum([0, *sizes[:-1]])
        return [build(self, range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def random_documents(count: int, vocabulary: int, seed: int = 0) -> Labelled:
    draw = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        tokens = draw.integers(vocabulary, size=draw.integers(5, 30))
        labels = np.where(np.arange(len(tokens)) < len(tokens) // 2, -100, tokens)
        documents.append({"tokens": tokens.tolist(), "labels": labels.tolist()})
    return Labelled(documents)


def adamw(model: Transformer, **settings: Any) -> ClippedAdamW:
    defaults = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.02, "clip_grad_norm": 2.0}
    return ClippedAdamW(model, model.specs, **{**defaults, **settings})


def alone(model: Transformer) -> DataParallel:
    """The data parallelism of one process: none."""
    return DataParallel(model, Parallel(), "ddp", False, "cpu")


def step(
    model: Transformer, optimizer: ClippedAdamW, batches: Sequence[MicroBatch], label_tokens: float, lr: float
) -> StepResult:
    """One optimizer step in one process on the CPU."""
    return train_step(model, optimizer, alone(model), batches, label_tokens, lr, torch.device("cpu"))


def loss_of(model: Transformer, batches: Sequence[MicroBatch], label_tokens: float) -> float:
    """The loss per label token, without training."""
    return evaluate(model, alone(model), batches, label_tokens, torch.device("cpu"))


def update(optimizer: ClippedAdamW, lr: float, loss: float) -> torch.Tensor:
    """One update of one process; returns the gradients' norm."""
    norm = optimizer.squared_norm().sqrt()
    optimizer.step(lr, norm, torch.tensor(loss))
    return norm


def moments_of(optimizer: ClippedAdamW) -> dict[str, torch.Tensor]:
    return {f"{key}.{name}": tensor.clone() for key, name, tensor in optimizer.state_tensors()}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
