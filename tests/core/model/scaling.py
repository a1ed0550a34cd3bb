"""A tuning method in one file: a factor on every key, value and hidden feature ((IA)^3, arXiv:2205.05638)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llama_acc.core.model.layers import Extension, Linear, ones, parameter
from llama_acc.core.model.transformer import Transformer
from llama_acc.core.model.tuning import Tuning, matrices_of


@dataclass(frozen=True)
class Scaling(Tuning):
    """Factors `<linear>.scale` [out], one at the start."""

    method: ClassVar[str] = "scaling"
    llama_type: ClassVar[str] = "llama_scaling"

    def attach(self, model: Transformer) -> None:
        """See `Tuning`."""
        for layer in matrices_of(model, ("wk", "wv", "w3")):
            layer.scale = parameter(layer.out_features, init=ones, split=layer.split, parallel=layer.parallel)
            layer.extensions.append(Scale(layer))

    def merge(self, rows: Tensor, first: int, added: Mapping[str, Tensor]) -> Tensor:
        """See `Tuning`."""
        return rows * added["scale"][first : first + len(rows), None]


class Scale(Extension):
    """The factors of a layer; see `layers.Extension`."""

    def __init__(self, layer: Linear) -> None:
        self.layer = layer

    def finish(self, y: Tensor, products: Iterator[Tensor]) -> Tensor:
        """See `layers.Extension`."""
        return y * self.layer.get_parameter("scale").to(y.dtype)
