"""LLaMA: a decoder-only transformer with RMSNorm, rotary positions, SwiGLU and grouped-query attention.

It computes on a stream: documents laid end to end, with no padding and no batch dimension. Some of the stream's vectors
may come from images instead of tokens, see `vision`. Its layers may be split over a model-parallel group; it knows
nothing of devices, training precision, activation checkpointing, compilation or data parallelism: those are applied
from outside. Parameter names are those of Meta's checkpoints.

Shapes: T tokens of the stream, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from operator import add
from typing import Any, Literal, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from llama_acc.core.device import device_type
from llama_acc.core.distributed.groups import Parallel, gathered, local_part
from llama_acc.core.errors import UserError, did_you_mean
from llama_acc.core.model.attention import (
    Attend,
    Attention,
    AttentionExtra,
    CachedAttention,
    DocumentAttention,
    KVCache,
    TokensOnGPU,
)
from llama_acc.core.model.config import ModelConfig, RopeScaling
from llama_acc.core.model.layers import (
    ColumnParallelLinear,
    Init,
    Linear,
    ParallelEmbedding,
    RMSNorm,
    RowParallelLinear,
    Spec,
    TiedOutput,
    added,
    gated_linear,
    normed_and_biased,
    normed_linears,
    residual,
    scaled,
    swiglu,
)
from llama_acc.core.model.loss import linear_cross_entropy
from llama_acc.core.model.nf4 import BLOCK, FUSED_ROWS, Scales, fuse, quantize
from llama_acc.core.model.packed import Packed
from llama_acc.core.model.products import reorder_for_rows
from llama_acc.core.model.rotary import rotary_table
from llama_acc.core.model.tuning import FULL, METHODS, Tuning, matrices_of
from llama_acc.core.model.vision import Images, VisionProjector, attach_vision, tower_shapes
from llama_acc.core.model.vision_config import ClipVision

_ALONE = Parallel()
_NO_LABEL = -100
_ADDED = 1 << 24  # no model has so many parameters of its own
_TABLE_ROWS = 16384
SMALL_DIM = 1024
"""Up to this width, a model is small: a second copy of its matrices costs less than it saves."""


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(config.dim, config.hidden_dim, parallel)
        self.w2 = RowParallelLinear(config.hidden_dim, config.dim, parallel, residual(config.n_layers))
        self.w3 = ColumnParallelLinear(config.dim, config.hidden_dim, parallel)
        self.packed: Packed | None = None  # w1 and w3 in one, or None; see `pack_small`
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x [T, dim] and what is added to it; `norm` is applied to x first."""
        if self.packed is None:
            gate, up = normed_linears(x, norm, (self.w1, self.w3))
        else:
            gate, up = self.packed(normed_and_biased(x, norm, self.w2, self.multiplier))
        if torch.is_grad_enabled():
            return x + scaled(gated_linear(gate, up, self.w2), self.multiplier)
        return added(x, swiglu(gate, up), self.w2, self.multiplier, is_packed=self.packed is not None)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, parallel: Parallel, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, parallel, layer)
        self.feed_forward = FeedForward(config, parallel)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, attend: Attend, extra: AttentionExtra | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """[T, dim] to [T, dim], or to [N, dim] if only the rows [N] of it are needed; `extra`: what a tuning method
        adds to its attention."""
        return self.feed_forward(self.attention(x, self.attention_norm, attend, extra, rows), self.ffn_norm)


