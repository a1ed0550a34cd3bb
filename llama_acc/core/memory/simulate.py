"""A training step and a generation as the program does them, on tensors without values: nothing is computed.

Model, optimizer, step and cache are the program's own, run under torch's FakeTensorMode while the tracker watches; the
other ranks are torch's fake process group. A CPU stands for a GPU, too: the program is told so (see
`device.simulating`), and attention is the GPU's.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from llama_acc.core.checkpoint.streaming import BlockStream
from llama_acc.core.data.batches import MicroBatch
from llama_acc.core.device import simulating
from llama_acc.core.distributed.groups import Parallel, simulated
from llama_acc.core.generate.load import model_for_generation
from llama_acc.core.memory.allocator import ROUNDING
from llama_acc.core.memory.tracker import MemoryTracker, Phase, Trace, deepened
from llama_acc.core.memory.workspaces import garbage_kept
from llama_acc.core.model import kernels, layers, nf4
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer, pack_small
from llama_acc.core.model.tuning.adapter import Adapter
from llama_acc.core.model.vision import tower_shapes
from llama_acc.core.train.plan import StepSettings
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import assemble

CPU = torch.device("cpu")
_aten = torch.ops.aten
_ENDS = 4  # blocks at the ends of equal ones that may take something else: the first two and the last two


@dataclass(frozen=True)
class Setup:
    """What is to be predicted: one rank of a run."""

    config: ModelConfig  # with what the tuning method adds
    settings: StepSettings  # compilation is left out of account: compiled blocks take no more
    lengths: tuple[int, ...]  # tokens of each document of the largest micro-batch
    labels: int | None = None  # how many of its tokens are trained; None = all
    micro_batches: int = 1  # of a rank in an optimizer step; from 2 on the step is the same
    world_size: int = 1
    rank: int = 0  # 0 has most: it is the first to get an odd row
    device_type: str = "cuda"  # or "cpu"
    samples: tuple[int, int] = (0, 0)  # answers that are generated together between steps, and positions of each

    @property
    def is_quantized(self) -> bool:
        """Whether what does not train is in NF4."""
        return self.settings.quantize_skip is not None

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return sum(self.lengths)


def simulate_training(setup: Setup) -> Trace:
    """One optimizer step of a run that has done some already."""
    return _of_depth(setup, _train)


def simulate_generation(setup: Setup, length: int) -> Trace:
    """A conversation of `length` tokens: half of them as a prompt, the others one by one."""
    return _of_depth(setup, partial(_generate, length=length))


def _of_depth(setup: Setup, simulate: Callable[[Setup], Trace]) -> Trace:
    """What `simulate` finds, of a deep model with few blocks: in the middle, some take what the next ones do."""
    depth, tuning = setup.config.n_layers, setup.config.tuning
    plain = depth - tuning.prefix_layers if isinstance(tuning, Adapter) else depth  # blocks without a prefix
    kinds = [(setup.config.of_blocks([layer]), layer < plain) for layer in range(depth)]
    # A rank of several may gather the next block's parameters early.
    kept, left_out = _without_repeats(kinds, _ENDS + (setup.world_size > 1))
    with garbage_kept():
        trace: Trace | None = simulate(_shallow(setup, kept, plain)) if left_out else None
        for last, extra, period in reversed(left_out):
            trace = trace and deepened(trace, last, extra, period)
        trace = trace or simulate(setup)
    return trace.rounded(1 if setup.device_type == "cpu" else ROUNDING)


def _without_repeats(kinds: Sequence[Hashable], ends: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The blocks that stand in for all, and where some were left out: how many are kept up to there, how many are not,
    and the period in which the kinds of blocks repeat there."""
    kept: list[int] = []
    left_out: list[tuple[int, int, int]] = []
    begin = 0
    while begin < len(kinds):
        few, end = 1, begin + 1
        for period in range(1, (len(kinds) - begin) // 2):
            until = begin + period
            while until < len(kinds) and kinds[until] == kinds[until - period]:
                until += 1
            least = 2 * period + ends
            enough = least + (until - begin - least) % period
            if until - begin > enough:
                few, end = enough, until
                left_out.append((len(kept) + few, end - begin - few, period))
                break
        kept += range(begin, begin + few)
        begin = end
    return kept, left_out


def _shallow(setup: Setup, kept: Sequence[int], plain: int) -> Setup:
    """The same with these blocks alone, of which those from block `plain` on have a prefix."""
    tuning = setup.config.tuning
    if isinstance(tuning, Adapter):
        values = {field.name: getattr(tuning, field.name) for field in fields(Adapter)}
        values["prefix_layers"] = sum(layer >= plain for layer in kept)
        tuning = _ShallowAdapter(**values, stored_layers=tuning.prefix_layers)
    return replace(setup, config=replace(setup.config.of_blocks(kept), tuning=tuning))


@dataclass(frozen=True)
class _ShallowAdapter(Adapter):
    """That of a model with fewer blocks, whose prefix, one parameter of all blocks, is as large as that of all."""

    stored_layers: int = 0

    def attach(self, model: Transformer) -> None:
        """See `Tuning`."""
        Adapter.attach(replace(self, prefix_layers=self.stored_layers), model)
        extra: Any = model.attention_extra
        model.attention_extra = partial(extra.func, model, self)


def empty_batch(lengths: Sequence[int], labels: int | None = None) -> MicroBatch:
    """A micro-batch of documents of these lengths, to train on, whose tokens are all the same; the first `labels` are
    trained."""
    total = sum(lengths)
    targets = np.zeros(total, np.int64)
    targets[total if labels is None else labels :] = -100
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    return MicroBatch(np.zeros(total, np.int64), targets, positions, list(lengths), draws=[0] * len(lengths))


def _train(setup: Setup) -> Trace:
    tracker, slots = _tracker(setup), list[Tensor]()
    with _rank(setup) as parallel, ExitStack() as stack:

        def materialize(model: Transformer) -> None:
            stack.enter_context(watched(tracker, setup.device_type))
            if setup.settings.stream_base:
                slots.extend(BlockStream(model, CPU, None).slots)
            model.to_empty(device=CPU)

        # On a GPU's place, FSDP's streams would be CUDA's.
        parts = assemble(setup.config, setup.settings, parallel, "cpu", materialize)
        parts.optimizer.make_state()
        _label_weights(tracker, parts.model)
        tracker.label(slots, "weights", -1)  # of all blocks
        for _, name, value in parts.optimizer.state_tensors():
            tracker.label([value], "optimizer", _block(name))
        if parts.optimizer.copies is not None:
            for name, value in parts.optimizer.copies.tensors.items():
                tracker.label([value], "weights", _block(name))
        _follow_blocks(tracker, parts.model)
        stack.enter_context(vision_tower(parts.model, tracker))
        batch = add_fake_images(empty_batch(setup.lengths, setup.labels), parts.model)
        batches = [batch] * min(setup.micro_batches, 2)
        stack.enter_context(_follow_backward(tracker))
        tracker.at(Phase("forward"))
        tracker.reset_peak()
        tokens = sum(len(batch.tokens) for batch in batches)
        update = partial(tracker.at, Phase("update"))
        train_step(parts.model, parts.optimizer, parts.data_parallel, batches, tokens, 0.0, CPU, before_update=update)
        tracker.ended("update")
        if setup.samples[0]:
            flops = tracker.flops.copy()  # those of the step
            with torch.no_grad():
                _converse(parts.model, tracker, *setup.samples)
            parts.data_parallel.after_evaluation()
            tracker.flops = flops
    return tracker.trace()


def _generate(setup: Setup, length: int) -> Trace:
    tracker = _tracker(setup)
    with _rank(setup) as parallel, torch.inference_mode(), ExitStack() as stack:
        model = generating_model(setup, parallel)
        with watched(tracker, setup.device_type):
            slots = BlockStream(model, CPU, None).slots if setup.settings.stream_base else []
            model.to_empty(device=CPU)
            if not slots:
                pack_small(model)
            _label_weights(tracker, model)
            tracker.label(slots, "weights", -1)
            stack.enter_context(vision_tower(model, tracker))
            tracker.reset_peak()
            _follow_blocks(tracker, model)
            _converse(model, tracker, 1, length)
    return tracker.trace()


def _converse(model: Transformer, tracker: MemoryTracker, count: int, length: int) -> None:
    """Lets a model have so many conversations at a time, of `length` tokens each."""
    first = KVCache(model.config.n_layers)
    caches = [first.beside(slot) for slot in range(count)]
    for span in _feeds(length):
        tracker.at(Phase("prompt" if len(span) > 1 else "generation"))
        feed(model, caches, span, CPU)
        layers = [layer for cache in caches for layer in cache.layers]
        tracker.label((tensor for layer in layers for tensor in (layer.keys, layer.values)), "KV cache")


def feed(model: Transformer, caches: Sequence[KVCache], span: range, device: torch.device) -> None:
    """Computes what follows the tokens at some positions of conversations, as generation does."""
    for cache in caches:
        cache.length = span.start
    positions = torch.arange(span.start, span.stop, device=device).repeat(len(caches))
    lengths = [len(span)] * len(caches)
    hidden = model(torch.zeros_like(positions), positions, lengths, caches=caches)
    model.logits(hidden[len(span) - 1 :: len(span)])


def generating_model(setup: Setup, parallel: Parallel) -> Transformer:
    """The model of a run as generation makes it, on the meta device."""
    return model_for_generation(setup.config, setup.settings.dtype, parallel, setup.settings.quantize_skip)


def _feeds(length: int) -> Iterator[range]:
    """Spans of positions: the prompt, and those single ones at which the cache is full and grows, and the last."""
    start = max(length // 2, 1)
    yield range(start)
    while start < length:
        yield range(start, start + 1)
        start = min(max(256, 1 << start.bit_length()), length - 1) if start < length - 1 else length


def _tracker(setup: Setup) -> MemoryTracker:
    tower_shapes(setup.config.vision)  # made now, not where its tensors would be followed
    return MemoryTracker()


def _rank(setup: Setup) -> AbstractContextManager[Parallel]:
    if setup.world_size == 1:
        return nullcontext(Parallel())
    return simulated(setup.rank, setup.world_size, setup.settings.model_parallel_size)


@contextmanager
def watched(tracker: MemoryTracker, device_type: str) -> Iterator[None]:
    """Lets operations make tensors that have a shape and no values, watched, as on `device_type`."""
    nf4.prepare(CPU)  # it keeps its tables: they have to have values
    with standing_for(device_type), FakeTensorMode(allow_non_fake_inputs=True), tracker:
        yield


@contextmanager
def standing_for(device_type: str) -> Iterator[None]:
    """Lets the program do what it does on `device_type`, on tensors without values that are somewhere else."""
    with simulating(device_type), ExitStack() as stack:
        if device_type != "cpu":
            stack.enter_context(patch.object(nn.functional, "scaled_dot_product_attention", gpu_attention))
            # Elsewhere it is taken apart into operations before anyone sees it.
            stack.enter_context(patch.object(layers, "fused_rms_norm", _gpu_rms_norm))
            stack.enter_context(patch.object(kernels, "has_triton", lambda: True))
        yield


def _gpu_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _label_weights(tracker: MemoryTracker, model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        tracker.label([parameter], "trainable masters" if parameter.requires_grad else "weights", _block(name))
    for name, buffer in model.named_buffers():
        tracker.label([buffer], "quantization state", _block(name))


def _block(name: str) -> int:
    """The number of the block that a parameter belongs to; -1 = none."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "layers" else -1


def _follow_backward(tracker: MemoryTracker) -> AbstractContextManager[Any]:
    backward = Tensor.backward

    def followed(loss: Tensor) -> None:
        tracker.ended("forward")
        tracker.at(Phase("backward"))
        backward(loss)
        tracker.ended("backward")
        tracker.at(Phase("forward"))

    return patch.object(Tensor, "backward", followed)


def _follow_blocks(tracker: MemoryTracker, model: Transformer) -> None:
    """Keeps the tracker's phase where the model is: in which block, forward, backward or computing again."""
    run_block, last = model.run_block, len(model.layers) - 1
    numbers = {block: number for number, block in enumerate(model.layers)}

    def run(block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        number, around = numbers[block], tracker.phase
        if x.requires_grad:
            x.register_hook(lambda _: tracker.at(Phase("backward", number - 1)))
        tracker.at(Phase(around.name, number))
        y = run_block(block, x, *rest)
        if y.requires_grad:
            y.register_hook(lambda _: tracker.at(Phase("backward", number)))
        tracker.at(Phase("loss") if number == last and around.name == "forward" else around)
        return y

    def followed(forward: Callable[..., Tensor], number: int) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            before = tracker.phase
            if before.name == "backward":
                tracker.at(Phase("recompute", number))
            try:
                return forward(*args, **kwargs)
            finally:  # recomputing ends early, by an exception
                tracker.at(before)

        return call

    model.run_block = run
    for block, number in numbers.items():
        block.forward = followed(block.forward, number)


@contextmanager
def vision_tower(model: Transformer, tracker: MemoryTracker) -> Iterator[None]:
    """Has the frozen vision tower of a multimodal model in memory, on the ranks that compute with it."""
    vision = model.config.vision
    tower = []
    if vision is not None and not vision.trains_encoder and not model.parallel.model_rank:
        tower = [torch.empty(shape, dtype=model.dtype) for shape in tower_shapes(vision).values()]
        tracker.label(tower, "vision tower")
    yield
    del tower


def add_fake_images(batch: MicroBatch, model: Transformer) -> MicroBatch:
    """A micro-batch in which each document that has room for an image has one, if the model is multimodal."""
    vision = model.config.vision
    if vision is None:
        return batch
    owners = [number for number, length in enumerate(batch.lengths) if length > vision.positions + 1]
    begins = np.cumsum([0, *batch.lengths])[owners] + 1
    places = (begins[:, None] + np.arange(vision.positions)).reshape(-1).astype(np.int64)
    inputs = torch.empty((len(owners), *vision.input_shape), dtype=model.dtype)
    return replace(batch, image_documents=tuple(owners), image_places=places, inputs=inputs)


def gpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as it chooses on a GPU: q [1, H, T, D], k and v [1, K, S, D] to [1, H, T, D].

    FlashAttention for half precision without a mask, the memory-efficient kernel where every head has its own keys,
    otherwise single operations.
    """
    if q.dtype in (torch.bfloat16, torch.float16) and attn_mask is None:
        return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if q.shape[1] == k.shape[1]:
        keeps = torch.is_grad_enabled() and q.requires_grad
        fused = _aten._scaled_dot_product_efficient_attention
        return fused(q, k, v, attn_mask, keeps, dropout_p, is_causal, scale=scale)[0]
    plain = _aten._scaled_dot_product_attention_math
    return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
