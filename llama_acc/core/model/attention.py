"""Causal attention within documents of a stream, and over key-value caches.

Shapes: T tokens of the stream, H query heads, K key-value heads, D head dimension, S positions in the cache. Heads are
those of this rank: model parallelism deals them out whole, a query head with its key-value head.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cache
from itertools import accumulate, islice, takewhile
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_acc.core.device import device_type
from llama_acc.core.distributed.groups import Group, Parallel, copied
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.kernels import use_kernels
from llama_acc.core.model.layers import (
    ColumnParallelLinear,
    RMSNorm,
    RowParallelLinear,
    added,
    normed_and_biased,
    normed_linears,
    residual,
    rms_norm,
    scaled,
)
from llama_acc.core.model.packed import Packed
from llama_acc.core.model.rotary import rotate, rotate_both


class PrefixHeads(NamedTuple):
    """What a block makes of a prefix, which has no position: keys and values, [K, prefix_len, D] each."""

    keys: Tensor
    values: Tensor
    common: bool  # every document has it that has none of its own


class LayerCache:
    """Keys and values of one layer's past of some documents, [slots, K, S, D] each, a document to a slot.

    There is room for the slots that have been used; S is doubled when it runs out, up to `most`. It never shrinks.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most  # positions of the longest document there will be; None: that is not known
        self.keys = self.values = torch.empty(0, 0, 0, 0)
        self.prefixes: dict[int, PrefixHeads] = {}  # those of the layer's prefix, by slot, once they are made
        self._slots: list[tuple[Tensor, Tensor]] = []

    def append(self, k: Tensor, v: Tensor, start: int, slot: int = 0) -> tuple[Tensor, Tensor]:
        """Stores [T, K, D] keys and values from position `start` on; returns all up to there, [K, start+T, D]."""
        end = start + k.shape[0]
        if slot >= len(self._slots) or end > self.keys.shape[2]:
            self.make_room(k, slot + 1, end)
        keys, values = self._slots[slot]
        keys[:, start:end] = k.transpose(0, 1)
        values[:, start:end] = v.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def make_room(self, like: Tensor, slots: int, positions: int) -> None:
        """Has room for so many positions in so many slots, of keys like these, [T, K, D]."""
        old_slots, _, old_positions, _ = self.keys.shape
        if slots <= old_slots and positions <= old_positions:
            return
        room = max(256, 1 << (positions - 1).bit_length(), old_positions)
        if self.most is not None:
            room = max(positions, min(room, self.most))
        shape = (max(slots, old_slots), like.shape[1], room, like.shape[2])
        # Zeros: what is masked still meets a weight of 0.
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        if old_slots:
            keys[:old_slots, :, :old_positions] = self.keys
            values[:old_slots, :, :old_positions] = self.values
        self.keys, self.values = keys, values
        self._slots = list(zip(keys.unbind(), values.unbind(), strict=True))

    def copy(self, source: int, target: int, length: int) -> None:
        """Gives a slot the first positions of another one, and its prefix."""
        self.make_room(self.keys[0].transpose(0, 1), target + 1, length)
        for kept in (self.keys, self.values):
            kept[target, :, :length] = kept[source, :, :length]
        if source in self.prefixes:
            self.prefixes[target] = self.prefixes[source]


class KVCache:
    """The keys and values of all layers for one document, in a slot of theirs. `length` positions of it are valid."""

    def __init__(self, n_layers: int, most: int | None = None) -> None:
        """`most`: see `LayerCache`."""
        self.layers = [LayerCache(most) for _ in range(n_layers)]
        self.slot = self.length = 0

    def beside(self, slot: int) -> "KVCache":
        """That of another document, in another slot of the same layers: those of a pass are beside each other."""
        other = KVCache(0)
        other.layers, other.slot = self.layers, slot
        return other

    def truncate(self, length: int) -> None:
        """Forgets every position from `length` on; of nothing left, the prefix is forgotten, too."""
        self.length = min(self.length, length)
        if not self.length:
            for layer in self.layers:
                layer.prefixes.pop(self.slot, None)

    def copy(self, other: "KVCache", length: int) -> None:
        """Takes the first positions of another one of the same layers in place of its own."""
        for layer in self.layers:
            layer.copy(other.slot, self.slot, length)
        self.length = length


