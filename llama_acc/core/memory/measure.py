"""Steps with real tensors of the real shapes, and the most memory they took. The weights are zeros, of no checkpoint.

On a GPU the figures are those of PyTorch's caching allocator; on a CPU every allocation and every free that torch's CPU
allocator reports to the profiler is added up.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llama_acc.core.device import prepare_cpu
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.memory.simulate import Setup, empty_batch, feed, generating_model
from llama_acc.core.memory.workspaces import peak_cpu_bytes
from llama_acc.core.model import nf4
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.transformer import Transformer, pack_small
from llama_acc.core.train.plan import StepSettings
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import assemble

STEPS = 2
"""Optimizer steps that are run: the second one has the optimizer's state from its start."""


@dataclass(frozen=True)
class Measured:
    """The most memory in use at a time.

    Attributes:
        allocated: bytes of tensors and workspaces.
        reserved: bytes taken from the device; None on a CPU.
    """

    allocated: int
    reserved: int | None


def measure(setup: Setup, device: torch.device, parallel: Parallel | None = None) -> Measured:
    """Runs some optimizer steps as `setup` says, and measures their memory on this rank.

    Raises:
        torch.cuda.OutOfMemoryError: they do not fit.
    """
    return _measured(setup, device, lambda: _run(setup, device, parallel or Parallel()))


def measure_generation(setup: Setup, length: int, device: torch.device) -> Measured:
    """Goes through a conversation of `length` tokens, half of them a prompt, and measures its memory.

    Raises:
        torch.cuda.OutOfMemoryError: it does not fit.
    """

    @torch.inference_mode()
    def converse() -> None:
        model = generating_model(setup, Parallel())
        _fill_with_zeros(model, device)
        pack_small(model)
        cache, half = KVCache(setup.config.n_layers), max(length // 2, 1)
        for span in (range(half), *(range(place, place + 1) for place in range(half, length))):
            feed(model, cache, span, device)

    return _measured(setup, device, converse)


def _measured(setup: Setup, device: torch.device, steps: Callable[[], None]) -> Measured:
    if setup.recipe.tuning.quantize == "nf4":
        nf4.prepare(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        steps()
        torch.cuda.synchronize(device)
        return Measured(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
    prepare_cpu()
    gc.collect()  # what is freed later would count as memory given back
    return Measured(peak_cpu_bytes(steps), None)


def _run(setup: Setup, device: torch.device, parallel: Parallel) -> None:
    model, data_parallel, optimizer = assemble(
        setup.config,
        StepSettings.of(setup.recipe),
        parallel,
        device.type,
        lambda model: _fill_with_zeros(model, device),
    )
    batches = [empty_batch(setup.lengths, setup.labels)] * min(setup.micro_batches, 2)
    for _ in range(STEPS):
        train_step(model, optimizer, data_parallel, batches, setup.tokens, 0.0, device).loss.item()


def _fill_with_zeros(model: Transformer, device: torch.device) -> None:
    model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
