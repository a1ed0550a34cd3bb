"""Zero-init attention (LLaMA-Adapter, arXiv:2303.16199), with biases and norms, and LoRA pairs if they have a rank.

The model gets, for its last `prefix_layers` blocks,

    prefix           [prefix_layers, 1, prefix_len, dim], normal at the start: what queries attend to besides
    prefix_gate      [prefix_layers, n_heads], zero at the start: its tanh is the factor on that in each head
    prefix_new_gate  [prefix_layers], one at the start: a second factor, if there is one
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from llama_acc.core.errors import UserError
from llama_acc.core.model.tuning import Tuning, switches, whole_number
from llama_acc.core.model.tuning.bias_norm import add_biases_and_train_norms
from llama_acc.core.model.tuning.lora import Pairs, Rank, add_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from llama_acc.core.model.attention import Attend, Attention, PrefixHeads
    from llama_acc.core.model.transformer import Transformer

# Keys and values are also made of the prefix, where LLaMA2-Accessory has no biases.
_BIASES = ("wq", "wo", "w1", "w2", "w3")
_MOST_KEPT = 128  # vectors that the kernel for a GPU's single tokens has room for
_Count = Annotated[int, Field(ge=1, le=2**16)]


@dataclass(frozen=True)
class Adapter(Pairs):
    """Zero-init attention."""

    method = "adapter"
    llama_type = "llama_adapter"
    can_merge = False

    lora_rank: Rank = 0  # rank of the LoRA pairs; 0 = there are none
    prefix_layers: _Count = 0  # how many blocks, the last ones, have it; 0 = all
    prefix_len: _Count = 10  # how many vectors their queries attend to besides
    prefix_new_gate: bool = False  # whether there is the second gate

    def with_num_layers(self, n_layers: int) -> "Adapter":
        return replace(self, prefix_layers=self.prefix_layers or n_layers)

    def check(self, widths: Mapping[str, int], n_layers: int) -> None:
        super().check(widths, n_layers)
        if not self.lora_rank and (said := self.said()):
            raise UserError(f"tuning.{', tuning.'.join(said)} is about LoRA pairs", "set tuning.lora_rank besides")
        if self.prefix_layers > n_layers:
            raise UserError(
                f"tuning.prefix_layers ({self.prefix_layers}) is more than the model's layers ({n_layers})", "lower it"
            )

    def attach(self, model: "Transformer") -> None:
        from llama_acc.core.model.layers import normal, ones, parameter, zeros

        add_biases_and_train_norms(model, _BIASES)
        if self.lora_rank:
            add_pairs(model, self)
        config, layers = model.config, self.prefix_layers
        model.prefix = parameter(layers, 1, self.prefix_len, config.dim, init=normal(1.0))
        model.prefix_gate = parameter(layers, config.n_heads, init=zeros, split=1, parallel=model.parallel)
        if self.prefix_new_gate:
            model.prefix_new_gate = parameter(layers, init=ones)
        model.attention_extra = partial(_prefix_of, model, self)

    def merged(self) -> Tuning:
        raise UserError(
            "zero-init attention cannot be merged: what it adds to attention depends on the queries",
            "use the checkpoint as it is",
        )

    def to_arguments(self) -> dict[str, Any]:
        return {
            "lora_rank": self.lora_rank or -1,
            "bias_tuning": True,
            "prefix_layers": self.prefix_layers,
            "prefix_len": self.prefix_len,
            "use_prefix_new_gate": self.prefix_new_gate,
            **self.said(),
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Tuning | None:
        bias, _, rank = switches(arguments)
        if not bias:
            raise UserError("zero-init attention without biases (bias_tuning) is not known")
        layers, length = whole_number(arguments, "prefix_layers", 0), whole_number(arguments, "prefix_len", 30)
        found = cls(rank, layers, length, bool(arguments.get("use_prefix_new_gate", False)))
        return found.with_said(arguments)

    def peft_config(self) -> dict[str, Any]:
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
    """

    vectors: "Tensor"  # [prefix_len, dim], or of each document its own, [documents, prefix_len, dim]
    gate: "Tensor"  # [H]
    new_gate: "Tensor | None"  # a number

    def output(self, attention: "Attention", q: "Tensor", attend: "Attend") -> "Tensor":
        """What the queries [T, H, D] get from the prefix, times its gates, [T, H*D]."""
        import torch

        from llama_acc.core.model.attention import attend_heads, document_slices
        from llama_acc.core.model.rotary import rotate

        prefixes = attend.prefix_heads(self.vectors.dim() == 2, partial(self._heads, attention, q.dtype))
        if attention.rotates:
            q = rotate(q, attend.rotations)
        # One prefix is that of all documents.
        places = document_slices(attend.lengths) if len(prefixes) > 1 else [slice(None)]
        documents = zip(places, prefixes, strict=True)
        outputs = [attend_heads(q[document], own.keys, own.values) for document, own in documents]
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return (output * self._factors(attention).to(q.dtype).unsqueeze(-1)).flatten(1)

    def kept(self, attention: "Attention") -> "Sequence[Tensor]":
        """See `attention.AttentionExtra`."""
        if self.vectors.dim() > 2 or len(self.vectors) > _MOST_KEPT:
            return ()
        keys, values, _ = self._heads(attention, self.vectors.dtype)[0]
        return keys.contiguous(), values.contiguous(), self._factors(attention).float()

    def _factors(self, attention: "Attention") -> "Tensor":
        """[H], on what each head gets from the prefix."""
        from llama_acc.core.distributed.groups import copied

        gate = self.gate.tanh()
        # On every rank the second one is the same, and of its gradient each has a part.
        return gate if self.new_gate is None else gate * copied(self.new_gate, attention.wk.group)

    def _heads(self, attention: "Attention", dtype: Any) -> "list[PrefixHeads]":
        """Keys and values [K, prefix_len, D] of the prefix, or of that of each document."""
        from llama_acc.core.model.attention import PrefixHeads

        common = self.vectors.dim() == 2
        vectors = (self.vectors.unsqueeze(0) if common else self.vectors).to(dtype)
        keys, values = (
            layer(vectors).unflatten(-1, (-1, attention.head_size)) for layer in (attention.wk, attention.wv)
        )
        keys = keys if attention.k_norm is None else attention.k_norm(keys)
        made = zip(keys.transpose(1, 2), values.transpose(1, 2), strict=True)
        return [PrefixHeads(*heads, common) for heads in made]
