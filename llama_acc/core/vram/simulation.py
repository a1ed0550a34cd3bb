"""A training step and a generation as the program does them, on tensors without values: nothing is computed.

Model, optimizer, step and cache are those of `train` and `inference`, run under torch's FakeTensorMode while the
tracker watches; the other ranks are torch's fake process group. A CPU stands for a GPU, too: the program is told so
(see `device.simulating`), and attention is the GPU's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from llama_acc.core.data.batches import MicroBatch
from llama_acc.core.device import simulating
from llama_acc.core.distributed.groups import Parallel, simulated
from llama_acc.core.generate.load import model_on_meta
from llama_acc.core.model import nf4
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.config import ModelConfig
from llama_acc.core.model.transformer import Transformer, pack_small
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.plan import StepSettings
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import Assembled, assemble
from llama_acc.core.vram.kernels import gpu_attention
from llama_acc.core.vram.seeing import tower_of, with_images
from llama_acc.core.vram.tracker import MemoryTracker, Moment

CPU = torch.device("cpu")
_GPU_ROUNDING = 512  # bytes; what CUDA's caching allocator rounds up to


@dataclass(frozen=True)
class Setup:
    """What is to be predicted: one rank of a run.

    Attributes:
        recipe: how it trains. Compilation is left out of account: compiled blocks take no more.
        config: the model's shape, with what the tuning method adds.
        lengths: tokens of each document of the largest micro-batch.
        labels: how many of its tokens are trained; None = all.
        micro_batches: of a rank in an optimizer step; from 2 on the step is the same.
        world_size: number of processes.
        rank: which of them. Rank 0 has most: it is the first to get an odd row.
        device_type: "cuda" or "cpu".
    """

    recipe: Recipe
    config: ModelConfig
    lengths: tuple[int, ...]
    labels: int | None = None
    micro_batches: int = 1
    world_size: int = 1
    rank: int = 0
    device_type: str = "cuda"

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return sum(self.lengths)


def empty_batch(lengths: Sequence[int], labels: int | None = None) -> MicroBatch:
    """A micro-batch of documents of these lengths, whose tokens are all the same; the first `labels` are trained."""
    total = sum(lengths)
    targets = np.zeros(total, np.int64)
    targets[total if labels is None else labels :] = -100
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    return MicroBatch(np.zeros(total, np.int64), targets, positions, list(lengths))


def simulate_training(setup: Setup) -> MemoryTracker:
    """One optimizer step of a run that has done some already."""
    tracker = _tracker(setup)
    with _rank(setup) as parallel, ExitStack() as stack:

        def materialize(model: Transformer) -> None:
            stack.enter_context(watched(tracker, setup.device_type))
            model.to_empty(device=CPU)

        # On a GPU's place, FSDP's streams would be CUDA's.
        parts = assemble(setup.config, StepSettings.of(setup.recipe), parallel, "cpu", materialize)
        parts.optimizer.make_state()
        _label_lasting(tracker, parts)
        _follow_blocks(tracker, parts.model)
        stack.enter_context(tower_of(parts.model, tracker))
        batch = with_images(empty_batch(setup.lengths, setup.labels), parts.model)
        _simulate_step(tracker, parts, [batch] * min(setup.micro_batches, 2))
    return tracker


def simulate_generation(setup: Setup, length: int) -> MemoryTracker:
    """A conversation of `length` tokens: half of them as a prompt, the others one by one."""
    tracker = _tracker(setup)
    with _rank(setup) as parallel, torch.inference_mode(), ExitStack() as stack:
        model = generating_model(setup, parallel)
        with watched(tracker, setup.device_type):
            model.to_empty(device=CPU)
            if parallel.model_size == 1:
                pack_small(model)
            _label_weights(tracker, model)
            stack.enter_context(tower_of(model, tracker))
            tracker.reset_peak()
            cache = KVCache(setup.config.n_layers)
            for span in _feeds(length):
                tracker.moment = Moment("prompt" if len(span) > 1 else "generation")
                feed(model, cache, span, CPU)
                kept = [(layer.keys, layer.values) for layer in cache.layers]
                tracker.label((tensor for pair in kept for tensor in pair if tensor is not None), "KV cache")
    return tracker


def feed(model: Transformer, cache: KVCache, span: range, device: torch.device) -> None:
    """Computes what follows the tokens at some positions of a conversation, as `inference` does."""
    cache.length = span.start
    positions = torch.arange(span.start, span.stop, device=device)
    hidden = model(torch.zeros_like(positions), positions, [len(span)], caches=[cache])
    model.logits(hidden[-1:])


def generating_model(setup: Setup, parallel: Parallel) -> Transformer:
    """The model of a run as `inference` makes it, on the meta device."""
    tuning = setup.recipe.tuning
    skip = tuning.quantize_skip if tuning.quantize == "nf4" else None
    dtype = torch.bfloat16 if setup.recipe.train.precision == "bf16" else torch.float32
    return model_on_meta(setup.config, dtype, parallel, skip)


def _feeds(length: int) -> Iterator[range]:
    """Spans of positions: the prompt, and those single ones at which the cache is full and grows, and the last."""
    start = max(length // 2, 1)
    yield range(start)
    while start < length:
        yield range(start, start + 1)
        start = min(max(256, 1 << start.bit_length()), length - 1) if start < length - 1 else length


def _tracker(setup: Setup) -> MemoryTracker:
    labels = setup.tokens if setup.labels is None else setup.labels
    return MemoryTracker(1 if setup.device_type == "cpu" else _GPU_ROUNDING, labels)


@contextmanager
def _rank(setup: Setup) -> Iterator[Parallel]:
    alone = setup.world_size == 1
    model_size = setup.recipe.parallel.model_parallel_size
    with nullcontext(Parallel()) if alone else simulated(setup.rank, setup.world_size, model_size) as parallel:
        yield parallel


@contextmanager
def watched(tracker: MemoryTracker, device_type: str) -> Iterator[None]:
    """Lets operations make tensors that have a shape and no values, watched, as on `device_type`."""
    nf4.prepare(CPU)  # it keeps its tables: they have to have values
    functions: Any = torch.nn.functional
    attention = functions.scaled_dot_product_attention
    with simulating(device_type), FakeTensorMode(allow_non_fake_inputs=True), tracker:
        if device_type != "cpu":
            functions.scaled_dot_product_attention = gpu_attention
        try:
            yield
        finally:
            functions.scaled_dot_product_attention = attention


def _label_lasting(tracker: MemoryTracker, parts: Assembled) -> None:
    _label_weights(tracker, parts.model)
    tracker.label((value for _, _, value in parts.optimizer.state_tensors()), "optimizer")


def _label_weights(tracker: MemoryTracker, model: nn.Module) -> None:
    for parameter in model.parameters():
        tracker.label([parameter], "trainable masters" if parameter.requires_grad else "weights")
    tracker.label(model.buffers(), "quantisation state")


def _simulate_step(tracker: MemoryTracker, parts: Assembled, batches: Sequence[MicroBatch]) -> None:
    tracker.moment = Moment("forward")
    tracker.reset_peak()
    with _follow_backward(tracker):
        train_step(
            parts.model,
            parts.optimizer,
            parts.data_parallel,
            batches,
            sum(len(batch.tokens) for batch in batches),
            0.0,
            CPU,
            before_update=lambda: tracker.at(Moment("update")),
        )
    tracker.ended("update")


@contextmanager
def _follow_backward(tracker: MemoryTracker) -> Iterator[None]:
    backward: Callable[[Tensor], None] = Tensor.backward

    def followed(loss: Tensor) -> None:
        tracker.ended("forward")
        tracker.at(Moment("backward"))
        backward(loss)
        tracker.ended("backward")
        tracker.at(Moment("forward"))

    Tensor.backward = followed  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Tensor.backward = backward  # type: ignore[assignment,method-assign]


def _follow_blocks(tracker: MemoryTracker, model: Transformer) -> None:
    """Keeps the tracker's moment where the model is: in which block, forward, backward or computing again."""
    run_block, last = model.run_block, len(model.layers) - 1
    numbers = {block: number for number, block in enumerate(model.layers)}

    def run(block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        number = numbers[block]
        if x.requires_grad:
            x.register_hook(lambda _: tracker.at(Moment("backward", number - 1)))
        y = run_block(block, x, *rest)
        if y.requires_grad:
            y.register_hook(lambda _: tracker.at(Moment("backward", number)))
        tracker.at(Moment("loss" if number == last else "forward"))
        return y

    def followed(forward: Callable[..., Tensor], number: int) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            before = tracker.moment
            tracker.at(Moment("recompute" if before.phase == "backward" else "forward", number))
            try:
                return forward(*args, **kwargs)
            finally:  # recomputing ends early, by an exception
                tracker.at(before)

        return call

    model.run_block = run
    for block, number in numbers.items():
        block.forward = followed(block.forward, number)
