"""Matrix products. Parameters may be of another type than the activations: they are cast for compute.

Under model parallelism each rank holds a part of a matrix (see `sharding`). A column-parallel layer takes the whole
input and gives its part of the output's features; a row-parallel one takes such a part, and its output is summed over
the group. The groups and the differentiable communication are fairscale's; where an operation has a backward pass of
its own (`norm`, `swiglu`, `cross_entropy`), the communication is in there.

Shapes: T tokens of the stream; features are those of this rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_acc.core.device import device_type
from llama_acc.core.distributed.groups import Parallel, copied, gathered, summed
from llama_acc.core.model import nf4
from llama_acc.core.model.nf4 import Scales, dense
from llama_acc.core.model.tuning import NOTHING, Added

_onednn: Any = torch.backends.mkldnn


class LowRank(nn.Module):
    """One matrix of a LoRA pair.

    Attributes:
        weight: [out_features, in_features].
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))


class Linear(nn.Module):
    """A matrix product; its matrix may be quantised, and a tuning method may add a bias and a LoRA pair.

    Attributes:
        weight: [out_features, in_features]; or quantised, [out_features, in_features / 2] bytes.
        scales: of a quantised matrix; else None.
        bias: [out_features], or None.
        lora_a: its weight is [rank, in_features]; or None.
        lora_b: its weight is [out_features, rank]; or None.
    """

    def __init__(self, in_features: int, out_features: int, added: Added = NOTHING) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.is_quantised = False
        self.bias = nn.Parameter(torch.empty(out_features)) if added.bias else None
        self.lora_a = LowRank(in_features, added.rank) if added.rank else None
        self.lora_b = LowRank(added.rank, out_features) if added.rank else None

    def make_room_for_nf4(self) -> None:
        """Gives the matrix the form it has when it is quantised, with nothing in it yet."""
        rows, columns = self.weight.shape
        device = self.weight.device
        room = torch.empty(nf4.packed_shape(rows, columns), dtype=torch.uint8, device=device)
        self.take(room, nf4.empty_scales(rows, columns, device))
        self.is_quantised = True

    def take(self, packed: Tensor, scales: Scales) -> None:
        """Takes over a quantised matrix, with its storage."""
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name, tensor in scales._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def scales(self) -> Scales | None:
        """See the class."""
        return Scales(*(self.get_buffer(name) for name in Scales._fields)) if self.is_quantised else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the type of `x`."""
        low = None if self.lora_a is None else linear(x, self.lora_a.weight)
        return self.finish(linear(x, self.weight, self.scales), low)

    def finish(self, y: Tensor, low: Tensor | None) -> Tensor:
        """Adds what the tuning method has to the matrix product y [..., out], in place.

        Args:
            y: the product.
            low: [..., rank], the product with lora_a.
        """
        if low is not None:
            assert self.lora_b is not None
            y = y.flatten(0, -2).addmm_(low.flatten(0, -2), self.lora_b.weight.to(y.dtype).t()).view(y.shape)
        return y if self.bias is None else y.add_(self.bias.to(y.dtype))


class ColumnParallelLinear(Linear):
    """A matrix product of which this rank computes a part of the output's features.

    The gradient of its input is a sum over `group`: `forward`, `normed_linears` and `linear_cross_entropy` see to that.
    Of the LoRA pair, lora_a is whole on every rank.
    """

    def __init__(self, in_features: int, out_features: int, parallel: Parallel, added: Added = NOTHING) -> None:
        super().__init__(in_features, out_features // parallel.model_size, added)
        self.group = parallel.model_group if parallel.model_size > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., this rank's out_features], in the type of `x`."""
        low = None if self.lora_a is None else copied(linear(x, self.lora_a.weight), self.group)
        return self.finish(linear(copied(x, self.group), self.weight, self.scales), low)


