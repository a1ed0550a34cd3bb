"""Steps on real tensors: the most memory they take, with weights that are zeros; and how long a run takes, from a timed
step or from its floating-point operations.

On a GPU memory is that of PyTorch's caching allocator; on a CPU every allocation and every free that torch's CPU
allocator reports to the profiler is added up.
"""

import gc
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_acc.core.device import free_memory, prepare_cpu
from llama_acc.core.distributed.groups import Parallel
from llama_acc.core.errors import UserError
from llama_acc.core.input_files import read_object
from llama_acc.core.memory.guard import setup_of_run
from llama_acc.core.memory.predict import Usage, predict
from llama_acc.core.memory.simulate import Setup, empty_batch, feed, generating_model, simulate_training
from llama_acc.core.memory.workspaces import peak_cpu_bytes
from llama_acc.core.model import nf4
from llama_acc.core.model.attention import KVCache
from llama_acc.core.model.transformer import Transformer, pack_small
from llama_acc.core.recipe import Recipe
from llama_acc.core.train.image_loader import MicroBatchIndices
from llama_acc.core.train.plan import Plan
from llama_acc.core.train.step import train_step
from llama_acc.core.train.trainer import Trainer, assemble

STEPS = 2
"""Optimizer steps that are run: the second one has the optimizer's state from its start."""
_PROBE_STEPS = 3  # the first one warms up, and another may have been disturbed
_PROBE_SECONDS = 20.0  # then no other one is begun


@dataclass(frozen=True)
class Measured:
    """The most memory in use at a time: bytes of tensors and workspaces; bytes taken from the device, None on a CPU."""

    allocated: int
    reserved: int | None


def measure(setup: Setup, device: torch.device, parallel: Parallel | None = None) -> Measured:
    """Runs some optimizer steps as `setup` says, and measures their memory on this rank.

    Raises:
        torch.cuda.OutOfMemoryError: they do not fit.
    """

    def train() -> None:
        rank, fill = parallel or Parallel(), _filled_with_zeros(device)
        model, data_parallel, optimizer = assemble(setup.config, setup.settings, rank, device.type, fill)
        batches = [empty_batch(setup.lengths, setup.labels)] * min(setup.micro_batches, 2)
        for _ in range(STEPS):
            train_step(model, optimizer, data_parallel, batches, setup.tokens, 0.0, device).loss.item()

    return _measured(setup, device, train)