class Transformer(nn.Module):
    """A LLaMA, without what a tuning method or vision adds: `build_on_meta` adds these."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, parallel: Parallel) -> None:
        super().__init__()
        self.config = config  # its shape, that of the whole model
        self.parallel = parallel  # which part of it is here
        self.dtype = dtype  # type of the activations; parameters may be kept in another
        self.tok_embeddings = ParallelEmbedding(config.vocab_size, config.dim, parallel)
        self.layers = nn.ModuleList(TransformerBlock(config, parallel, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output: ColumnParallelLinear | TiedOutput = (
            TiedOutput(self.tok_embeddings)
            if config.tie_word_embeddings
            else ColumnParallelLinear(config.dim, config.vocab_size, parallel)
        )
        self.vision: VisionProjector | None = None  # how images come into the stream, or None
        self.specs: Mapping[str, Spec] = {}  # what is known of each parameter
        # Calls a block on its arguments; activation checkpointing puts itself here.
        self.run_block: Callable[..., Tensor] = nn.Module.__call__
        # Gives what a tuning method adds to the attention of the block of that number, if it does; from what images
        # give for each document, [documents, vectors, dim], or None.
        self.attention_extra: Callable[[int, Tensor | None], AttentionExtra | None] | None = None
        # Tells a tuning method the stream's documents: the length of each and, in training, its draw.
        self.before_blocks: Callable[[Sequence[int], Sequence[int]], None] | None = None
        self._rotations: Tensor | None = None

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> "Transformer":
        """As torch's, which for a plain tensor on the meta device would import sympy: half a second. A buffer that has
        storage keeps it."""

        def empty(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return tensor
            if type(tensor) in (Tensor, nn.Parameter):
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            return torch.empty_like(tensor, device=device)

        return self._apply(empty, recurse)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        targets: Tensor | None = None,
        loss_scale: float = 1.0,
        caches: Sequence[KVCache] | None = None,
        images: Images | None = None,
        draws: Sequence[int] = (),
        bounds: Tensor | None = None,
        labeled: Tensor | None = None,
        label_weights: Tensor | None = None,
    ) -> Tensor:
        """The stream's last hidden states, or its loss if `targets` are given.

        Args:
            tokens: [T] integers.
            positions: [T], from 0 in each document.
            lengths: length of each document; their sum is T. Attention never crosses a document.
            targets: [T] the token to predict at each place, -100 = none.
            loss_scale: factor on the summed loss.
            caches: the past of each document, which its tokens continue; they are advanced. See `KVCache.beside`.
            images: those of the stream; what `tokens` has at their places does not matter.
            draws: a random number of 32 bits for each document, for what is random in training; none: nothing is.
            bounds: [documents + 1] where documents begin and end, int32; as `labeled`, it follows from the others, and
                saves a GPU's host from waiting.
            labeled: [N] the places that have a target, ascending.
            label_weights: [T] how much each target counts; None: all in full.

        Returns:
            [T, dim] normed hidden states, for `logits`; or the float32 scalar loss_scale * sum of cross-entropies.
        """
        x, added = scaled(self.tok_embeddings(tokens, self.dtype), self.config.embedding_multiplier), None
        if self.vision is not None:
            x, added = self.vision(x, images, len(lengths))
        if self.before_blocks is not None:
            self.before_blocks(lengths, draws)
        starts = [0] * len(lengths) if caches is None else [past.length for past in caches]
        rotations = self._rotations_at(positions, lengths, list(map(add, starts, lengths)))
        cached = None if caches is None else CachedAttention(caches, lengths, rotations)
        attend: Attend = cached or DocumentAttention(lengths, rotations, bounds)
        if targets is not None and labeled is None:
            labeled = (targets != _NO_LABEL).nonzero().squeeze(1)
        # After the last attention, only what has a label is computed. LoRA's dropout is drawn for all of the stream.
        picks_in_block = targets is not None and self.before_blocks is None
        for i, layer in enumerate(self.layers):
            if cached is not None:
                cached.layer = i
            extra = None if self.attention_extra is None else self.attention_extra(i, added)
            rows = labeled if picks_in_block and i == len(self.layers) - 1 else None
            x = self.run_block(layer, x, attend, extra, rows)
        for past, length in zip(caches or (), lengths, strict=False):
            past.length += length
        if targets is None or labeled is None:
            return scaled(self.norm(x), 1.0 / self.config.logits_scaling)
        x = x if picks_in_block else x.index_select(0, labeled)
        x = scaled(self.norm(x), 1.0 / self.config.logits_scaling)
        weights = None if label_weights is None else label_weights[labeled]
        output = self.output
        return linear_cross_entropy(
            x, output.weight, targets[labeled], loss_scale, self.parallel, output.scales, weights
        )

    @property
    def is_quantized(self) -> bool:
        """Whether the matrices of the blocks are."""
        return any(isinstance(module, Linear) and module.is_quantized for module in self.modules())

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., dim] to float32 logits [..., V]."""
        return gathered(self.output(hidden), self.output.group).float()

    def make_room(self, caches: Sequence[KVCache]) -> tuple[int, ...]:
        """Has room for a token more of each sequence, which have some already. Returns the addresses of what `decode`
        reads beside its arguments and the parameters."""
        slots, positions = max(cache.slot for cache in caches) + 1, max(cache.length for cache in caches) + 1
        for layer in caches[0].layers:
            layer.make_room(layer.keys[0, :, :1].transpose(0, 1), slots, positions)
        table = self.rotation_table(positions, self.norm.weight.device)
        return *(layer.keys.data_ptr() for layer in caches[0].layers), table.data_ptr()

    def decode(self, tokens: Tensor, positions: Tensor, slots: Tensor, cache: KVCache) -> Tensor:
        """Logits [T, V] of what follows single tokens [T] at positions of slots of the cache.

        It reads nothing from the host, so that it can be captured as a CUDA graph, and advances no cache. `make_room`
        comes before. What a tuning method adds to attention is in `Attention.prefix`, and images came before.
        """
        assert self._rotations is not None
        x = scaled(self.tok_embeddings(tokens, self.dtype), self.config.embedding_multiplier)
        attend = CachedAttention([cache], [1], self._rotations[positions], TokensOnGPU(slots, positions))
        blocks: Any = self.layers
        for i, layer in enumerate(blocks):
            attend.layer, attend.prefix = i, layer.attention.prefix
            x = self.run_block(layer, x, attend)
        return self.logits(scaled(self.norm(x), 1.0 / self.config.logits_scaling))

    def _rotations_at(self, positions: Tensor, lengths: Sequence[int], ends: Sequence[int]) -> Tensor:
        config, length = self.config, max(ends)
        scaling = config.rope_scaling
        if isinstance(scaling, RopeScaling) and scaling.rope_type == "dynamic" and length > config.max_seq_len:
            # As in transformers, what a cache keeps stays rotated as it was when the text was shorter.
            places = zip(positions.split(list(lengths)), ends, strict=True)
            return torch.cat([rotary_table(config, end, positions.device)[own] for own, end in places])
        return self.rotation_table(length, positions.device)[positions]

    def rotation_table(self, length: int, device: torch.device) -> Tensor:
        """Rotations of the first positions, at least so many."""
        table = self._rotations
        if table is None or table.shape[0] < length or table.device != device:
            # A context may be said to be of millions: the table doubles as it is needed.
            room = max(1 << (length - 1).bit_length(), min(self.config.max_seq_len, _TABLE_ROWS))
            self._rotations = table = rotary_table(self.config, room, device)
        return table


