"""The layers of the block: matrix products, RMSNorm and SwiGLU, each with the backward pass that keeps least.

Parameters may be of another type than the activations: they are cast for compute. Under model parallelism a
column-parallel layer takes the whole input and gives this rank's features of the output; a row-parallel one takes such
a part, and its output is summed over the group. So a rank's part is a shard of Meta's checkpoints. Where an operation
has a backward pass of its own, the communication is in there.

A layer says of a parameter that it creates, with `parameter`, its whole shape, how it is split, how it is initialized
and whether weight decay acts on it: on all but biases and norm weights (LLaMA2-Accessory's rule). Whether it trains is
its `requires_grad`. `transformer.describe` makes a table of that.

Shapes: T tokens of the stream; features are those of this rank.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from llama_acc.core.device import device_type
from llama_acc.core.distributed.groups import Group, Parallel, copied, gathered, summed
from llama_acc.core.model import nf4
from llama_acc.core.model.copies import cast
from llama_acc.core.model.kernels import use_kernels
from llama_acc.core.model.nf4 import Scales, dense
from llama_acc.core.model.products import (
    add_masked_product,
    add_product,
    by_onednn,
    gradient_sum,
    one_row,
    product,
    several_rows,
    weight_gradient,
)

_ALONE = Parallel()
# Rows of SwiGLU that are worked on at a time on a CPU, at most: of few, a good part of the time is laying out weights.
_PIECE_ROWS = 1024
Init = Callable[[Tensor, Generator], object]
"""Fills a whole parameter, on the CPU, in place."""


class Spec(NamedTuple):
    """What a layer says of a parameter that it creates."""

    shape: tuple[int, ...]  # of the whole parameter
    split: int | None  # the dimension in which model parallelism splits it; None = every rank has all of it
    init: Init  # its values at the start
    decays: bool  # weight decay acts on it


def ones(values: Tensor, generator: Generator) -> None:
    values.fill_(1.0)


def zeros(values: Tensor, generator: Generator) -> None:
    values.zero_()


def normal(std: float = 0.02) -> Init:
    """Normally distributed values around 0."""
    return lambda values, generator: values.normal_(0.0, std, generator=generator)


def residual(n_layers: int) -> Init:
    """For a matrix that writes into the residual stream of so many blocks (GPT-2's rule)."""
    return normal(0.02 * (2 * n_layers) ** -0.5)


def parameter(
    *shape: int, init: Init, split: int | None = None, parallel: Parallel = _ALONE, decays: bool = True
) -> nn.Parameter:
    """This rank's part of a parameter, without values; what it is told is kept as its `spec`."""
    local = [length // parallel.model_size if i == split else length for i, length in enumerate(shape)]
    made = nn.Parameter(torch.empty(local))
    # A plain attribute: it is read from a model just built, and not kept when the parameter is replaced.
    setattr(made, "spec", Spec(shape, split, init, decays))  # noqa: B010
    return made


class Extension(Protocol):
    """What a tuning method puts on a matrix product: the one thing that layers know of the methods."""

    def inputs(self) -> list[Tensor]:
        """Matrices [n, in_features], whose products with the layer's input are computed along with the layer's own."""
        return []

    def masks(self) -> list[Tensor | None]:
        """For each of `inputs`, what of the layer's input is 0 for it: booleans [T, in_features] for the stream that is
        trained on; None: nothing more. They are this rank's, as the input is."""
        return [None for _ in self.inputs()]

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and f, if all that it does to the product is to add f * (x A^T) B^T."""
        return None

    def finish(self, y: Tensor, products: Iterator[Tensor]) -> Tensor:
        """The layer's output from what it is without this, y [..., out_features], which may be changed in place;
        the next of `products` [..., n] are those with `inputs`, and to be taken."""
        return y


class Matrix(nn.Module):
    """A matrix of an extension, [out_features, in_features]; a module, so that its name ends in `.weight`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Linear(nn.Module):
    """A matrix product; its matrix may be quantized, and a tuning method may add a bias or extensions."""

    split: int | None = None  # the dimension of the matrix in which it is split; None = it is not

    def __init__(self, in_features: int, out_features: int, parallel: Parallel, init: Init | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.parallel = in_features, out_features, parallel  # of the whole layer
        self.group = parallel.model_group if parallel.model_size > 1 else None  # it is split over these ranks, if any
        # [out_features, in_features]; or quantized, [out_features, in_features / 2] bytes.
        self.weight = parameter(out_features, in_features, init=init or normal(), split=self.split, parallel=parallel)
        self.is_quantized = False
        self.bias: nn.Parameter | None = None  # [out_features], or None
        self.extensions: list[Extension] = []  # what else is done to the product, in this order, after the bias

    def add_bias(self) -> None:
        """Gives the layer a bias, zero at the start; it is split with the rows of the matrix."""
        split = 0 if self.split == 0 else None
        self.bias = parameter(self.out_features, init=zeros, split=split, parallel=self.parallel, decays=False)

    def to_nf4_meta(self) -> None:
        """Gives the matrix the form it has when it is quantized, with nothing in it yet."""
        rows, columns = self.weight.shape
        device = self.weight.device
        room = torch.empty(nf4.packed_shape(rows, columns), dtype=torch.uint8, device=device)
        self.take(room, nf4.empty_scales(rows, columns, device))
        self.is_quantized = True

    def take(self, packed: Tensor, scales: Scales) -> None:
        """Takes over a quantized matrix, with its storage."""
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name, tensor in scales._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def scales(self) -> Scales | None:
        """Of a quantized matrix; else None."""
        return Scales(*(self.get_buffer(name) for name in Scales._fields)) if self.is_quantized else None

    def inputs(self) -> list[Tensor]:
        """Those of the extensions: matrices that are multiplied with the layer's input."""
        return [matrix for extension in self.extensions for matrix in extension.inputs()]

    def masks(self) -> list[Tensor | None]:
        """Those of the extensions, one for each of `inputs`."""
        return [mask for extension in self.extensions for mask in extension.masks()]

    def low_ranks(self) -> list[Any]:
        """What the kernel for a quantized matrix is to add: of one, if it does all that extensions do; else of none."""
        pairs = [extension.low_rank() for extension in self.extensions] or [None]
        are_known = not self.extensions or (pairs[0] is not None and pairs[0][1].shape[1] <= nf4.MOST_RANK)
        return pairs if len(pairs) == 1 and are_known and self.group is None else []

    def product(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], without what the tuning method adds."""
        raise NotImplementedError

    def extra_products(self, x: Tensor) -> list[Tensor]:
        """The products [..., n] of the layer's input with each of `inputs`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the type of `x`; of a dimension that is split, these are this rank's features."""
        extra = self.extra_products(x) if self.extensions else []
        return self.finish(self.product(x), iter(extra))

    def finish(self, y: Tensor, products: Iterator[Tensor]) -> Tensor:
        """Adds what the tuning method has to the matrix product y [..., out], in place; see `Extension`."""
        y = y if self.bias is None else y.add_(cast(self.bias, y.dtype))
        for extension in self.extensions:
            y = extension.finish(y, products)
        return y


class ColumnParallelLinear(Linear):
    """A matrix product of which this rank computes a part of the output's features.

    The gradient of its input is a sum over `group`: `forward`, `normed_linears` and `linear_cross_entropy` see to that.
    The matrices of its extensions' inputs are whole on every rank.
    """

    split = 0

    def product(self, x: Tensor) -> Tensor:
        return linear(copied(x, self.group), self.weight, self.scales)

    def extra_products(self, x: Tensor) -> list[Tensor]:
        return [copied(linear(x, matrix), self.group) for matrix in self.inputs()]


class RowParallelLinear(Linear):
    """A matrix product of which this rank has a part of the input's features; the output is whole.

    So are the bias and what extensions do to the output; the matrices of their inputs are split like the layer's.
    """

    split = 1

    def product(self, x: Tensor) -> Tensor:
        return summed(linear(x, self.weight, self.scales), self.group)

    def extra_products(self, x: Tensor) -> list[Tensor]:
        kept = zip(self.inputs(), self.masks(), strict=True)
        return [summed(linear(_masked(x, mask), matrix), self.group) for matrix, mask in kept]


def scaled(x: Tensor, factor: float) -> Tensor:
    """x times a factor, which most models do not have: 1."""
    return x if factor == 1.0 else x * factor


def linear(x: Tensor, weight: Tensor, scales: Scales | None = None) -> Tensor:
    """x [..., in] times weight [out, in], which may be quantized, transposed; in the type of `x`."""
    if torch.is_grad_enabled():
        is_wide = device_type(x) == "cuda" and x.dtype != weight.dtype and not torch.compiler.is_compiling()
        if x.requires_grad if scales is not None else x.dim() == 2 and (is_wide or by_onednn(x, weight)):
            return _LinearFunction.apply(x, weight, scales)
    if scales is not None and nf4.has_kernel(x, weight):
        return nf4.add_product_(x.new_empty(len(x), len(weight)), x, weight, scales, None, first=True)
    is_generating = x.dim() == 2 and not torch.is_grad_enabled()
    if scales is not None and is_generating and (y := nf4.few_rows(x, weight, scales)) is not None:
        return y
    weight = dense(weight, scales, x.dtype)
    if is_generating and device_type(x) == "cpu":
        return one_row(x, weight) if x.shape[0] == 1 else several_rows(x, weight)
    return F.linear(x, weight)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with 0 in the places of a mask."""
    return x if mask is None else x.masked_fill(mask, 0)


class _LinearFunction(torch.autograd.Function):
    """Keeps the matrix as it is, which is cast or written out again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Scales | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.scales, ctx.weight = scales, weight
        return product(x, dense(weight, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_y, needs_x = d_outputs[0], ctx.needs_input_grad[0]
        d_x = product(d_y, dense(weight, ctx.scales, d_y.dtype).t()) if needs_x else None
        return d_x, None if x is None else weight_gradient(ctx.weight, d_y, x), None


class ParallelEmbedding(nn.Module):
    """A table of vectors, of which this rank holds a part of the features: weight [vocab_size, dim / model_size]."""

    def __init__(self, vocab_size: int, dim: int, parallel: Parallel) -> None:
        super().__init__()
        self.weight = parameter(vocab_size, dim, init=normal(), split=1, parallel=parallel)
        self.group = parallel.model_group if parallel.model_size > 1 else None

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens [T] to vectors [T, dim] of `dtype`. Rows are cast after they are picked: the table is large."""
        return gathered(F.embedding(tokens, self.weight).to(dtype), self.group)


class TiedOutput(nn.Module):
    """The output matrix where it is the embedding: this rank's rows of it, [vocab_size / model_size, dim].

    Under model parallelism the embedding is split by features, so it is gathered whenever it is used as output.
    """

    scales = None

    def __init__(self, embedding: ParallelEmbedding) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list, so that it is no module of this one
        self.group = embedding.group

    @property
    def weight(self) -> Tensor:
        weight = self._embedding[0].weight
        if self.group is None:
            return weight
        # Every rank uses other rows, and its features' gradient is the sum of what all of them have.
        whole = copied(gathered(weight, self.group), self.group)
        return whole.chunk(self.group.size())[self.group.rank()]

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., this rank's part of the vocabulary]."""
        return linear(copied(x, self.group), self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square normalization by weight [dim], computed in float32 as Meta's code does."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(dim, init=ones, decays=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim], in the type of `x`."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., dim] normalized, times weight [dim], in the type of `x`."""
    if torch.is_grad_enabled():
        return _RMSNormFunction.apply(x, weight, eps)
    if device_type(x) == "cuda":
        return fused_rms_norm(x, cast(weight, x.dtype), eps)[0]
    if x.dtype in (torch.float32, torch.float64):  # fewer calls; of others it rounds once, Meta twice
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight.to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, inverse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The normed [..., dim] in the type of `x`, and 1 / rms [..., 1] in float32, which may be known."""
    if device_type(x) == "cuda":
        return fused_rms_norm(x, cast(weight, x.dtype), eps)
    wide = x.float()
    if inverse is None:
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype) * weight.to(x.dtype), inverse


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `_rms_norm` gives, from one kernel of a GPU, which rounds once."""
    return torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)


def _rms_norm_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, weight_needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and weight from that of the output, all [..., dim]."""
    if device_type(x) == "cuda":
        d_x, d_weight = torch.ops.aten._fused_rms_norm_backward(
            d_y, x, weight.shape, inverse, cast(weight, x.dtype), [True, weight_needs_grad]
        )
        return d_x, d_weight.to(weight.dtype) if weight_needs_grad else None
    wide = d_y.float()
    normed = x.float() * inverse
    d_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype) if weight_needs_grad else None
    d_normed = wide * weight.float()
    # d x = (d n - n * mean(d n * n)) / rms
    projection = (d_normed * normed).mean(-1, keepdim=True)
    d_x = d_normed.sub_(normed.mul_(projection)).mul_(inverse)
    return d_x.to(x.dtype), d_weight


class _RMSNormFunction(torch.autograd.Function):
    """Keeps only its input and 1 / rms for the backward pass; out of single operations it would keep copies of both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        return *_rms_norm_backward(d_outputs[0], x, weight, inverse, ctx.needs_input_grad[1]), None


def normed_linears(x: Tensor, norm: RMSNorm, layers: Sequence[ColumnParallelLinear]) -> tuple[Tensor, ...]:
    """Each layer of norm(x), [T, dim] to one [T, out] for each layer. For training it keeps x, but not norm(x)."""
    if not torch.is_grad_enabled():
        normed = norm(x)
        return tuple(layer(normed) for layer in layers)
    group = layers[0].group
    extra = [matrix for layer in layers for matrix in layer.inputs()]
    masks = [mask for layer in layers for mask in layer.masks()]
    weights, scales = [layer.weight for layer in layers], [layer.scales for layer in layers]
    outputs = _NormedLinearsFunction.apply(x, norm.weight, norm.eps, group, scales, masks, *weights, *extra)
    joined = [copied(product, group) for product in outputs[len(layers) :]]
    if len(joined) < len(extra):
        joined = list(joined[0].split([len(matrix) for matrix in extra], -1))
    products = iter(joined)
    return tuple(layer.finish(y, products) for layer, y in zip(layers, outputs[: len(layers)], strict=True))


class _NormedLinearsFunction(torch.autograd.Function):
    """Computes the norm's output again in the backward pass, and sums the layers' gradients of it in one tensor.

    Under model parallelism that tensor is summed over the group while the weights' gradients are computed. The last
    weights, for each of which there is one of `masks`, are those that every rank has all of: their outputs' gradients
    are complete, so they are added to the sum, not summed themselves. A GPU, whose time they take by their number,
    multiplies them as one matrix if nothing is masked, and their outputs are side by side.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        group: Group | None,
        scales: Sequence[Scales | None],
        masks: Sequence[Tensor | None],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        normed, inverse = _rms_norm(x, norm_weight, eps)
        split = len(weights) - len(masks)
        extra = [cast(weight, x.dtype) for weight in weights[split:]]
        if len(extra) > 1 and device_type(x) == "cuda" and all(mask is None for mask in masks):
            extra, masks = [torch.cat(extra)], [None]
        ctx.save_for_backward(x, norm_weight, inverse, *weights[:split], *extra)
        ctx.eps, ctx.group, ctx.scales, ctx.masks, ctx.weights = eps, group, scales, masks, weights
        ctx.added = [len(weight) for weight in weights[split:]], weights[-1].dtype
        outputs = [product(normed, dense(*matrix, x.dtype)) for matrix in zip(weights[:split], scales, strict=True)]
        outputs += [F.linear(_masked(normed, mask), weight) for mask, weight in zip(masks, extra, strict=True)]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, inverse, *weights = ctx.saved_tensors
        (needs_x, needs_norm), needs_weights = ctx.needs_input_grad[:2], ctx.needs_input_grad[6:]
        split = len(ctx.scales)
        added = list(zip(d_outputs[split:], weights[split:], ctx.masks, strict=True))
        d_normed = summing = None
        if needs_x or needs_norm:  # not so in the first block, where only matrices train
            matrices = list(zip(weights[:split], ctx.scales, strict=True))
            d_normed = product(d_outputs[0], dense(*matrices[0], x.dtype).t())
            for d_y, matrix in zip(d_outputs[1:split], matrices[1:], strict=True):
                add_masked_product(d_normed, d_y, dense(*matrix, x.dtype), None)
            if ctx.group is not None:
                summing = dist.all_reduce(d_normed, group=ctx.group, async_op=True)
        d_weights: list[Tensor | None] = [None] * len(needs_weights)
        if any(needs_weights):
            normed = _rms_norm(x, norm_weight, ctx.eps, inverse)[0]
            for i, (d_y, weight) in enumerate(zip(d_outputs[:split], ctx.weights[:split], strict=True)):
                if needs_weights[i]:
                    d_weights[i] = weight_gradient(weight, d_y, normed)
            if any(needs_weights[split:]):
                sizes, dtype = ctx.added
                products = [(d_y.t() @ _masked(normed, mask)).to(dtype) for d_y, _, mask in added]
                d_weights[split:] = products[0].split(sizes) if len(products) < len(sizes) else products
            del normed
        if d_normed is None:
            return *[None] * 6, *d_weights
        if summing is not None:
            summing.wait()
        for d_y, weight, mask in added:
            add_masked_product(d_normed, d_y, weight, mask)
        d_x, d_norm_weight = _rms_norm_backward(d_normed, x, norm_weight, inverse, needs_norm)
        return d_x, d_norm_weight, None, None, None, None, *d_weights


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, without gradients."""
    return torch.ops.llama_acc.swiglu(gate, up) if use_kernels(gate) else F.silu(gate).mul_(up)


def normed_and_biased(x: Tensor, norm: RMSNorm, layer: RowParallelLinear, factor: float) -> Tensor:
    """norm(x) in a packed half of a block that ends with `added`, whose bias a GPU's kernel adds to x already."""
    if layer.bias is None or not (_adds_in_place(x, layer) and use_kernels(x)):
        return norm(x)
    weight, bias = cast(norm.weight, x.dtype), cast(layer.bias, x.dtype)
    return torch.ops.llama_acc.norm_and_add_(x, weight, norm.eps, bias, factor)


def _adds_in_place(x: Tensor, layer: RowParallelLinear) -> bool:
    """Whether torch's product adds what the layer makes to x: on a GPU, without gradients."""
    is_plain = isinstance(layer, RowParallelLinear) and not (layer.group or layer.is_quantized or layer.extensions)
    return is_plain and device_type(x) == "cuda" and not torch.is_grad_enabled()


def added(x: Tensor, y: Tensor, layer: RowParallelLinear, factor: float, is_packed: bool) -> Tensor:
    """x [T, out] + factor * layer(y [T, in]); on a GPU, without gradients, in one product, where x was. `is_packed`: it
    comes after `normed_and_biased`."""
    own = getattr(layer, "bias", None)  # the layers of several adapters are no `RowParallelLinear`
    bias = None if own is None else cast(own, x.dtype)
    if _adds_in_place(x, layer):
        total = x.addmm_(y, cast(layer.weight, x.dtype).t(), alpha=factor)
        return total if bias is None or (is_packed and use_kernels(x)) else total.add_(bias, alpha=factor)
    if isinstance(layer, RowParallelLinear) and layer.scales and layer.low_ranks() and nf4.has_kernel(y, layer.weight):
        return nf4.add_product_(x, y, layer.weight, layer.scales, layer.low_ranks()[0], factor, bias=bias)
    return x + scaled(layer(y), factor)


def gated_linear(gate: Tensor, up: Tensor, w2: RowParallelLinear) -> Tensor:
    """SwiGLU's second half for training: w2(silu(gate) * up), [T, hidden] to [T, out]."""
    extra = w2.inputs()
    scales, masks = [w2.scales, *(None for _ in extra)], [None, *w2.masks()]
    y, *products = _GatedLinearFunction.apply(gate, up, scales, masks, w2.weight, *extra)
    return w2.finish(summed(y, w2.group), iter([summed(product, w2.group) for product in products]))


class _GatedLinearFunction(torch.autograd.Function):
    """Keeps gate and up for the backward pass and computes silu and product again: half the memory of SwiGLU.

    It multiplies by one or several matrices. On a CPU it goes through the rows in pieces that stay in the cache from
    one operation to the next.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        scales: Sequence[Scales | None],
        masks: Sequence[Tensor | None],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gate, up, *weights)
        ctx.scales, ctx.masks, ctx.weights = scales, masks, weights
        compute_weights = [dense(*matrix, gate.dtype) for matrix in zip(weights, scales, strict=True)]
        outputs = tuple(gate.new_empty(len(gate), len(weight)) for weight in weights)
        for rows in _row_pieces(gate):
            activated = swiglu(gate[rows], up[rows])
            for y, weight, mask in zip(outputs, compute_weights, masks, strict=True):
                product(_masked(activated, None if mask is None else mask[rows]), weight, out=y[rows])
        return outputs

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *weights = ctx.saved_tensors
        compute_weights = [dense(*matrix, gate.dtype) for matrix in zip(weights, ctx.scales, strict=True)]
        pieces = _row_pieces(gate)
        sums = [
            gradient_sum(weight, len(pieces)) if needed else None
            for weight, needed in zip(ctx.weights, ctx.needs_input_grad[4:], strict=True)
        ]
        # Their gradients take the place of gate and up; torch refuses a second backward pass over them.
        for rows in pieces:
            d_product = product(d_outputs[0][rows], compute_weights[0].t())
            masks = [None if mask is None else mask[rows] for mask in ctx.masks]
            for d_y, weight, mask in zip(d_outputs[1:], compute_weights[1:], masks[1:], strict=True):
                add_masked_product(d_product, d_y[rows], weight, mask)
            activated = _swiglu_backward(d_product, gate[rows], up[rows], any(ctx.needs_input_grad[4:]))
            for one, d_y, mask in zip(sums, d_outputs, masks, strict=True):
                if one is not None and activated is not None:
                    add_product(one[0], d_y[rows].t(), _masked(activated, mask), first=not (rows.start or one[1]))
        done = (None if one is None or one[1] else one[0].to(w.dtype) for one, w in zip(sums, weights, strict=True))
        return gate, up, None, None, *done


def _swiglu_backward(d_product: Tensor, gate: Tensor, up: Tensor, needs_product: bool) -> Tensor | None:
    """silu(gate) * up if needed; puts their gradients in the place of gate and up, and uses up that of the product."""
    if use_kernels(gate):
        torch.ops.llama_acc.swiglu_backward_(d_product, gate, up)
        torch.autograd.graph.increment_version([gate, up])
        return d_product
    activated = F.silu(gate)
    product = activated * up if needs_product else None
    torch.ops.aten.silu_backward.grad_input(d_product * up, gate, grad_input=gate)
    torch.mul(activated, d_product, out=up)
    return product


def _row_pieces(x: Tensor) -> list[slice]:
    if device_type(x) != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    count = -(-len(x) // _PIECE_ROWS)
    size = -(-len(x) // max(count, 1))
    return [slice(i * size, (i + 1) * size) for i in range(count)]
