"""LoRA (arXiv:2106.09685), alone or with biases and norms.

Every matrix of a block gets a pair `<linear>.lora_a.weight` [rank, in], normal at the start, and
`<linear>.lora_b.weight` [out, rank], zero at the start: lora_b(lora_a(x)) is added to the product, with no factor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from llama_acc.core.errors import UserError
from llama_acc.core.model.tuning import FULL, MATRICES, Tuning, matrices_of, switches
from llama_acc.core.model.tuning.bias_norm import BiasNorm, add_biases_and_train_norms

if TYPE_CHECKING:
    from torch import Tensor

    from llama_acc.core.model.layers import Matrix
    from llama_acc.core.model.transformer import Transformer

Rank = Annotated[int, Field(ge=1, le=2**16)]


@dataclass(frozen=True)
class LoRA(Tuning):
    """LoRA pairs.

    Attributes:
        lora_rank: their rank.
    """

    method = "lora"
    llama_type = "llama_peft"
    peft_names = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight"}
    has_bias_norm: ClassVar[bool] = False

    lora_rank: Rank = 16

    def check(self, widths: Mapping[str, int], n_layers: int) -> None:
        check_rank(self.lora_rank, widths)

    def attach(self, model: "Transformer") -> None:
        if self.has_bias_norm:
            add_biases_and_train_norms(model, MATRICES)
        add_pairs(model, self.lora_rank)

    def merged(self) -> Tuning:
        return BiasNorm() if self.has_bias_norm else FULL

    def merge(self, rows: "Tensor", first: int, added: "Mapping[str, Tensor]") -> "Tensor":
        return rows.addmm_(added["lora_b.weight"][first : first + len(rows)], added["lora_a.weight"])

    def to_arguments(self) -> dict[str, Any]:
        return {"lora_rank": self.lora_rank, "bias_tuning": self.has_bias_norm, "norm_tuning": self.has_bias_norm}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Tuning | None:
        *bias_norm, rank = switches(arguments)
        return cls(rank) if rank and bias_norm == [cls.has_bias_norm] * 2 else None

    def peft_config(self) -> dict[str, Any]:
        """The factor lora_alpha / r is 1: what a pair adds here has none."""
        return {
            "peft_type": "LORA",
            "r": self.lora_rank,
            "lora_alpha": self.lora_rank,
            "lora_dropout": 0.0,
            # A bias of lora_B is added to the output as one of the matrix would be, and needs none there.
            "bias": "none",
            "lora_bias": self.has_bias_norm,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            # The norms, by their names in Hugging Face's models.
            "modules_to_save": (
                ["input_layernorm", "post_attention_layernorm", "model.norm"] if self.has_bias_norm else None
            ),
        }


@dataclass(frozen=True)
class LoRABiasNorm(LoRA):
    """LoRA pairs, biases and norms."""

    method = "lora_bias_norm"
    peft_names = {**LoRA.peft_names, "bias": "lora_B.bias"}
    has_bias_norm = True


class Pair:
    """A LoRA pair on a linear layer; see `layers.Extension`."""

    def __init__(self, a: "Matrix", b: "Matrix") -> None:
        self.a, self.b = a, b

    def inputs(self) -> "list[Tensor]":
        return [self.a.weight]

    def finish(self, y: "Tensor", products: "Iterator[Tensor]") -> "Tensor":
        low = next(products)
        return y.flatten(0, -2).addmm_(low.flatten(0, -2), self.b.weight.to(y.dtype).t()).view(y.shape)


def add_pairs(model: "Transformer", rank: int) -> None:
    """Gives every matrix of the blocks a pair.

    Of a column-parallel matrix's pair the second is split, by rows, of a row-parallel one's the first, by columns.
    """
    from torch.nn.init import trunc_normal_

    from llama_acc.core.model.layers import Matrix, parameter, zeros

    def small(values: "Tensor", generator: Any) -> "Tensor":
        return trunc_normal_(values, std=0.02, generator=generator)

    for layer in matrices_of(model):
        rows, columns = layer.out_features, layer.in_features
        a_split, b_split = (None, 0) if layer.split == 0 else (1, None)
        layer.lora_a = Matrix(parameter(rank, columns, init=small, split=a_split, parallel=layer.parallel))
        layer.lora_b = Matrix(parameter(rows, rank, init=zeros, split=b_split, parallel=layer.parallel))
        layer.extensions.append(Pair(layer.lora_a, layer.lora_b))


def check_rank(rank: int, widths: Mapping[str, int]) -> None:
    """Refuses a rank above a width of the model, naming both."""
    name, least = min(widths.items(), key=lambda item: item[1])
    if rank > least:
        raise UserError(f"tuning.lora_rank ({rank}) is larger than {name} ({least})", "lower it")