def build_on_meta(config: ModelConfig, dtype: torch.dtype, parallel: Parallel = _ALONE) -> Transformer:
    """This rank's part of a model, without storage, computing in `dtype`; what does not train is frozen."""
    with torch.device("meta"):
        model = Transformer(config, dtype, parallel).requires_grad_(config.tuning.trains_all)
        config.tuning.attach(model)
        model.vision = attach_vision(model, config)
    model.specs = {name: parameter.spec for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]
    return model


Part = Literal["llama", "tuning", "vision", "tower"]


class Description(NamedTuple):
    """A parameter of a model, as the layer says that creates it: its `Spec`, and what follows from where it is."""

    shape: tuple[int, ...]
    split: int | None
    init: Init | None  # None = it always comes from a checkpoint
    trains: bool
    part: Part  # who adds it: the LLaMA itself, the tuning method, vision, or it is of the frozen vision tower
    is_matrix: bool  # it is the matrix of a linear layer of the LLaMA, which NF4 is for


@lru_cache(64)
def _on_meta(config: ModelConfig) -> Transformer:
    """A model to be asked, not computed with. An open vocabulary (-1) has a single token."""
    return build_on_meta(config.with_vocabulary(1), torch.float32)


def added_by_vision(config: ModelConfig) -> set[str]:
    """Names of the parameters that vision adds to the LLaMA, the frozen tower's not among them."""
    return _on_meta(config).specs.keys() - _on_meta(replace(config, vision=None)).specs.keys()


@lru_cache(64)
def describe(config: ModelConfig) -> Mapping[str, Description]:
    """Every parameter of a model by its name, which is that in Meta's and LLaMA2-Accessory's checkpoints.

    Where the vocabulary is open (-1), it is described with one of a single token.
    """
    model, base, visual = _on_meta(config), _on_meta(config.base()).specs, added_by_vision(config)
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    found: dict[str, Description] = {}
    for name, parameter in model.named_parameters():
        part: Part = "llama" if name in base else "vision" if name in visual else "tuning"
        shape, split, init, _ = model.specs[name]
        found[name] = Description(shape, split, init, parameter.requires_grad, part, name in matrices)
    towers = tower_shapes(config.vision)
    return found | {name: Description(shape, None, None, False, "tower", False) for name, shape in towers.items()}


def shapes_of(config: ModelConfig, *parts: Part) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of a model's parameters, of all or of these parts."""
    return {name: one.shape for name, one in describe(config).items() if not parts or one.part in parts}


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(shape) for shape in shapes_of(config).values())


