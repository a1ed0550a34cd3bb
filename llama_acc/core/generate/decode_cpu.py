"""One token more of one sequence on a CPU, as a list of calls that work on the same buffers for every token.

To begin an operation from Python takes a CPU one to three microseconds. A block has 60 of them where layers call each
other, in a small model as long as reading its weights; here it has half as many.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.layers import Linear, RMSNorm, scaled
from llama_acc.core.model.nf4 import fused_product
from llama_acc.core.model.packed import Packed
from llama_acc.core.model.products import row_product
from llama_acc.core.model.transformer import Transformer


class DecodeOnCPU:
    """The step of a model that `DecodeGraph.takes_step_of`. From its first token on, no parameter may change."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        config, size = model.config, model.config.head_size
        q_dim, kv_dim = config.n_heads * size, config.kv_dim
        widths = [config.dim, config.dim, config.dim, q_dim + 2 * kv_dim, q_dim, 2 * config.hidden_dim]
        # The rows [1, width] that calls read and write.
        self._x, self._normed, self._sum, self._qkv, self._heads, self._gate_up = (
            torch.empty(1, width, dtype=model.dtype) for width in widths
        )
        self._zeros, self._ones = torch.zeros_like(self._x), torch.ones_like(self._x)
        q, k, v = self._qkv.split([q_dim, kv_dim, kv_dim], 1)
        self._k, self._v = k.view(1, -1, size), v.view(1, -1, size)
        # The query heads of a group share keys and values: they form the "sequence" of attention, [1, K, H / K, D].
        self._q, self._output = (x.view(1, self._k.shape[1], -1, size) for x in (q, self._heads))
        self._turned = self._qkv[0, : q_dim + kv_dim]
        self._wide, self._wide_turned = self._x[0].float(), self._turned.float()  # for norms and rotations
        self._pairs = torch.view_as_complex(self._wide_turned.view(-1, size // 2, 2))
        self._rotation = torch.empty(1, size // 2, dtype=torch.complex64)
        self._past, self._past_at, self._position = list[tuple[Tensor, Tensor]](), (0, 0), 0
        self._calls = list[Callable[[], object]]()

    def __call__(self, tokens: Sequence[int], caches: Sequence[KVCache], *_: object) -> tuple[Tensor, Tensor]:
        """Logits [1, V] of what follows a token, and the likeliest; its cache has a position already."""
        model, (token,), (cache,) = self.model, tokens, caches
        layers, position = cache.layers, cache.length
        if not self._calls:
            self._calls = [call for layer, block in enumerate(model.layers) for call in self._block(layer, block)]
            self._calls.append(self._norm(model.norm))
        if position == layers[0].keys.shape[2]:
            model.make_room([cache])
        if self._past_at != (at := (layers[0].keys.data_ptr(), cache.slot)):
            slot = slice(cache.slot, cache.slot + 1)
            self._past, self._past_at = [(layer.keys[slot], layer.values[slot]) for layer in layers], at
        self._position = position
        self._rotation.copy_(model.rotation_table(position + 1, self._x.device)[position])
        self._x.copy_(scaled(model.tok_embeddings.weight[token].to(model.dtype), model.config.embedding_multiplier))
        for call in self._calls:
            call()
        cache.length += 1
        logits = model.logits(scaled(self._normed, 1.0 / model.config.logits_scaling))
        return logits, logits.argmax(-1)

    def _block(self, layer: int, block: Any) -> Iterator[Callable[[], object]]:
        attention, feed_forward = block.attention, block.feed_forward
        yield self._norm(block.attention_norm)
        yield from _products(self._normed, [attention.wq, attention.wk, attention.wv], attention.packed, self._qkv)
        for heads, norm in ((self._q, attention.q_norm), (self._k, attention.k_norm)):
            if norm is not None:
                yield partial(_write, heads, norm, heads)
        if attention.query_scale != 1.0:
            yield partial(self._q.mul_, attention.query_scale)
        if attention.rotates:
            yield partial(self._wide_turned.copy_, self._turned)
            yield partial(self._pairs.mul_, self._rotation)
            yield partial(self._turned.copy_, self._wide_turned)
        yield partial(self._attend, layer, attention.window)
        yield from _products(self._heads, [attention.wo], None, self._sum)
        yield partial(self._x.add_, self._sum, alpha=attention.multiplier)
        yield self._norm(block.ffn_norm)
        yield from _products(self._normed, [feed_forward.w1, feed_forward.w3], feed_forward.packed, self._gate_up)
        gate, up = self._gate_up.chunk(2, 1)
        yield partial(F.silu, gate, inplace=True)
        yield partial(gate.mul_, up)
        yield from _products(gate, [feed_forward.w2], None, self._sum)
        yield partial(self._x.add_, self._sum, alpha=feed_forward.multiplier)

    def _norm(self, norm: RMSNorm) -> Callable[[], object]:
        weight, row = norm.weight.to(self._x.dtype), self._x[0]

        def normalize() -> None:
            self._wide.copy_(row)
            inverse = (torch.dot(self._wide, self._wide).item() / len(row) + norm.eps) ** -0.5
            # A number as a factor would become a tensor first.
            torch.addcmul(self._zeros, self._x, self._ones, value=inverse, out=self._normed).mul_(weight)

        return normalize

    def _attend(self, layer: int, window: int | None) -> None:
        keys, values = self._past[layer]
        keys.select(2, self._position).copy_(self._k)
        values.select(2, self._position).copy_(self._v)
        seen = min(self._position + 1, window or self._position + 1)
        keys, values = (x.narrow(2, self._position + 1 - seen, seen) for x in (keys, values))
        self._output.copy_(F.scaled_dot_product_attention(self._q, keys, values))


def _products(x: Tensor, layers: Sequence[Linear], packed: Packed | None, y: Tensor) -> Iterator[Callable[[], object]]:
    """What writes the products of x [1, in] with each layer side by side to y [1, out]."""
    if packed is not None:
        yield row_product(x, packed.weight, y)
    for layer, part in zip(layers, y.split([len(layer.weight) for layer in layers], 1), strict=True):
        is_fused = x.dtype == torch.bfloat16 and hasattr(layer.weight, "fused")
        if layer.extensions or (layer.weight.dtype != x.dtype and not is_fused):
            yield partial(_write, part, layer, x)
            continue
        if packed is None:
            yield fused_product(x, layer.weight, part) if is_fused else row_product(x, layer.weight, part)
        if layer.bias is not None:
            yield partial(part.add_, layer.bias.to(x.dtype))


def _write(y: Tensor, compute: Callable[[Tensor], Tensor], x: Tensor) -> None:
    y.copy_(compute(x))
