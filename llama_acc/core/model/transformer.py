"""LLaMA: a decoder-only transformer with RMSNorm, rotary positions, SwiGLU and grouped-query attention.

It computes on a stream: documents laid end to end, with no padding and no batch dimension. Some of the stream's vectors
may come from images instead of tokens, see `vision`. Its layers may be split over a model-parallel group; it knows
nothing of devices, training precision, activation checkpointing, compilation or data
parallelism: those are applied from outside. Parameter names are those of Meta's checkpoints.

Shapes: T tokens of the stream, V vocabulary.
"""

import math
from collections.abc import Callable, Container, Sequence
from functools import partial
from operator import add

import torch
from torch import Tensor, nn

from llama_acc.core.distributed.groups import Parallel, gathered, local_part
from llama_acc.core.model.attention import (
    Attend,
    Attention,
    CachedAttention,
    DocumentAttention,
    KVCache,
    Prefix,
)
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.cross_entropy import linear_cross_entropy
from llama_acc.core.model.linear import (
    ColumnParallelLinear,
    Linear,
    Packed,
    ParallelEmbedding,
    RowParallelLinear,
)
from llama_acc.core.model.nf4 import Scales, quantise
from llama_acc.core.model.norm import RMSNorm, normed_linears
from llama_acc.core.model.rotary import rotary_table
from llama_acc.core.model.sharding import local_shape, split_dimension
from llama_acc.core.model.swiglu import gated_linear
from llama_acc.core.model.tuning import FULL
from llama_acc.core.model.vision import Images, add_sight