@cache
def _known(methods: tuple[type[Tuning], ...]) -> Mapping[str, Description]:
    """The parameters of a small model with each of these methods: all that there are, of one block."""
    config = ModelConfig(dim=8, n_layers=1, n_heads=2, vocab_size=8, multiple_of=8)
    models = [replace(config, tuning=method().with_num_layers(1)) for method in methods]
    return {name: one for model in models for name, one in describe(model).items()}


def _find(name: str) -> Description | None:
    """What is known of a parameter, or of its training state `exp_avg.NAME`, whatever the model's size and method."""
    known, name = _known(tuple(METHODS.values())), re.sub(r"\blayers\.\d+\.", "layers.0.", name)
    return known.get(name) or known.get(name.partition(".")[2])


def split_dimension(name: str) -> int | None:
    """The dimension in which model parallelism splits a parameter of that name; None = every rank has all of it."""
    one = _find(name)
    return None if one is None else one.split


def is_matrix(name: str) -> bool:
    """Whether a parameter of that name is a matrix of a block or the output matrix, which NF4 is for."""
    one = _find(name)
    return one is not None and one.is_matrix


def quantizable(config: ModelConfig, skip: Sequence[str] = ()) -> list[str]:
    """Names of the matrices that NF4 is for: those of the blocks and the output matrix, less those to skip.

    `skip` has names, or parts of names between dots: `output`, `wv`, `layers.31`, `layers.31.feed_forward.w2`.
    """
    names = [name.removesuffix(".weight") for name, one in describe(config.base()).items() if one.is_matrix]
    for wanted in skip:
        if not any(is_within(wanted, name) for name in names):
            words = {part for name in names for part in name.split(".") if not part.isdigit()} - {"layers"}
            known = [*sorted(words), *(f"layers.{layer}" for layer in range(config.n_layers))]
            hint = did_you_mean(wanted, known) or "skip output, a matrix as wv or w2, or a block as layers.0"
            raise UserError(f"there is no matrix '{wanted}' to be left out of NF4", hint)
    return [f"{name}.weight" for name in names if not any(is_within(wanted, name) for wanted in skip)]


def is_within(part: str, name: str) -> bool:
    """Whether it is what stands between some dots of a name: `layers.3` is in `layers.3.attention.wv`."""
    return f".{part}." in f".{name}."


def freeze_untrained(model: Transformer, dtype: torch.dtype | None = None) -> None:
    """Keeps what does not train in `dtype`; None: in the type of the activations. Call it on meta."""
    for name, parameter in list(model.named_parameters()):
        if not parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(parameter.detach().to(dtype or model.dtype), False))


def quantization_notes(config: ModelConfig, skip: Sequence[str] | None, size: int) -> list[str]:
    """What to know of NF4 at a model-parallel size: matrices whose parts are not cut into the blocks of the whole one.

    `skip`: matrices that are not quantized; None: none is.
    """
    cut = {}
    if size == 1 or skip is None:
        return []
    for name in quantizable(config, skip):
        (rows, columns), split = describe(config)[name][:2]
        # A part is whole rows, or of each row this many values.
        if split is not None and (columns // size if split else rows // size * columns) % BLOCK:
            cut[name.split(".")[-2]] = f"{rows // (1 if split else size)} x {columns // (size if split else 1)}"
    if not cut:
        return []
    parts = ", ".join(f"{name} ({part})" for name, part in cut.items())
    return [
        f"NF4 at model-parallel size {size}: parts of {parts} are not the whole matrix's blocks of {BLOCK} values: "
        "logits and losses differ from those at size 1 more than by rounding"
    ]


def quantize_on_meta(model: Transformer, skip: Sequence[str] = ()) -> None:
    """Makes room for matrices in NF4 in place of what they are, but for those to `skip`; call it on meta."""
    for name in quantizable(model.config, skip):
        module = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module, Linear)
        module.to_nf4_meta()


def store_quantized(model: Transformer, name: str, packed: Tensor, scales: Scales) -> None:
    """Puts a quantized matrix, this model-parallel rank's part of a parameter, into the storage the model has for it.

    The model was on meta when `quantize_on_meta` was called.
    """
    local, owner = local_part(model.get_parameter(name)), model.get_submodule(name.rpartition(".")[0])
    assert isinstance(owner, Linear)
    assert owner.scales is not None
    # Each data-parallel rank has some rows of the packed values, and all scales: these go across the rows.
    local.tensor.copy_(packed[local.rows])
    for target, values in zip(owner.scales, scales, strict=True):
        target.copy_(values)


