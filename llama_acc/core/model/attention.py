"""Rotary positions; causal attention within documents of a stream, and over key-value caches.

Shapes: T tokens of the stream, H query heads, K key-value heads, D head dimension, S positions in the cache. Heads are
those of this rank: model parallelism deals them out whole, a query head with its key-value head.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_acc.core.device import device_type
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.layers import (
    ColumnParallelLinear,
    Packed,
    RMSNorm,
    RowParallelLinear,
    normed_linears,
    residual,
)


def rotary_table(head_dim: int, length: int, theta: float, scaling: float | None, device: torch.device) -> Tensor:
    """Rotations of positions 0 to length-1 as complex numbers [length, head_dim / 2].

    Frequency i is theta^(-2i / head_dim) (RoFormer, arXiv:2104.09864); positions are multiplied by `scaling`.
    """
    powers = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    positions = torch.arange(length, device=device, dtype=torch.float32) * (1.0 if scaling is None else scaling)
    angles = torch.outer(positions, 1.0 / theta**powers)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotates interleaved pairs (x0, x1), (x2, x3)... of [T, H, D] by [T, D/2] complex rotations, in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations.unsqueeze(1)).flatten(-2).to(x.dtype)


class PrefixHeads(NamedTuple):
    """What a block makes of a prefix, which has no position: keys and values, [K, prefix_len, D] each."""

    keys: Tensor
    values: Tensor
    common: bool
    """Every document has it that has none of its own."""


class LayerCache:
    """Keys and values of one layer's past, [K, S, D] each; room is doubled when it runs out.

    Attributes:
        prefix: those of the layer's prefix, once they are made.
    """

    def __init__(self) -> None:
        self.keys = self.values = torch.empty(0, 0, 0)
        self.prefix: PrefixHeads | None = None

    def append(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Stores [T, K, D] keys and values from position `start` on; returns all up to there, [K, start+T, D]."""
        end = start + k.shape[0]
        if end > self.keys.shape[1]:
            shape = (k.shape[1], max(256, 1 << (end - 1).bit_length()), k.shape[2])
            keys, values = k.new_empty(shape), v.new_empty(shape)
            if start:
                keys[:, :start] = self.keys[:, :start]
                values[:, :start] = self.values[:, :start]
            self.keys, self.values = keys, values
        self.keys[:, start:end] = k.transpose(0, 1)
        self.values[:, start:end] = v.transpose(0, 1)
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """The keys and values of all layers for one document. `length` positions of it are valid."""

    def __init__(self, n_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(n_layers)]
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forgets every position from `length` on; of nothing left, the prefix is forgotten, too."""
        self.length = min(self.length, length)
        if not self.length:
            for layer in self.layers:
                layer.prefix = None


class Attend(Protocol):
    """How projected queries, keys and values meet: what a block needs to know of the batch it computes on."""

    rotations: Tensor
    """[T, D/2], of the positions of the queries."""
    lengths: Sequence[int]
    """Tokens of each document."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, H*D], [T, K*D], [T, K*D] to the heads' outputs side by side, [T, H*D]."""

    def prefix_heads(self, common: bool, make: Callable[[], list[PrefixHeads]]) -> list[PrefixHeads]:
        """What `make` gives, or has given before: one for all documents if it is `common`, else one for each."""


class DocumentAttention:
    """Causal attention within the documents of a stream, whose lengths sum to T; rotations are [T, D/2]."""

    def __init__(self, lengths: Sequence[int], rotations: Tensor) -> None:
        self.lengths: Sequence[int] = list(lengths)
        self.rotations = rotations

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if device_type(q) == "cpu" and torch.is_grad_enabled():
            return _DocumentsOnCPU.apply(q, k, v, self.rotations, self.lengths)
        q, k, v = (x.unflatten(-1, (-1, 2 * self.rotations.shape[-1])) for x in (q, k, v))
        q, k = rotate(q, self.rotations), rotate(k, self.rotations)
        # One fused kernel call for each document: nothing is padded and no mask is made. Documents are split off all at
        # once: the gradient of a slice is as large as the whole stream, and there would be one for each document.
        outputs = [
            attend_heads(queries, keys.transpose(0, 1), values.transpose(0, 1), is_causal=True)
            for queries, keys, values in zip(*(x.split(list(self.lengths)) for x in (q, k, v)), strict=True)
        ]
        return torch.cat(outputs).flatten(1)

    def prefix_heads(self, common: bool, make: Callable[[], list[PrefixHeads]]) -> list[PrefixHeads]:
        return make()