_ALONE = Parallel()
_ADDED = 500_000  # no model has so many parameters of its own
_ONES = ("norm.weight", "norm1.weight", "norm2.weight", "qformer_proj.1.weight", "prefix_new_gate")
_ZEROS = (".bias", ".lora_b.weight", "prefix_gate")
_TABLE_ROWS = 16384


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x).

    Attributes:
        packed: w1 and w3 in one, or None; see `pack_small`.
    """

    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(config.dim, config.hidden_dim, parallel, config.tuning.on("w1"))
        self.w2 = RowParallelLinear(config.hidden_dim, config.dim, parallel, config.tuning.on("w2"))
        self.w3 = ColumnParallelLinear(config.dim, config.hidden_dim, parallel, config.tuning.on("w3"))
        self.packed: Packed | None = None

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """[T, dim] to [T, dim]; `norm` is applied to x first."""
        gate, up = normed_linears(x, norm, (self.w1, self.w3)) if self.packed is None else self.packed(norm(x))
        return gated_linear(gate, up, self.w2)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        self.attention = Attention(config, parallel)
        self.feed_forward = FeedForward(config, parallel)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, attend: Attend, prefix: Prefix | None = None) -> Tensor:
        """[T, dim] to [T, dim]."""
        x = x + self.attention(x, self.attention_norm, attend, prefix)
        return x + self.feed_forward(x, self.ffn_norm)


class Transformer(nn.Module):
    """A LLaMA. Made on the meta device it costs nothing until its parameters are filled.

    Attributes:
        config: its shape, that of the whole model.
        parallel: which part of it is here.
        dtype: type of the activations; parameters may be kept in another.
        sight: how images come into the stream, or None.
        run_block: calls a block on its arguments; activation checkpointing puts itself here.
        prefix: see `tuning`; this and the next two are there if the method has them.
        prefix_gate: of this rank's heads.
        prefix_new_gate: the same on every rank.
    """

    prefix: nn.Parameter
    prefix_gate: nn.Parameter
    prefix_new_gate: nn.Parameter

    def __init__(self, config: ModelConfig, dtype: torch.dtype, parallel: Parallel) -> None:
        super().__init__()
        self.config = config
        self.parallel = parallel
        self.dtype = dtype
        self.tok_embeddings = ParallelEmbedding(config.vocab_size, config.dim, parallel)
        self.layers = nn.ModuleList(TransformerBlock(config, parallel) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = ColumnParallelLinear(config.dim, config.vocab_size, parallel)
        for name, shape in config.tuning.added_to_model(config.dim, config.n_heads).items():
            self.register_parameter(name, nn.Parameter(torch.empty(local_shape(name, shape, parallel.model_size))))
        self.sight = add_sight(self, config)
        self.run_block: Callable[[nn.Module, Tensor, Attend, Prefix | None], Tensor] = _call
        self._rotations: Tensor | None = None

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        targets: Tensor | None = None,
        loss_scale: float = 1.0,
        caches: Sequence[KVCache] | None = None,
        images: Images | None = None,
    ) -> Tensor:
        """The stream's last hidden states, or its loss if `targets` are given.

        Args:
            tokens: [T] integers.
            positions: [T], from 0 in each document.
            lengths: length of each document; their sum is T. Attention never crosses a document.
            targets: [T] the token to predict at each place, -100 = none.
            loss_scale: factor on the summed loss.
            caches: the past of each document, which its tokens continue; they are advanced.
            images: those of the stream; what `tokens` has at their places does not matter.

        Returns:
            [T, dim] normed hidden states, for `logits`; or the float32 scalar loss_scale * sum of cross-entropies.
        """
        x, added = self.tok_embeddings(tokens, self.dtype), None
        if self.sight is not None:
            x, added = self.sight(x, images, len(lengths))
        starts = [0] * len(lengths) if caches is None else [cache.length for cache in caches]
        rotations = self._rotations_at(positions, max(map(add, starts, lengths)))
        documents = DocumentAttention(lengths, rotations)
        for i, layer in enumerate(self.layers):
            attend: Attend = documents
            if caches is not None:
                attend = CachedAttention([cache.layers[i] for cache in caches], starts, lengths, rotations)
            x = self.run_block(layer, x, attend, self._prefix_of(i, added))
        if caches is not None:
            for cache, length in zip(caches, lengths, strict=True):
                cache.length += length
        x = self.norm(x)
        if targets is None:
            return x
        output = self.output
        return linear_cross_entropy(x, output.weight, targets, loss_scale, self.parallel, output.scales)

    @property
    def is_quantised(self) -> bool:
        """Whether the matrices of the blocks are."""
        return any(isinstance(module, Linear) and module.is_quantised for module in self.modules())

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., dim] to float32 logits [..., V]."""
        return gathered(self.output(hidden), self.output.group).float()

    def _prefix_of(self, layer: int, added: Tensor | None) -> Prefix | None:
        """What zero-init attention has in a block; `added`: [documents, prefix_len, dim], to what it has of its own."""
        tuning = self.config.tuning
        place = layer - self.config.n_layers + tuning.prefix_layers
        if not tuning.what.prefix or place < 0:
            return None
        new_gate = self.prefix_new_gate[place] if tuning.prefix_new_gate else None
        vectors = self.prefix[place, 0] if added is None else self.prefix[place].to(added.dtype) + added
        return Prefix(vectors, self.prefix_gate[place], new_gate)

    def _rotations_at(self, positions: Tensor, length: int) -> Tensor:
        table = self._rotations
        if table is None or table.shape[0] < length or table.device != positions.device:
            config = self.config
            # A context may be said to be of millions: the table doubles as it is needed.
            room = max(1 << (length - 1).bit_length(), min(config.max_seq_len, _TABLE_ROWS))
            table = rotary_table(config.head_dim, room, config.rope_theta, config.rope_scaling, positions.device)
            self._rotations = table
        return table[positions]


def _call(block: nn.Module, x: Tensor, attend: Attend, prefix: Prefix | None) -> Tensor:
    return block(x, attend, prefix)


def build_on_meta(config: ModelConfig, dtype: torch.dtype, parallel: Parallel = _ALONE) -> Transformer:
    """This rank's part of a model, without storage, computing in `dtype`."""
    with torch.device("meta"):
        return Transformer(config, dtype, parallel)


def freeze_untrained(model: Transformer) -> None:
    """Keeps what the tuning method does not train out of it, in the type of the activations. Call it on meta."""
    for name, parameter in list(model.named_parameters()):
        if model.config.trains(name):
            continue
        owner, _, leaf = name.rpartition(".")
        frozen = nn.Parameter(parameter.detach().to(model.dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, frozen)


def quantise_on_meta(model: Transformer, skip: Sequence[str] = ()) -> None:
    """Makes room for matrices in NF4 in place of what they are; call it on meta, before loading.

    Args:
        model: what is quantised of it is not trained.
        skip: matrices to leave as they are; see `ModelConfig.quantisable`.

    Raises:
        UserError: a matrix that cannot be.
    """
    for name in model.config.quantisable(skip):
        module = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module, Linear)
        module.make_room_for_nf4()


