"""Bias and norm tuning (LLaMA-Adapter V2, arXiv:2304.15010).

Every matrix of a block gets a bias `<linear>.bias` [out], zero at the start, which trains; the norms' weights train.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_acc.core.model.tuning import MATRICES, Tuning, matrices_of, switches

if TYPE_CHECKING:
    from llama_acc.core.model.transformer import Transformer


@dataclass(frozen=True)
class BiasNorm(Tuning):
    """Biases and norms."""

    method = "bias_norm"
    llama_type = "llama_peft"

    def attach(self, model: "Transformer") -> None:
        add_biases_and_train_norms(model, MATRICES)

    def merged(self) -> Tuning:
        return self

    def to_arguments(self) -> dict[str, Any]:
        return {"lora_rank": -1, "bias_tuning": True, "norm_tuning": True}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Tuning | None:
        return cls() if switches(arguments) == (True, True, 0) else None


def add_biases_and_train_norms(model: "Transformer", matrices: tuple[str, ...]) -> None:
    """Gives these matrices of every block a bias, if they have none, and unfreezes all biases and norms."""
    from llama_acc.core.model.layers import RMSNorm

    for layer in matrices_of(model, matrices):
        if layer.bias is None:
            layer.add_bias()
        assert layer.bias is not None
        layer.bias.requires_grad_()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.requires_grad_()