class RowParallelLinear(Linear):
    """A matrix product of which this rank has a part of the input's features; the output is whole.

    Of the LoRA pair, lora_b is whole on every rank, and so is the bias.
    """

    def __init__(self, in_features: int, out_features: int, parallel: Parallel, added: Added = NOTHING) -> None:
        super().__init__(in_features // parallel.model_size, out_features, added)
        self.group = parallel.model_group if parallel.model_size > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., this rank's in_features] to [..., out_features], in the type of `x`."""
        low = None if self.lora_a is None else summed(linear(x, self.lora_a.weight), self.group)
        return self.finish(summed(linear(x, self.weight, self.scales), self.group), low)


class Packed:
    """Several linear layers of the same input as one matrix product.

    In small models a matrix product of one row costs less than the call. The layers' weights become views of the
    packed one, so they keep their names and no memory is added.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.sizes = [layer.weight.shape[0] for layer in layers]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        for layer, view in zip(layers, self.weight.split(self.sizes), strict=True):
            layer.weight = nn.Parameter(view, requires_grad=False)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """[T, in] to one [T, out] for each layer."""
        return linear(x, self.weight).split(self.sizes, -1)


def linear(x: Tensor, weight: Tensor, scales: Scales | None = None) -> Tensor:
    """x [..., in] times weight [out, in], which may be quantised, transposed; in the type of `x`."""
    if scales is not None:
        if torch.is_grad_enabled() and x.requires_grad:
            return _QuantisedLinearFunction.apply(x, weight, scales)
        if x.dim() == 2 and x.shape[0] == 1:
            return nf4.one_row(x, weight, scales)
    weight = dense(weight, scales, x.dtype)
    if x.dim() == 2 and x.shape[0] == 1 and device_type(x) == "cpu" and not torch.is_grad_enabled():
        return _one_row(x, weight)
    return F.linear(x, weight)


class _QuantisedLinearFunction(torch.autograd.Function):
    """Keeps the quantised matrix only, and writes it out again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Scales) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.scales = scales
        return F.linear(x, dense(weight, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return d_outputs[0] @ dense(weight, ctx.scales, d_outputs[0].dtype), None, None


def _one_row(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of one row [1, in] on a CPU: generation, where the libraries' products of matrices fall short."""
    rows, columns = weight.shape
    threads = torch.get_num_threads()
    if x.dtype == torch.float32 and rows % threads == 0:
        # The library reads a matrix with one thread if there is one vector to multiply; as a batch of matrices, one
        # for each thread, it is read with all.
        return torch.bmm(x.expand(threads, 1, columns), weight.view(threads, rows // threads, columns).mT).view(1, rows)
    if x.dtype == torch.bfloat16 and _onednn.enabled:
        # oneDNN takes 1.1 to 4 times as long as torch's own product of a matrix and a vector, at every size (measured
        # on two Zen 4 cores).
        _onednn.enabled = False
        try:
            return F.linear(x, weight)
        finally:
            _onednn.enabled = True
    return F.linear(x, weight)


class ParallelEmbedding(nn.Module):
    """A table of vectors, of which this rank holds a part of the features.

    Attributes:
        weight: [vocab_size, this rank's part of dim].
    """

    def __init__(self, vocab_size: int, dim: int, parallel: Parallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim // parallel.model_size))
        self.group = parallel.model_group if parallel.model_size > 1 else None

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens [T] to vectors [T, dim] of `dtype`. Rows are cast after they are picked: the table is large."""
        return gathered(F.embedding(tokens, self.weight).to(dtype), self.group)


def accumulator(weight: Tensor, terms: int) -> Tensor:
    """Where `add_product` sums that many terms of a weight's gradient: in float32 if there is more than one."""
    if not terms:
        return torch.zeros_like(weight)
    return torch.empty_like(weight, dtype=weight.dtype if terms == 1 else torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Adds the product a @ b to `total`, or writes it there if it is the first. `total` may be of a wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)