def store_quantised(model: Transformer, name: str, packed: Tensor, scales: Scales) -> None:
    """Puts a quantised matrix, this model-parallel rank's part of a parameter, into the storage the model has for it.

    Args:
        model: it was on meta when `quantise_on_meta` was called, and has storage now.
        name: the parameter's.
        packed: its values.
        scales: its scales.
    """
    local, owner = local_part(model.get_parameter(name)), model.get_submodule(name.rpartition(".")[0])
    assert isinstance(owner, Linear)
    assert owner.scales is not None
    # Each data-parallel rank has some rows of the packed values, and all scales: these go across the rows.
    local.tensor.copy_(packed[local.rows])
    for target, values in zip(owner.scales, scales, strict=True):
        target.copy_(values)


def pack_small(model: Transformer) -> None:
    """Joins the matrices that share an input, for generation with a small model: fewer calls for each token.

    In a larger model the time is that of reading the weights, and packing would only copy them.
    """
    if model.config.dim > 1024 or model.config.tuning != FULL or model.is_quantised:
        return
    for block in model.layers:
        assert isinstance(block, TransformerBlock)
        attention, feed_forward = block.attention, block.feed_forward
        attention.packed = Packed([attention.wq, attention.wk, attention.wv])
        feed_forward.packed = Packed([feed_forward.w1, feed_forward.w3])


def initialise(model: Transformer, seed: int, only: Container[str] | None = None) -> None:
    """Fills every parameter with random values: normal with standard deviation 0.02, ones for norms.

    The matrices that write into the residual stream are scaled by 1/sqrt(2 * n_layers) (GPT-2's rule), so that its
    variance does not grow with depth. What vision adds is as in LLaMA2-Accessory. Each parameter has its own generator,
    made from (seed, place), so a parameter's values do not depend on the others, nor on how the model is split, nor on
    what a tuning method adds.

    Args:
        model: its parameters have storage.
        seed: of the generators.
        only: names of those to fill; None = all.
    """
    residual = (2 * model.config.n_layers) ** -0.5
    shapes, parts = model.config.parameter_shapes(), model.config.vision_parts
    base = model.config.base().parameter_shapes()
    places = {name: place for place, name in enumerate(name for name, _ in model.named_parameters() if name in base)}
    places |= {name: _ADDED + place for place, name in enumerate(name for name in shapes if name not in base)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only is not None and name not in only:
                continue
            local = local_part(parameter)
            if name.endswith(_ONES):
                local.tensor.fill_(1.0)
                continue
            if name.endswith(_ZEROS):
                local.tensor.zero_()
                continue
            whole = torch.empty(shapes[name])
            generator = torch.Generator().manual_seed(seed * 1_000_003 + places[name])
            if name in parts:
                _fill_part(name, whole, generator)
            else:
                _fill_matrix(name, whole, generator, residual)
            own = own_part(name, whole, model.parallel)
            if local.tensor.is_floating_point():
                local.tensor.copy_(own[local.rows])
            else:
                device = local.tensor.device
                store_quantised(model, name, *quantise(partial(_rows, own, device), tuple(own.shape), device))


def _fill_part(name: str, whole: Tensor, generator: torch.Generator) -> None:
    """What vision adds: by torch's own rule for linear layers and convolutions, or as LLaMA2-Accessory has it."""
    if name.endswith(".weight"):
        bound = math.prod(whole.shape[1:]) ** -0.5
        whole.uniform_(-bound, bound, generator=generator)
    elif name in ("start_img", "end_img"):
        whole.uniform_(generator=generator)
    else:
        whole.normal_(0.0, 1.0 if name == "visual_query" else 0.02, generator=generator)


def _fill_matrix(name: str, whole: Tensor, generator: torch.Generator, residual: float) -> None:
    if name.endswith(".lora_a.weight"):
        nn.init.trunc_normal_(whole, std=0.02, generator=generator)
    elif name == "prefix":
        whole.normal_(generator=generator)
    else:
        whole.normal_(0.0, 0.02 * (residual if name.endswith(("wo.weight", "w2.weight")) else 1.0), generator=generator)


def _rows(matrix: Tensor, device: torch.device, start: int, stop: int) -> Tensor:
    return matrix[start:stop].to(device)


def own_part(name: str, whole: Tensor, parallel: Parallel) -> Tensor:
    """This model-parallel rank's part of a whole parameter."""
    dimension = split_dimension(name)
    return whole if dimension is None else whole.chunk(parallel.model_size, dimension)[parallel.model_rank]
