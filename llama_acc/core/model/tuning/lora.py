"""LoRA (arXiv:2106.09685), alone or with biases and norms.

Matrices of the blocks get a pair `<linear>.lora_a.weight` [rank, in], normal at the start, and `<linear>.lora_b.weight`
[out, rank], zero at the start: factor * lora_b(lora_a(x)) is added to the product. In training, some of the x that
lora_a gets may be dropped.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar
from zlib import crc32

from pydantic import Field

from llama_acc.core.errors import UserError
from llama_acc.core.model.schema import checked
from llama_acc.core.model.tuning import FULL, MATRICES, MatrixName, Tuning, matrices_of, switches
from llama_acc.core.model.tuning.bias_norm import BiasNorm, add_biases_and_train_norms

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llama_acc.core.model.layers import Linear
    from llama_acc.core.model.transformer import Transformer

Rank = Annotated[int, Field(ge=1, le=2**16)]
_PEFT_MODULES = {
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
_SETTINGS = ("lora_alpha", "lora_targets", "use_rslora", "lora_dropout")
_Pairs = TypeVar("_Pairs", bound="Pairs")


@dataclass(frozen=True)
class Pairs(Tuning):
    """What is said of LoRA pairs, by every method that has them."""

    lora_rank: Rank = 16  # their rank
    lora_alpha: Annotated[float, Field(gt=0, le=2**20)] | None = field(default=None, kw_only=True)
    """The factor on what they add is lora_alpha / lora_rank; None: 1."""
    lora_targets: Annotated[tuple[MatrixName, ...], Field(min_length=1)] = field(default=MATRICES, kw_only=True)
    """Which matrices of every block have one."""
    use_rslora: bool = field(default=False, kw_only=True)
    """The factor is lora_alpha / sqrt(lora_rank) (rsLoRA, arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        # What is said in two ways is kept in one: methods are compared.
        if self.lora_alpha == self.lora_rank:
            object.__setattr__(self, "lora_alpha", None)
        object.__setattr__(self, "lora_targets", tuple(name for name in MATRICES if name in self.lora_targets))

    def check(self, widths: Mapping[str, int], n_layers: int) -> None:
        name, least = min(widths.items(), key=lambda item: item[1])
        if self.lora_rank > least:
            raise UserError(f"tuning.lora_rank ({self.lora_rank}) is larger than {name} ({least})", "lower it")

    @property
    def factor(self) -> float:
        """On what the pairs add."""
        alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)

    def said(self) -> dict[str, Any]:
        """The settings that LLaMA2-Accessory does not have, where they say something, for config.json."""
        usual = type(self)()
        return {key: getattr(self, key) for key in _SETTINGS if getattr(self, key, None) != getattr(usual, key, None)}

    def with_said(self: _Pairs, arguments: Mapping[str, Any]) -> _Pairs:
        """The same with what `said` has put into config.json."""
        said = {key: arguments[key] for key in _SETTINGS if key in arguments and key in vars(self)}
        if not said:
            return self
        found = checked(LoRA, {"lora_rank": self.lora_rank, **said}, "what it says of LoRA pairs")
        return replace(self, **{key: getattr(found, key) for key in said})