class DocumentAttention:
    """Causal attention within the documents of a stream, whose lengths sum to T; rotations are [T, D/2].

    `bounds` is where documents begin and end, [documents + 1] int32 on the device, from 0 to T.
    """

    def __init__(self, lengths: Sequence[int], rotations: Tensor, bounds: Tensor | None = None) -> None:
        self.lengths: Sequence[int] = list(lengths)
        self.rotations = rotations
        self._bounds = bounds

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rotates: bool = True, window: int | None = None) -> Tensor:
        """[T, H, D], [T, K, D], [T, K, D] to the heads' outputs side by side, [T, H*D].

        If it `rotates`, queries and keys are rotated to their positions. With a `window`, a position sees only so many
        last ones, itself among them.
        """
        rotations = self.rotations if rotates else None
        if device_type(q) == "cpu" and torch.is_grad_enabled():
            return _DocumentsOnCPU.apply(q, k, v, rotations, self.lengths, window)
        if rotations is not None:
            q, k = rotate_both(q, k, rotations)
        if device_type(q) == "cuda" and takes_flash(q):
            if self._bounds is None:
                self._bounds = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=q.device)
            return flash_attention(q, k, v, self._bounds, max(self.lengths), window).flatten(1)
        # One fused kernel call for each document: nothing is padded and no mask is made. Documents are split off all at
        # once: the gradient of a slice is as large as the whole stream, and there would be one for each document.
        outputs: list[Tensor] = []
        for queries, keys, values in zip(*(x.split(list(self.lengths)) for x in (q, k, v)), strict=True):
            outputs += _attend_document(queries, keys, values, window)
        return torch.cat(outputs).flatten(1)

    def prefix_heads(self, common: bool, make: Callable[[], list[PrefixHeads]]) -> list[PrefixHeads]:
        """What `make` gives, or has given before: one for all documents if it is `common`, else one for each."""
        return make()


def takes_flash(q: Tensor) -> bool:
    """Whether torch's FlashAttention takes queries [T, H, D] of this type and head dimension, on their GPU."""
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return fits and (not q.is_cuda or has_flash(q.device))  # a GPU that is simulated is one that has it


@cache
def has_flash(device: torch.device) -> bool:
    """Whether torch was built with FlashAttention, and a GPU can run it: Ampere or later (compute capability 8.0)."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int | None) -> Tensor:
    """Causal attention within documents in one kernel on a GPU, however many they are: [T, H, D], [T, K, D], [T, K, D]
    to [T, H, D].

    It is what `torch.nn.attention.varlen.varlen_attn` calls, whose own arguments differ between versions of torch.
    """
    windows = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False, **windows
    )[0]


class _DocumentsOnCPU(torch.autograd.Function):
    """Rotation and attention of all documents in one, for training on a CPU.

    The kernels are those of `scaled_dot_product_attention`. Out of single calls to it, the outputs would be kept twice,
    for each document and joined, and the gradients be copied once more.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rotations: Tensor | None, lengths: Sequence[int], window: int | None
    ) -> Tensor:
        if rotations is not None:
            q, k = rotate(q, rotations), rotate(k, rotations)
        outputs = torch.empty_like(q)
        log_sums = []
        for rows, seen, mask in _stream_pieces(lengths, window, q.dtype):
            q_k_v = _batch(q[rows]), _batch(k[seen]), _batch(v[seen])
            output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *q_k_v, 0.0, mask is None, attn_mask=mask
            )
            _batch(outputs[rows]).copy_(output)
            log_sums.append(log_sum)
        ctx.lengths, ctx.window, ctx.rotates = lengths, window, rotations is not None
        ctx.save_for_backward(q, k, v, rotations, outputs, *log_sums)
        return outputs.flatten(1)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rotations, outputs, *log_sums = ctx.saved_tensors
        d_output = d_outputs[0].view_as(outputs)
        pieces = list(_stream_pieces(ctx.lengths, ctx.window, q.dtype))
        # Where a document is in several pieces, they share keys and values: these gradients are sums.
        is_whole = len(pieces) == len(ctx.lengths)
        gradients = [torch.empty_like(q), *(torch.empty_like(x) if is_whole else torch.zeros_like(x) for x in (k, v))]
        for (rows, seen, mask), log_sum in zip(pieces, log_sums, strict=True):
            d_out, *q_k_v_out = (
                _batch(x[part]) for x, part in ((d_output, rows), (q, rows), (k, seen), (v, seen), (outputs, rows))
            )
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_out, *q_k_v_out, log_sum, 0.0, mask is None, attn_mask=mask
            )
            _batch(gradients[0][rows]).copy_(parts[0])
            for gradient, part in zip(gradients[1:], parts[1:], strict=True):
                _batch(gradient[seen]).copy_(part) if is_whole else _batch(gradient[seen]).add_(part)
        d_q, d_k, d_v = gradients
        if ctx.rotates:
            back = rotations.conj()
            d_q, d_k = rotate(d_q, back), rotate(d_k, back)
        return d_q, d_k, d_v, None, None, None