class _DocumentsOnCPU(torch.autograd.Function):
    """Rotation and attention of all documents in one, for training on a CPU.

    The kernels are those of `scaled_dot_product_attention`. Out of single calls to it, the outputs would be kept twice,
    for each document and joined, and the gradients be copied once more.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rotations: Tensor, lengths: Sequence[int]) -> Tensor:
        heads = (-1, 2 * rotations.shape[-1])
        q, k = (rotate(x.unflatten(-1, heads), rotations) for x in (q, k))
        v = v.unflatten(-1, heads)
        outputs = torch.empty_like(q)
        log_sums = []
        for document in document_slices(lengths):
            q_k_v = [_batch(x[document]) for x in (q, k, v)]
            output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*q_k_v, 0.0, True)
            _batch(outputs[document]).copy_(output)
            log_sums.append(log_sum)
        ctx.lengths = lengths
        ctx.save_for_backward(q, k, v, rotations, outputs, *log_sums)
        return outputs.flatten(1)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rotations, outputs, *log_sums = ctx.saved_tensors
        d_output = d_outputs[0].view_as(outputs)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        for document, log_sum in zip(document_slices(ctx.lengths), log_sums, strict=True):
            d_out, *q_k_v_out = [_batch(x[document]) for x in (d_output, q, k, v, outputs)]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_out, *q_k_v_out, log_sum, 0.0, True
            )
            for gradient, part in zip(gradients, parts, strict=True):
                _batch(gradient[document]).copy_(part)
        d_q, d_k, d_v = gradients
        back = rotations.conj()
        return rotate(d_q, back).flatten(1), rotate(d_k, back).flatten(1), d_v.flatten(1), None, None


def document_slices(lengths: Sequence[int]) -> Iterator[slice]:
    """Where the documents of a stream are in it."""
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _batch(x: Tensor) -> Tensor:
    """A document's [T, H, D] as the kernels take it, [1, H, T, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def attend_heads(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Queries [T, H, D] attend to keys and values [K, S, D], whose heads they share in groups; [T, H, D]."""
    output = F.scaled_dot_product_attention(
        _batch(q),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q.shape[1] != keys.shape[0],
    )
    return output.squeeze(0).transpose(0, 1)


def _attend_cached(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last T positions attend to a cache: q [T, H, D], keys and values [K, S, D] to [T, H, D]."""
    tokens, positions = len(q), keys.shape[1]
    if tokens == 1:
        # The query heads of a group share keys and values: they form the "sequence" of one unmasked call.
        grouped = q.reshape(1, len(keys), -1, q.shape[2])
        return F.scaled_dot_product_attention(grouped, keys.unsqueeze(0), values.unsqueeze(0)).reshape(q.shape)
    if tokens == positions:
        return attend_heads(q, keys, values, is_causal=True)
    mask = torch.ones(tokens, positions, dtype=torch.bool, device=q.device).tril(positions - tokens)
    return attend_heads(q, keys, values, mask)


class CachedAttention:
    """The new positions of each document attend to its past and to themselves; they are added to its cache.

    Documents, `layers` and `starts` go together: what a document has kept, and how many positions that is.
    """

    def __init__(
        self, layers: Sequence[LayerCache], starts: Sequence[int], lengths: Sequence[int], rotations: Tensor
    ) -> None:
        self.layers = layers
        self.starts = starts
        self.lengths = lengths
        self.rotations = rotations

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (-1, 2 * self.rotations.shape[-1])
        # Queries and keys are rotated together: for a single token the calls cost more than their work.
        together = rotate(torch.cat((q, k), -1).unflatten(-1, heads), self.rotations)
        q, k = together.split((q.shape[-1] // heads[1], k.shape[-1] // heads[1]), 1)
        v = v.unflatten(-1, heads)
        outputs = [
            _attend_cached(q[document], *layer.append(k[document], v[document], start))
            for layer, start, document in zip(self.layers, self.starts, document_slices(self.lengths), strict=True)
        ]
        return torch.cat(outputs).flatten(1)

    def prefix_heads(self, common: bool, make: Callable[[], list[PrefixHeads]]) -> list[PrefixHeads]:
        known = [layer.prefix for layer in self.layers if layer.prefix is not None]
        if len(known) < len(self.layers):
            made = [heads for heads in known if heads.common and common][:1] or make()
            for document, layer in enumerate(self.layers):
                layer.prefix = layer.prefix or made[0 if common else document]
        heads = [layer.prefix for layer in self.layers if layer.prefix is not None]
        return heads[:1] if all(other is heads[0] for other in heads) else heads


def keep_out_of_graphs() -> None:
    """Leaves to Python how documents attend; to be called before blocks are compiled.

    Their lengths differ in every batch, and torch.compile would make a new graph for each. As a decorator,
    `torch.compiler.disable` would import the compiler, which takes a second, where nothing is compiled.
    """
    kinds: tuple[Any, ...] = (DocumentAttention, CachedAttention)
    for kind in kinds:
        kind.__call__ = torch.compiler.disable(kind.__call__)


class AttentionExtra(Protocol):
    """What a tuning method adds to a block's attention: the one thing that attention knows of the methods."""

    def output(self, attention: "Attention", q: Tensor, attend: Attend) -> Tensor:
        """What is added to the heads' outputs, [T, H*D], for the projected queries q [T, H*D], not rotated."""


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    Attributes:
        packed: wq, wk and wv in one, or None; see `transformer.pack_small`.
    """

    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        self.wq = ColumnParallelLinear(config.dim, config.dim, parallel)
        self.wk = ColumnParallelLinear(config.dim, config.kv_dim, parallel)
        self.wv = ColumnParallelLinear(config.dim, config.kv_dim, parallel)
        self.wo = RowParallelLinear(config.dim, config.dim, parallel, residual(config.n_layers))
        self.packed: Packed | None = None

    def forward(self, x: Tensor, norm: RMSNorm, attend: Attend, extra: AttentionExtra | None = None) -> Tensor:
        """[T, dim] to [T, dim]; `norm` is applied to x first."""
        if self.packed is not None:
            return self.wo(attend(*self.packed(norm(x))))
        q, k, v = normed_linears(x, norm, (self.wq, self.wk, self.wv))
        heads = attend(q, k, v)
        return self.wo(heads if extra is None else heads + extra.output(self, q, attend))