def pack_small(model: Transformer) -> None:
    """Joins the matrices that share an input, for generation with a small model or on a GPU: fewer calls for a token.

    In a larger model on a CPU the time is that of reading the weights, and packing would only copy them. On a GPU a
    block's are copied at a time, and the first ones freed; pairs of matrices not quantized are merged into them.
    """
    config, on_gpu = model.config, device_type(model.norm.weight) == "cuda"
    is_known = on_gpu or (config.tuning == FULL and config.dim <= SMALL_DIM)
    if not is_known or model.parallel.model_size > 1:
        return
    for layer in matrices_of(model) if on_gpu else []:
        pair = layer.extensions[0].low_rank() if len(layer.extensions) == 1 and not layer.is_quantized else None
        if pair is not None:
            merged = layer.weight.float().addmm(pair[1].float(), pair[0].float(), alpha=pair[2]).to(layer.weight.dtype)
            layer.weight, layer.extensions = nn.Parameter(merged.detach(), requires_grad=False), []
    for i, block in enumerate(model.layers):
        assert isinstance(block, TransformerBlock)
        attention, feed_forward = block.attention, block.feed_forward
        # Images add to the prefix of each document.
        if on_gpu and model.attention_extra is not None and not isinstance(config.vision, ClipVision):
            extra = model.attention_extra(i, None)
            attention.prefix = () if extra is None else extra.kept(attention)
        groups = [attention.wq, attention.wk, attention.wv], [feed_forward.w1, feed_forward.w3]
        attention.packed, feed_forward.packed = (Packed(group) if Packed.takes(group) else None for group in groups)
    if model.norm.weight.is_cuda:
        torch.cuda.empty_cache()  # where the matrices were, there are pieces too small for joined ones


def reorder_small(model: Transformer) -> None:
    """Keeps a small model's matrices a second time as a CPU reads them fastest for several rows, for generation of
    several replies together. They must not change any more."""
    if model.config.dim > SMALL_DIM:
        return
    blocks: Any = model.layers
    parts = [part for block in blocks for part in (block.attention, block.feed_forward)]
    packed = [part.packed for part in parts if part.packed is not None]
    done = {id(layer) for one in packed for layer in one.layers}
    single = [one for one in model.layers.modules() if isinstance(one, Linear) and id(one) not in done]
    weights = [one.weight for one in (*packed, *single, model.output)]
    reorder_for_rows({weight.data_ptr(): weight for weight in weights}.values())


def fuse_quantized(model: Transformer, room: int, rows: int = 1) -> bool:
    """Keeps the quantized matrices a second time as a CPU multiplies few rows of bf16 with them without writing them
    out, three times as fast, if both have room in so many bytes. They must not change any more.

    For a pass of more rows, that of the output matrix alone, which gets few in any case; then it returns False: the
    others are left for a later pass, so that the first token need not wait for them.
    """
    layers = [
        layer for layer in (model.output, *matrices_of(model)) if isinstance(layer, Linear) and layer.is_quantized
    ]
    on_cpu = model.dtype == torch.bfloat16 and device_type(model.norm.weight) == "cpu"
    if not on_cpu or 2 * sum(layer.weight.nbytes for layer in layers) >= room:
        return True
    # Of a longer pass, several adapters have rows of their own, and what is added to attention may have few.
    is_plain = type(model) is Transformer and model.attention_extra is None
    needs_all = rows <= FUSED_ROWS or not is_plain
    for layer in layers if needs_all else [layer for layer in layers if layer is model.output]:
        assert layer.scales is not None
        fuse(layer.weight, layer.scales)
    return needs_all


def initialize(model: Transformer, seed: int, only: Container[str] | None = None) -> None:
    """Fills parameters, those of the names in `only`, with their values at the start, as the layer says that creates
    them. They have storage.

    Each parameter has its own generator, made from the seed and its place in the LLaMA or its name, so a parameter's
    values do not depend on the others, nor on how the model is split, nor on what is added to it.
    """
    places = {name: place for place, name in enumerate(describe(model.config.base()))}
    parallel = model.parallel
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only is not None and name not in only:
                continue
            shape, split, init, _ = model.specs[name]
            place = places.get(name, _ADDED + crc32(name.encode()))
            whole = torch.empty(shape)
            init(whole, torch.Generator().manual_seed(seed * 1_000_003 + place))
            own = whole if split is None else whole.chunk(parallel.model_size, split)[parallel.model_rank]
            local = local_part(parameter)
            if local.tensor.is_floating_point():
                local.tensor.copy_(own[local.rows])
            else:
                device = local.tensor.device
                packed = quantize(lambda start, rows: rows.copy_(own[start:][: len(rows)]), tuple(own.shape), device)  # noqa: B023
                store_quantized(model, name, *packed)