Piece = tuple[slice, slice, Tensor | None]
"""Queries of some rows, the rows they may see, and a mask of which each does; None: causal."""


def _pieces(length: int, window: int | None, device: torch.device) -> Iterator[Piece]:
    """A document whole, or, where it is longer than the window, in pieces of as many rows: so masks stay small."""
    if window is None or length <= window:
        yield slice(0, length), slice(0, length), None
        return
    for begin in range(0, length, window):
        end, first = min(begin + window, length), max(0, begin - window + 1)
        yield slice(begin, end), slice(first, end), _window_mask(end - begin, end - first, window, device)


def _window_mask(rows: int, seen: int, window: int, device: torch.device) -> Tensor:
    """[rows, seen]: what the last `rows` of `seen` positions see of them."""
    return torch.ones(rows, seen, dtype=torch.bool, device=device).tril(seen - rows).triu(seen - rows - window + 1)


def _attend_document(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> list[Tensor]:
    """The outputs [rows, H, D] of a document's pieces, for its queries [L, H, D] and keys and values [L, K, D]."""
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    if window is None or len(q) <= window:
        return [attend_heads(q, k, v, is_causal=True)]
    return [
        attend_heads(q[rows], k[:, seen], v[:, seen], mask) for rows, seen, mask in _pieces(len(q), window, q.device)
    ]


def _stream_pieces(lengths: Sequence[int], window: int | None, dtype: torch.dtype) -> Iterator[Piece]:
    """The pieces of all documents by their places in the stream, and masks as the kernels for a CPU take them."""
    for document in document_slices(lengths):
        begin = document.start
        for rows, seen, mask in _pieces(document.stop - begin, window, torch.device("cpu")):
            if mask is not None:
                mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
            yield slice(begin + rows.start, begin + rows.stop), slice(begin + seen.start, begin + seen.stop), mask


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


def _attend_cached(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """The last T positions attend to a cache: q [T, H, D], keys and values [K, S, D] to [T, H, D]."""
    tokens = len(q)
    if window is not None and keys.shape[1] >= tokens + window:
        keys, values = (x[:, 1 - tokens - window :] for x in (keys, values))
    positions = keys.shape[1]
    if tokens == 1:
        # The query heads of a group share keys and values: they form the "sequence" of one unmasked call.
        grouped = q.reshape(1, len(keys), -1, q.shape[2])
        return F.scaled_dot_product_attention(grouped, keys.unsqueeze(0), values.unsqueeze(0)).reshape(q.shape)
    if tokens == positions and (window is None or tokens <= window):
        return attend_heads(q, keys, values, is_causal=True)
    return attend_heads(q, keys, values, _window_mask(tokens, positions, window or positions, q.device))


class CachedAttention:
    """The new positions of each document attend to its past and to themselves; they are added to its cache. Otherwise
    as `DocumentAttention`."""

    def __init__(
        self,
        caches: Sequence[KVCache],
        lengths: Sequence[int],
        rotations: Tensor,
        on_gpu: "TokensOnGPU | None" = None,
    ) -> None:
        """`caches` go with `lengths`, and are beside each other; with `on_gpu`, which says more, one stands for all."""
        self.layer = 0  # the number of the block that computes
        self.prefix: Sequence[Tensor] = ()  # its `Attention.prefix`, if that is to be attended to as well
        self.lengths, self.rotations = lengths, rotations
        self._layers = caches[0].layers
        self._slots = [cache.slot for cache in caches]
        self._starts = [cache.length for cache in caches]
        self._places = list(document_slices(lengths))
        self._on_gpu = on_gpu
        if on_gpu is not None:
            return
        if use_kernels(rotations) and max(lengths) == 1:
            slots, positions = torch.tensor([self._slots, self._starts], device=rotations.device)
            self._on_gpu = TokensOnGPU(slots, positions, max(self._slots) + 1, max(self._starts) + 1)
        count = sum(1 for _ in takewhile(lambda length: length == 1, lengths))
        together = _SingleTokens(self._slots[:count], self._starts[:count], rotations.device) if count > 1 else None
        self._together = together if together is not None and together.is_worthwhile else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rotates: bool = True, window: int | None = None) -> Tensor:
        layer = self._layers[self.layer]
        if self._on_gpu is not None:
            places, longest = self._on_gpu[:2], self._on_gpu[2:]
            layer.make_room(k, *longest)
            kept = layer.keys, layer.values
            q = torch.ops.llama_acc.rotate_and_store(q, k, v, self.rotations if rotates else None, *kept, *places)
            return torch.ops.llama_acc.attend_slots(q, *kept, *places, window or 0, list(self.prefix)).flatten(1)
        if rotates:
            # Queries and keys are rotated together: for a single token the calls cost more than their work.
            q, k = rotate(torch.cat((q, k), 1), self.rotations).split((q.shape[1], k.shape[1]), 1)
        if len(self._slots) == 1:  # nothing is cut and joined: for a single token each call counts
            return _attend_cached(q, *layer.append(k, v, self._starts[0], self._slots[0]), window).flatten(1)
        outputs = []
        count = 0
        if self._together is not None:
            count = len(self._together.slots)
            outputs.append(self._together.attend(layer, q[:count], k[:count], v[:count], window))
        documents = zip(self._places, self._starts, self._slots, strict=True)
        for own, start, slot in islice(documents, count, None):
            outputs.append(_attend_cached(q[own], *layer.append(k[own], v[own], start, slot), window))
        return torch.cat(outputs).flatten(1)

    def narrowed(self, documents: slice, rows: slice) -> "CachedAttention":
        """What some of the documents, in these rows of the stream, have of it, for an `AttentionExtra`."""
        part = copy(self)
        part.lengths, part._slots = self.lengths[documents], self._slots[documents]
        part.rotations = self.rotations[rows]
        return part

    def prefix_heads(self, common: bool, make: Callable[[], list[PrefixHeads]]) -> list[PrefixHeads]:
        kept = self._layers[self.layer].prefixes
        known = [kept[slot] for slot in self._slots if slot in kept]
        if len(known) < len(self._slots):
            made = [heads for heads in known if heads.common and common][:1] or make()
            for document, slot in enumerate(self._slots):
                kept.setdefault(slot, made[0 if common else document])
        heads = [kept[slot] for slot in self._slots]
        return heads[:1] if all(other is heads[0] for other in heads) else heads


class TokensOnGPU(NamedTuple):
    """Single new tokens [T] of as many documents, for kernels that find the documents' slots and lengths on the GPU."""

    slots: Tensor
    positions: Tensor
    end: int = 0  # so many slots are needed, 0: there is room,
    longest: int = 0  # and so many positions in them


class _SingleTokens:
    """Documents of one new token each, which attend to their slots [B, K, S, D] in one call.

    Shapes: B slots from the first of theirs to the last.
    """

    def __init__(self, slots: Sequence[int], positions: Sequence[int], device: torch.device) -> None:
        """`positions` are those of the new tokens."""
        self.slots, self.positions = torch.tensor([slots, positions], device=device)
        self._first, self._end = min(slots), max(slots) + 1
        self._shortest, self._longest = min(positions) + 1, max(positions) + 1
        self._rows = None if list(slots) == list(range(self._first, self._end)) else self.slots - self._first
        computed = (self._end - self._first) * self._longest
        # On a CPU time is that of the work, else it is that of the calls.
        self.is_worthwhile = device_type(self.slots) != "cpu" or computed <= 2 * (sum(positions) + len(positions))
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """The outputs [T, H, D] for queries of this shape and keys and values [T, K, D], which are stored."""
        layer.make_room(k, self._end, self._longest)
        layer.keys[self.slots, :, self.positions] = k
        layer.values[self.slots, :, self.positions] = v
        begin = 0 if window is None else max(0, self._shortest - window)
        keys, values = (x[self._first : self._end, :, begin : self._longest] for x in (layer.keys, layer.values))
        if self._rows is not None:
            q = q.new_zeros(len(keys), *q.shape[1:]).index_copy_(0, self._rows, q)
        grouped = q.reshape(len(keys), keys.shape[1], -1, q.shape[2])
        output = F.scaled_dot_product_attention(grouped, keys, values, self._mask(begin, window, q.dtype))
        output = output.reshape(q.shape)
        return output if self._rows is None else output[self._rows]

    def _mask(self, begin: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, 1, S] to be added to scores; it is the same in all blocks of that window."""
        if window not in self._masks:
            seen = torch.arange(begin, self._longest, device=self.slots.device)
            last = torch.full((self._end - self._first, 1), self._longest - 1, device=self.slots.device)
            last[self.slots - self._first, 0] = self.positions
            hidden = (seen > last) if window is None else (seen > last) | (seen <= last - window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


def keep_out_of_graphs() -> None:
    """Leaves to Python how documents attend; to be called before blocks are compiled.

    Their lengths differ in every batch, and torch.compile would make a new graph for each. As a decorator,
    `torch.compiler.disable` would import the compiler, which takes a second, where nothing is compiled.
    """
    kinds: tuple[Any, ...] = (DocumentAttention, CachedAttention)
    for kind in kinds:
        kind.__call__ = torch.compiler.disable(kind.__call__)


Attend = DocumentAttention | CachedAttention
"""How projected queries, keys and values meet: what a block needs to know of the batch it computes on."""


class AttentionExtra(Protocol):
    """What a tuning method adds to a block's attention: the one thing that attention knows of the methods."""

    def output(self, attention: "Attention", q: Tensor, attend: Attend) -> Tensor:
        """What is added to the heads' outputs, [T, H*D], for the queries q [T, H, D], not rotated."""

    def kept(self, attention: "Attention") -> Sequence[Tensor]:
        """`Attention.prefix`, while the model does not change; none: what it adds is no such thing."""


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, parallel: Parallel, layer: int) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.rotates = layer not in config.nope_layers
        is_windowed = config.window_layers is None or layer in config.window_layers
        self.window = config.sliding_window if is_windowed else None
        self.multiplier = config.residual_multiplier
        factor = config.attention_multiplier
        self.query_scale = 1.0 if factor is None else factor * config.head_size**0.5  # kernels divide by sqrt(D)
        q_dim = config.n_heads * config.head_size
        self.wq = ColumnParallelLinear(config.dim, q_dim, parallel)
        self.wk = ColumnParallelLinear(config.dim, config.kv_dim, parallel)
        self.wv = ColumnParallelLinear(config.dim, config.kv_dim, parallel)
        self.wo = RowParallelLinear(q_dim, config.dim, parallel, residual(config.n_layers))
        if config.qkv_bias:
            for projection in (self.wq, self.wk, self.wv):
                projection.add_bias()
        self.q_norm, self.k_norm = (
            HeadNorm(config.head_size, config.norm_eps, self.wq.group) if config.qk_norm else None for _ in range(2)
        )
        self.packed: Packed | None = None  # wq, wk and wv in one, or None; see `transformer.pack_small`
        # All that is extra, where a GPU's kernel for single tokens can make it: keys and values [K, P, D] without a
        # position, and float32 factors [H] on what each head gets from them.
        self.prefix: Sequence[Tensor] = ()

    def forward(
        self, x: Tensor, norm: RMSNorm, attend: Attend, extra: AttentionExtra | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """x [T, dim] and what attention adds to it, or the rows [N] of that; `norm` is applied to x first."""
        if self.packed is None:
            projected = normed_linears(x, norm, (self.wq, self.wk, self.wv))
        else:
            projected = self.packed(normed_and_biased(x, norm, self.wo, self.multiplier))
        q, k, v = (values.view(len(x), -1, self.head_size) for values in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = scaled(q, self.query_scale)
        heads = attend(q, k, v, self.rotates, self.window)
        heads = heads if extra is None else heads + extra.output(self, q, attend)
        if rows is not None:
            x, heads = x.index_select(0, rows), heads.index_select(0, rows)
        return added(x, heads, self.wo, self.multiplier, is_packed=self.packed is not None)


class HeadNorm(RMSNorm):
    """RMSNorm of each head of queries or keys, [T, heads, D]; its weight [D] is the same on every rank, and of its
    gradient each has the part of its own heads."""

    def __init__(self, dim: int, eps: float, group: Group | None) -> None:
        super().__init__(dim, eps)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, copied(self.weight, self.group), self.eps)
