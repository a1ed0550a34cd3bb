"""Several tuned models over one base, as one model: a pass has documents of all of them.

What the models share is computed once for the whole stream: a layer that is the same in all of them, and the matrix
products of the others. What a tuning method does to a product, a norm or attention is done to the rows of its own
documents, through the seams that the layers have anyway; no method is known here.

Shapes: T tokens of the stream.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llama_acc.core.errors import UserError
from llama_acc.core.model.attention import Attend, Attention, AttentionExtra, CachedAttention
from llama_acc.core.model.layers import Linear
from llama_acc.core.model.transformer import Transformer


class _Part(NamedTuple):
    """Neighboring documents of one adapter, and the rows of the stream that are theirs."""

    adapter: int
    documents: slice
    rows: slice


class MultiAdapter(Transformer):
    """Models of one base as one, for generation. Their parameters are kept, where they share storage it stays shared.

    Which documents are whose is said before each pass, by `select`; by itself all are the first one's.
    """

    def __init__(self, models: Sequence[Transformer]) -> None:
        """Models of the same shape; what is the same in them lies in the same storage.

        Raises:
            UserError: a method changes something beside blocks and the last norm.
        """
        first = models[0]
        with torch.device("meta"):
            super().__init__(
                replace(first.config.base(), max_seq_len=first.config.max_seq_len), first.dtype, first.parallel
            )
        self.models, self.parts = nn.ModuleList(models), list[_Part]()  # each model whole, by its adapter's number
        for name, module in list(self.named_modules()):
            is_layer = any(True for _ in module.parameters(recurse=False)) or name == "output"
            if name.startswith("models.") or not is_layer:
                continue
            own = [model.get_submodule(name) for model in models]
            joined = own[0] if _are_one(own) else _ByRows(own, self.parts)
            if isinstance(joined, _ByRows) and not name.startswith(("layers.", "norm")):
                raise UserError(f"{name} differs between these adapters, which is not known", "serve each by itself")
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, joined)
        if any(model.attention_extra is not None for model in models):
            self.attention_extra = partial(_extra_of, self)

    def select(self, adapters: Sequence[int], lengths: Sequence[int]) -> None:
        """Whose each document of the next pass is, and its length. Those of one adapter are best put together."""
        self.parts.clear()
        document = row = 0
        for adapter, group in groupby(zip(adapters, lengths, strict=True), lambda one: one[0]):
            own = [length for _, length in group]
            documents, rows = slice(document, document + len(own)), slice(row, row + sum(own))
            self.parts.append(_Part(adapter, documents, rows))
            document, row = documents.stop, rows.stop


def _are_one(modules: Sequence[nn.Module]) -> bool:
    """Whether modules compute the same: no extensions, and parameters in the same storage."""
    places = [{name: parameter.data_ptr() for name, parameter in module.named_parameters()} for module in modules]
    return all(place == places[0] for place in places) and not any(getattr(one, "extensions", ()) for one in modules)


class _ByRows(nn.Module):
    """A layer that is not the same in all models: each one's is applied to the rows of its documents."""

    def __init__(self, layers: Sequence[nn.Module], parts: list[_Part]) -> None:
        super().__init__()
        self.layers, self.parts = nn.ModuleList(layers), parts
        weights = {layer.get_parameter("weight").data_ptr() for layer in layers}
        self.share_product = isinstance(layers[0], Linear) and len(weights) == 1

    def forward(self, x: Tensor) -> Tensor:
        """[T, ...] to [T, ...]."""
        parts = self.parts
        layers: Any = self.layers
        if len(parts) < 2:
            found: Tensor = layers[parts[0].adapter if parts else 0](x)
            return found
        if not self.share_product:
            return torch.cat([layers[part.adapter](x[part.rows]) for part in parts])
        outputs, product = [], layers[0].product(x)
        for part in parts:
            layer = layers[part.adapter]
            outputs.append(layer.finish(product[part.rows], iter(layer.extra_products(x[part.rows]))))
        return torch.cat(outputs)


def _extra_of(model: MultiAdapter, layer: int, added: Tensor | None) -> Any:
    """What the adapters of this pass add to a block's attention."""
    models: list[Any] = [model.models[part.adapter] for part in model.parts]
    extras = [None if own.attention_extra is None else own.attention_extra(layer, added) for own in models]
    attentions = [own.layers[layer].attention for own in models]
    return _ExtraByRows(model.parts, extras, attentions) if any(extra is not None for extra in extras) else None


class _ExtraByRows(NamedTuple):
    """See `attention.AttentionExtra`; what each part has."""

    parts: Sequence[_Part]
    extras: Sequence[AttentionExtra | None]
    attentions: Sequence[Attention]

    def output(self, attention: Attention, q: Tensor, attend: Attend) -> Tensor:
        """See `attention.AttentionExtra`. Each extra sees its own model's attention: its keys have its own pairs."""
        assert isinstance(attend, CachedAttention)
        outputs = []
        for part, extra, own in zip(*self, strict=True):
            queries = q[part.rows]
            if extra is None:
                outputs.append(torch.zeros_like(queries.flatten(1)))
            else:
                outputs.append(extra.output(own, queries, attend.narrowed(part.documents, part.rows)))
        return torch.cat(outputs)
