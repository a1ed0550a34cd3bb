"""Zero-init attention (LLaMA-Adapter, arXiv:2303.16199), with biases and norms, and LoRA pairs if they have a rank.

The model gets, for its last `prefix_layers` blocks,

    prefix           [prefix_layers, 1, prefix_len, dim], normal at the start: what queries attend to besides
    prefix_gate      [prefix_layers, n_heads], zero at the start: its tanh is the factor on that in each head
    prefix_new_gate  [prefix_layers], one at the start: a second factor, if there is one
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from llama_acc.core.errors import UserError
from llama_acc.core.model.tuning import Tuning, whole_number
from llama_acc.core.model.tuning.bias_norm import add_biases_and_train_norms
from llama_acc.core.model.tuning.lora import Rank, add_pairs, check_rank

if TYPE_CHECKING:
    from torch import Tensor

    from llama_acc.core.model.attention import Attend, Attention, PrefixHeads
    from llama_acc.core.model.transformer import Transformer

# Keys and values are also made of the prefix, where LLaMA2-Accessory has no biases.
_BIASES = ("wq", "wo", "w1", "w2", "w3")
_Count = Annotated[int, Field(ge=1, le=2**16)]


@dataclass(frozen=True)
class Adapter(Tuning):
    """Zero-init attention.

    Attributes:
        lora_rank: rank of the LoRA pairs; 0 = there are none.
        prefix_layers: how many blocks, the last ones, have it; 0 = all.
        prefix_len: how many vectors their queries attend to besides.
        prefix_new_gate: whether there is the second gate.
    """

    method: ClassVar[str] = "adapter"
    llama_type: ClassVar[str] = "llama_adapter"
    can_merge: ClassVar[bool] = False

    lora_rank: Rank = 0
    prefix_layers: _Count = 0
    prefix_len: _Count = 10
    prefix_new_gate: bool = False

    def at_depth(self, n_layers: int) -> "Adapter":
        """See `Tuning`."""
        return replace(self, prefix_layers=self.prefix_layers or n_layers)

    def check(self, widths: Mapping[str, int], n_layers: int) -> None:
        """See `Tuning`."""
        check_rank(self.lora_rank, widths)
        if self.prefix_layers > n_layers:
            raise UserError(
                f"tuning.prefix_layers ({self.prefix_layers}) is more than the model's layers ({n_layers})", "lower it"
            )

    def attach(self, model: "Transformer") -> None:
        """See `Tuning`."""
        from llama_acc.core.model.layers import normal, ones, parameter, zeros

        add_biases_and_train_norms(model, _BIASES)
        if self.lora_rank:
            add_pairs(model, self.lora_rank)
        config, layers = model.config, self.prefix_layers
        model.prefix = parameter(layers, 1, self.prefix_len, config.dim, init=normal(1.0))
        model.prefix_gate = parameter(layers, config.n_heads, init=zeros, split=1, parallel=model.parallel)
        if self.prefix_new_gate:
            model.prefix_new_gate = parameter(layers, init=ones)
        model.attention_extra = partial(_prefix_of, model, self)

    def merged(self) -> Tuning:
        """See `Tuning`."""
        raise UserError(
            "zero-init attention cannot be merged: what it adds to attention depends on the queries",
            "use the checkpoint as it is",
        )

    def to_arguments(self) -> dict[str, Any]:
        """See `Tuning`."""
        return {
            "lora_rank": self.lora_rank or -1,
            "bias_tuning": True,
            "prefix_layers": self.prefix_layers,
            "prefix_len": self.prefix_len,
            "use_prefix_new_gate": self.prefix_new_gate,
        }

    @classmethod
    def from_arguments(cls, llama_type: str, arguments: Mapping[str, Any]) -> Tuning | None:
        """See `Tuning`."""
        if llama_type != cls.llama_type:
            return None
        rank = max(whole_number(arguments, "lora_rank", -1), 0)
        if not arguments.get("bias_tuning", True):
            raise UserError("zero-init attention without biases (bias_tuning) is not known")
        layers, length = whole_number(arguments, "prefix_layers", 0), whole_number(arguments, "prefix_len", 30)
        return cls(rank, layers, length, bool(arguments.get("use_prefix_new_gate", False)))

    def peft_config(self) -> dict[str, Any]:
        """See `Tuning`."""
        raise UserError("PEFT has no place for zero-init attention (prefix, prefix_gate)", "keep it: --to consolidated")


def _prefix_of(model: "Transformer", tuning: Adapter, layer: int, added: "Tensor | None") -> "Prefix | None":
    """A block's prefix; `added`, [documents, prefix_len, dim], is added to it for each document."""
    place = layer - model.config.n_layers + tuning.prefix_layers
    if place < 0:
        return None
    own: Any = model
    vectors = own.prefix[place, 0] if added is None else own.prefix[place].to(added.dtype) + added
    return Prefix(vectors, own.prefix_gate[place], own.prefix_new_gate[place] if tuning.prefix_new_gate else None)


class Prefix(NamedTuple):
    """What zero-init attention has in one block; see `attention.AttentionExtra`.

    Shapes: T tokens of the stream, H query heads of this rank, K its key-value heads, D head dimension.

    Attributes:
        vectors: [prefix_len, dim], or of each document its own, [documents, prefix_len, dim].
        gate: [H].
        new_gate: a number, or None.
    """

    vectors: "Tensor"
    gate: "Tensor"
    new_gate: "Tensor | None"

    def output(self, attention: "Attention", q: "Tensor", attend: "Attend") -> "Tensor":
        """What the queries [T, H*D] get from the prefix, times its gates, [T, H*D]."""
        import torch

        from llama_acc.core.distributed.groups import copied
        from llama_acc.core.model.attention import document_slices, rotate

        heads = (-1, 2 * attend.rotations.shape[-1])
        prefixes = attend.prefix_heads(self.vectors.dim() == 2, partial(self._heads, attention, heads, q.dtype))
        q = rotate(q.unflatten(-1, heads), attend.rotations)
        if len(prefixes) == 1:
            output = _attend_prefix(q, prefixes[0])
        else:
            documents = zip(document_slices(attend.lengths), prefixes, strict=True)
            output = torch.cat([_attend_prefix(q[document], own) for document, own in documents])
        gate = self.gate.tanh()
        if self.new_gate is not None:
            # On every rank it is the same, and of its gradient each has a part.
            gate = gate * copied(self.new_gate, attention.wk.group)
        return (output * gate.to(q.dtype).unsqueeze(-1)).flatten(1)

    def _heads(self, attention: "Attention", heads: tuple[int, int], dtype: Any) -> "list[PrefixHeads]":
        """Keys and values [K, prefix_len, D] of the prefix, or of that of each document."""
        from llama_acc.core.model.attention import PrefixHeads

        common = self.vectors.dim() == 2
        vectors = (self.vectors.unsqueeze(0) if common else self.vectors).to(dtype)
        made = (layer(vectors).unflatten(-1, heads).transpose(1, 2) for layer in (attention.wk, attention.wv))
        return [PrefixHeads(keys, values, common) for keys, values in zip(*made, strict=True)]


def _attend_prefix(q: "Tensor", prefix: "PrefixHeads") -> "Tensor":
    """All queries [T, H, D] to all of a prefix, [T, H, D]."""
    import torch.nn.functional as F

    keys, values = prefix.keys.unsqueeze(0), prefix.values.unsqueeze(0)
    q = q.transpose(0, 1).unsqueeze(0)
    output = F.scaled_dot_product_attention(q, keys, values, enable_gqa=q.shape[1] != keys.shape[1])
    return output.squeeze(0).transpose(0, 1)