@dataclass(frozen=True)
class LoRA(Pairs):
    """LoRA pairs."""

    method = "lora"
    llama_type = "llama_peft"
    peft_names = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight"}
    has_bias_norm: ClassVar[bool] = False

    lora_dropout: Annotated[float, Field(ge=0, le=0.99)] = field(default=0.0, kw_only=True, compare=False)
    """Which part of the input of lora_a is dropped in training. It is no part of what the model is."""

    def attach(self, model: "Transformer") -> None:
        if self.has_bias_norm:
            add_biases_and_train_norms(model, MATRICES)
        add_pairs(model, self, self.lora_dropout)

    def merged(self) -> Tuning:
        return BiasNorm() if self.has_bias_norm else FULL

    def merge(self, rows: "Tensor", first: int, added: "Mapping[str, Tensor]") -> "Tensor":
        if "lora_b.weight" not in added:
            return rows
        b = added["lora_b.weight"][first : first + len(rows)]
        return rows.addmm_(b, added["lora_a.weight"], alpha=self.factor)

    def to_arguments(self) -> dict[str, Any]:
        switches = {"bias_tuning": self.has_bias_norm, "norm_tuning": self.has_bias_norm}
        return {"lora_rank": self.lora_rank, **switches, **self.said()}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Tuning | None:
        *bias_norm, rank = switches(arguments)
        return cls(rank).with_said(arguments) if rank and bias_norm == [cls.has_bias_norm] * 2 else None

    def peft_config(self) -> dict[str, Any]:
        if self.has_bias_norm and self.lora_targets != MATRICES:
            raise UserError(
                f"PEFT has no place for biases of matrices without a LoRA pair (tuning.lora_targets is "
                f"{', '.join(self.lora_targets)})",
                "merge the pairs: --to hf --merge",
            )
        alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return {
            "peft_type": "LORA",
            "r": self.lora_rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "use_rslora": self.use_rslora,
            "lora_dropout": self.lora_dropout,
            # A bias of lora_B is added to the output as one of the matrix would be, and needs none there.
            "bias": "none",
            "lora_bias": self.has_bias_norm,
            "target_modules": [theirs for ours, theirs in _PEFT_MODULES.items() if ours in self.lora_targets],
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

    @property
    def peft_bias_factor(self) -> float:
        return self.factor  # they are those of lora_B


class Dropout:
    """Which inputs of a stream's pairs are 0: in training a function of each document's draw and the pair's number.

    So it depends on nothing that was drawn before, nor on how documents are split over micro-batches and ranks.
    """

    def __init__(self, rate: float) -> None:
        self._below = min(round((1 - rate) * 2**16), 2**16 - 1)  # of 16 random bits
        self._documents: list[tuple[int, int]] = []

    def begin(self, lengths: Sequence[int], draws: Sequence[int]) -> None:
        """Takes the documents of a stream; without draws all is kept. See `Transformer.before_blocks`."""
        self._documents = list(zip(lengths, draws, strict=True)) if draws else []

    @property
    def kept(self) -> float:
        """How much of the inputs is kept."""
        return self._below / 2**16 if self._documents else 1.0

    def mask(self, pair: int, width: int, part: slice, device: "torch.device") -> "Tensor | None":
        """Of the inputs [T, width] of the pair of this number, which ones of this rank's part are 0; None: none."""
        import torch

        rows = []
        for length, draw in self._documents:
            generator = torch.Generator(device).manual_seed(crc32(pair.to_bytes(4, "little"), draw))
            # Four from one number: half of the time of `bernoulli_` on a CPU.
            bits = torch.empty(-(-length * width // 4), dtype=torch.int64, device=device)
            lanes = bits.random_(-(2**63), None, generator=generator).view(torch.int16)[: length * width]
            rows.append(lanes.view(length, width)[:, part] >= self._below - 2**15)
        return torch.cat(rows) if rows else None


class Pair:
    """A LoRA pair on a linear layer; see `layers.Extension`."""

    def __init__(self, layer: "Linear", number: int, factor: float, dropout: Dropout) -> None:
        """`number` is that of the pair in the model."""
        self.a: Any = layer.lora_a
        self.b: Any = layer.lora_b
        self.factor, self.dropout = factor, dropout
        width, parallel = layer.in_features, layer.parallel
        local = width // parallel.model_size
        part = slice(parallel.model_rank * local, (parallel.model_rank + 1) * local)
        self._where = number, width, part if layer.split == 1 else slice(None)

    def inputs(self) -> "list[Tensor]":
        return [self.a.weight]

    def masks(self) -> "list[Tensor | None]":
        return [self.dropout.mask(*self._where, self.a.weight.device)]

    def low_rank(self) -> "tuple[Tensor, Tensor, float]":
        return self.a.weight, self.b.weight, self.factor

    def finish(self, y: "Tensor", products: "Iterator[Tensor]") -> "Tensor":
        from llama_acc.core.model.copies import cast

        low, b = next(products).flatten(0, -2), cast(self.b.weight, y.dtype)
        return y.flatten(0, -2).addmm_(low, b.t(), alpha=self.factor / self.dropout.kept).view(y.shape)


def add_pairs(model: "Transformer", pairs: Pairs, dropout_rate: float = 0.0) -> None:
    """Gives matrices of the blocks a pair.

    Of a column-parallel matrix's pair the second is split, by rows, of a row-parallel one's the first, by columns.
    """
    from torch.nn.init import trunc_normal_

    from llama_acc.core.model.layers import Matrix, parameter, zeros

    def small(values: "Tensor", generator: Any) -> "Tensor":
        return trunc_normal_(values, std=0.02, generator=generator)

    dropout = Dropout(dropout_rate)
    model.before_blocks = dropout.begin if dropout_rate else None
    for number, layer in enumerate(matrices_of(model, pairs.lora_targets)):
        rank, rows, columns = pairs.lora_rank, layer.out_features, layer.in_features
        a_split, b_split = (None, 0) if layer.split == 0 else (1, None)
        layer.lora_a = Matrix(parameter(rank, columns, init=small, split=a_split, parallel=layer.parallel))
        layer.lora_b = Matrix(parameter(rows, rank, init=zeros, split=b_split, parallel=layer.parallel))
        layer.extensions.append(Pair(layer, number, pairs.factor, dropout))