def measure_generation(setup: Setup, length: int, device: torch.device) -> Measured:
    """Goes through a conversation of `length` tokens, half of them a prompt, and measures its memory.

    Raises:
        torch.cuda.OutOfMemoryError: it does not fit.
    """

    @torch.inference_mode()
    def converse() -> None:
        model = generating_model(setup, Parallel())
        _filled_with_zeros(device)(model)
        pack_small(model)
        cache, half = KVCache(setup.config.n_layers), max(length // 2, 1)
        for span in (range(half), *(range(place, place + 1) for place in range(half, length))):
            feed(model, [cache], span, device)

    return _measured(setup, device, converse)


def _measured(setup: Setup, device: torch.device, steps: Callable[[], None]) -> Measured:
    if setup.is_quantized:
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


def _filled_with_zeros(device: torch.device) -> Callable[[Transformer], None]:
    @torch.no_grad()
    def fill(model: Transformer) -> None:
        model.to_empty(device=device)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()

    return fill


@dataclass(frozen=True)
class Texts:
    """A data set in numbers: documents, tokens of all of them, tokens that are trained, the sum of squared lengths, and
    where these are from, in words: lengths are those of a template and a tokenizer, or assumed."""

    items: int
    tokens: float
    labels: float
    squares: float
    origin: str = ""


def work_of(setup: Setup, texts: Texts) -> float:
    """Floating-point operations of training on all documents, of all ranks of a model-parallel group.

    A token takes the same of matrices and in proportion to its document's length of attention, so all are taken to be
    as long as the documents of a mean token.
    """
    length = max(1, round(texts.squares / texts.tokens))
    one = replace(setup, lengths=(length,), labels=round(length * texts.labels / texts.tokens), micro_batches=1)
    flops = sum(simulate_training(one).flops.values())
    return setup.settings.model_parallel_size * flops * texts.tokens / length


def read_texts(path: Path) -> Texts:
    """The numbers of a run's data.json."""
    try:
        report = read_object(path)
        squares = report["items"] * _mean_square(report["lengths"])
        template, tokenizer = report.get("template") or "not said", "not said"
        if (recipe := path.with_name("recipe.yaml")).is_file():
            model = Recipe.load(recipe).model
            tokenizer = str(model.tokenizer or ", ".join(map(str, model.pretrained_list())) or tokenizer)
        templates = ", ".join(template) if isinstance(template, list) else template
        counted = f"counted with template {templates} and tokenizer {tokenizer}; others give other lengths"
        return Texts(report["items"], report["tokens"], report["label_tokens"], squares, f"{path}, {counted}")
    except (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is not the data.json of a run: {error}",
            "`llama-acc finetune --recipe NAME --dry-run --output DIR` writes one",
        ) from None


def _mean_square(lengths: Mapping[str, Any]) -> float:
    """The mean squared length from quantiles: lengths are taken to grow evenly from one to the next."""
    places = {"min": 0.0, "max": 1.0}
    points = sorted((places[name] if name in places else int(name[1:]) / 100, float(n)) for name, n in lengths.items())
    pairs = itertools.pairwise(points)
    return sum((q2 - q1) * (n1 * n1 + n1 * n2 + n2 * n2) / 3 for (q1, n1), (q2, n2) in pairs)


def estimate_time(plan: Plan, processes: int, device: torch.device, memory: Usage) -> tuple[float, str]:
    """Seconds of all steps, and how they were found: from one timed step where that fits in half of the free memory,
    else, and where the base is streamed and so may be very large, from the work. Several processes are taken to share
    it without loss; `memory` is what one of them takes."""
    plan = replace(plan, settings=replace(plan.settings, model_parallel_size=1))
    room = free_memory(device) / 2
    fits = memory.allocated <= room and not plan.settings.stream_base  # one process takes no less than one of several
    if fits and processes > 1:
        fits = predict(setup_of_run(plan, 1, device.type)).allocated <= room
    epochs = plan.total_steps / plan.steps_per_epoch * plan.items_per_epoch / len(plan.train)
    if fits:
        per_token, per_step = _timed_step(plan, device)
        seconds = plan.train.tokens * epochs * per_token + plan.total_steps * per_step
        how = f"from one timed step on {device.type}"
    else:
        rate = _matmul_rate(plan.settings.dtype, device)
        squares = float((plan.train.lengths.astype(np.float64) ** 2).sum())
        texts = Texts(len(plan.train), plan.train.tokens, plan.train.label_tokens, squares)
        work = work_of(setup_of_run(plan, 1, "cuda"), texts) * epochs
        seconds = work / rate
        rates = f"{work:.2e} floating-point operations at {rate / 1e12:.2g} TFLOP/s"
        how = f"from {rates} measured on {device.type}, at best"
    if processes > 1:
        how += f"; {processes} processes as fast as this one, at best"
    return seconds / processes, how


def _timed_step(plan: Plan, device: torch.device) -> tuple[float, float]:
    """Seconds for a token forward and backward, and for an update, on a model of random weights."""
    trainer = Trainer(plan, device, None, Parallel())
    optimizer = trainer.optimizer
    (groups,) = plan.micro_batches(plan.train, plan.items(0), 1)
    (batch,) = trainer.iter_batches(plan.train, [MicroBatchIndices(groups[len(groups) // 2], 0)])
    trainer.close()
    whole, updates = [], []
    deadline = time.perf_counter() + _PROBE_SECONDS
    for _ in range(_PROBE_STEPS):
        start = time.perf_counter()
        if start > deadline:
            break
        result = train_step(trainer.model, optimizer, trainer.data_parallel, [batch], len(batch.tokens), 0.0, device)
        result.loss.item()
        whole.append(time.perf_counter() - start)
        for parameter in optimizer.named.values():
            parameter.grad = torch.zeros_like(parameter)
        start = time.perf_counter()
        norm = optimizer.squared_norm().sqrt()
        optimizer.step(0.0, norm, result.loss)
        norm.item()
        updates.append(time.perf_counter() - start)
    return max(min(whole) - min(updates), 0.0) / len(batch.tokens), min(updates)


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product."""
    size = 8192
    if device.type == "cpu":
        prepare_cpu()
        size = 1024
    a, b = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
