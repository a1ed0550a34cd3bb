"""How much memory a rank takes, in parts: the run that is meant, what is simulated of it, what a GPU takes besides."""

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from llama_acc.core.checkpoint.streaming import block_sizes
from llama_acc.core.distributed.groups import Parallel, check_world, local_part, simulated
from llama_acc.core.errors import UserError, did_you_mean
from llama_acc.core.memory.allocator import MIB, reserved
from llama_acc.core.memory.simulate import Setup, simulate_generation, simulate_training
from llama_acc.core.memory.tracker import Trace
from llama_acc.core.model.config import ModelConfig, check_divides, named_sizes
from llama_acc.core.model.vision import tower_shapes
from llama_acc.core.recipe import Recipe, TrainSection
from llama_acc.core.tokenizer import find_tokenizer, load_tokenizer
from llama_acc.core.train.base import find_shape
from llama_acc.core.train.data_parallel import DataParallel
from llama_acc.core.train.plan import StepSettings
from llama_acc.core.train.trainer import model_for_training

PARTS = (
    "weights",
    "quantization state",
    "vision tower",
    "trainable masters",
    "optimizer",
    "gradients",
    "activations kept",
    "activations recomputed",
    "logits and loss",
    "KV cache",
    "communication buffers",
    "working memory",
    "allocator slack",
    "CUDA context",
)
"""The parts of a prediction, in the order they are shown."""
_PLAIN = "alpaca"  # the recipe that stands for what is not said: bf16, activation checkpointing, sdp
_LLAMA_VOCABULARY = 32000


@dataclass(frozen=True)
class MemoryRequest:
    """What the user asks about; None = what the recipe says."""

    recipe: str | None = None  # a shipped name or a file; None = a plain one, with one micro-batch to a step
    model: str | None = None  # a size known by name, or a checkpoint's folder
    tuning: str | None = None
    quantize: str | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    gpus: int | None = None  # number of processes
    model_parallel_size: int | None = None
    overrides: tuple[str, ...] = ()  # `key=value` of the recipe
    device_type: str = "cuda"  # or "cpu"


def setup_of(request: MemoryRequest, train: TrainSection | None = None) -> Setup:
    """The run a request means, on examples that are all as long as they may be; `train`: in place of its recipe's."""
    recipe, config = recipe_and_config(request)
    recipe = recipe if train is None else recipe.model_copy(update={"train": train})
    size, gpus = recipe.parallel.model_parallel_size, request.gpus or recipe.parallel.model_parallel_size
    check_divides(config, size)
    check_world(size, gpus)
    longest, train = recipe.data.max_tokens, recipe.train
    if longest > config.max_seq_len:
        raise UserError(
            f"{longest} tokens are more than the model's max_seq_len ({config.max_seq_len})",
            f"lower --max-tokens, or say model.max_seq_len={longest}",
        )
    count, tokens = train.bounds()
    if tokens is not None:
        count = max(1, min(count, tokens // longest))
    micro_batches = 1 if request.recipe is None else -(-train.global_batch_size // (count * (gpus // size)))
    settings = StepSettings.of(recipe)
    return Setup(config, settings, (longest,) * count, None, micro_batches, gpus, 0, request.device_type)


def recipe_and_config(request: MemoryRequest) -> tuple[Recipe, ModelConfig]:
    """The recipe a request means, and the shape of its model."""
    values = {
        "tuning.method": request.tuning,
        "tuning.quantize": request.quantize,
        "checkpoint.trainable_only": True if request.quantize == "nf4" else None,
        "train.batch_size": request.batch_size,
        "data.max_tokens": request.max_tokens,
        "parallel.model_parallel_size": request.model_parallel_size,
    }
    changes = [f"{key}={value}" for key, value in values.items() if value is not None]
    name = request.recipe or _PLAIN
    recipe = Recipe.load(name, [*changes, *request.overrides])
    known = f"known sizes: {', '.join(named_sizes())}; or "
    if request.model is not None:
        recipe.model.params = recipe.model.pretrained = recipe.model.tokenizer = None
        if request.model in named_sizes():
            recipe.model.size = request.model
        elif Path(request.model).expanduser().is_dir():
            recipe.model.pretrained = request.model
        else:
            hint = did_you_mean(request.model, named_sizes()) or f"{known}a checkpoint's folder"
            raise UserError(f"there is no model '{request.model}'", hint)
    elif request.recipe is None:
        raise UserError("which model? --model and --recipe are missing", f"{known}--recipe NAME")
    layouts, config = find_shape(recipe, weights_may_be_absent=True)
    if config.vocab_size < 0:
        found = [path for layout in layouts if (path := find_tokenizer(layout.folder)) is not None]
        config = replace(config, vocab_size=load_tokenizer(found[-1]).vocab_size if found else _LLAMA_VOCABULARY)
    return recipe, config


@cache
def gpu_table() -> Any:
    """`gpus.yaml`: kinds of GPU, what they take besides the program's tensors, and published GPU-hours."""
    return yaml.safe_load(Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8"))


def assumed_rate(gpu: str) -> float:
    """Floating-point operations in a second that a step is assumed to reach on a GPU of this name, such as "NVIDIA
    A100-SXM4-80GB"; infinite if its kind is not in `gpus.yaml`."""
    words = re.findall("[a-z0-9]+", gpu.lower())
    words += [first + second for first, second in pairwise(words)]  # "RTX 4090"
    table = gpu_table()
    rates = [values["bf16"] for kind, values in table["kinds"].items() if kind.partition("-")[0] in words]
    return rates[0] * 1e12 * float(table["streaming"]["efficiency"]) if rates else math.inf


def context_bytes(world_size: int) -> int:
    """Bytes that a process takes of a GPU outside of PyTorch's allocator."""
    return _overhead("context") + (_overhead("nccl") if world_size > 1 else 0)


def _overhead(name: str) -> int:
    return round(gpu_table()["overhead"][name]["mib"] * MIB)


@dataclass(frozen=True)
class Usage:
    """The fullest moment of some work on one rank."""

    parts: dict[str, int]  # bytes by what they are for, all of `PARTS`
    moment: str  # what is being done then, in words
    flops: int = 0  # floating-point operations of one micro-batch, forward, recomputed and backward, on one rank

    @property
    def allocated(self) -> int:
        """Bytes of tensors and workspaces: what torch counts as allocated."""
        return self.reserved - self.parts["allocator slack"]

    @property
    def reserved(self) -> int:
        """Bytes that torch takes from the device."""
        return self.total - self.parts["CUDA context"]

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Bytes, and the moment."""
        sizes = {"total": self.total, "reserved": self.reserved, "allocated": self.allocated}
        return {**sizes, "moment": self.moment, "parts": self.parts}


def predict(setup: Setup) -> Usage:
    """Predicts an optimizer step."""
    return _usage(setup, simulate_training(setup))


def predict_generation(setup: Setup, length: int) -> Usage:
    """Predicts a conversation of `length` tokens with the trained model."""
    return _usage(setup, simulate_generation(setup, length))


@dataclass(frozen=True)
class Streaming:
    """What a base that is streamed takes beside the device's memory, in bytes."""

    host: int  # of pinned memory, into which files are read
    moved: int  # to the device in a micro-batch, forward and backward
    stays: int  # in files

    def slowdown(self, flops: float, rate: float) -> float:
        """How many times as long as in memory a micro-batch of so many operations takes, at so many a second: copying
        goes on beside computing, and the slower one counts. Its speed is assumed: see gpus.yaml."""
        return max(1.0, self.moved * rate / (gpu_table()["streaming"]["bandwidth"] * 1e9 * flops))

    def waiting(self, flops: float, rate: float, gpu: str) -> str:
        """What share of a micro-batch's time is waiting for blocks, in words."""
        if rate == math.inf:
            return f"the rate of {gpu} is not known: the share of copying is not estimated"
        share = 1 - 1 / self.slowdown(flops, rate)
        return f"{share:.0%} of the time is waiting for blocks on {gpu}, assumed: docs/memory.md"


def streaming(setup: Setup) -> Streaming:
    """What streaming the base of a run takes."""
    sizes = block_sizes(model_for_training(setup.config, setup.settings, Parallel()))
    # Where the blocks turn back, at either end, two are there already.
    return Streaming(2 * max(sizes), 2 * sum(sizes[2:]), sum(sizes))


def rank_parameters(setup: Setup) -> int:
    """How many of the model's numbers a rank stores, its vision tower included."""
    settings, vision = setup.settings, setup.config.vision
    with simulated(0, setup.world_size, settings.model_parallel_size) as parallel:
        model = model_for_training(setup.config, settings, parallel)
        DataParallel(model, parallel, settings.data_parallel, settings.accumulate_unsharded, "cpu")
        stored = [local_part(parameter).tensor for parameter in model.parameters()]
    tower = 0 if vision is None else sum(map(math.prod, tower_shapes(vision).values()))
    # A byte of a quantized matrix holds two.
    return sum(tensor.numel() * (1 if tensor.is_floating_point() else 2) for tensor in stored) + tower


def _usage(setup: Setup, trace: Trace) -> Usage:
    peak = trace.peak()
    parts = {part: peak.parts.get(part, 0) for part in PARTS}
    assert sum(parts.values()) == peak.total
    if setup.device_type == "cuda":
        parts["working memory"] += _overhead("cublas_workspace")
        parts["allocator slack"] = reserved(trace.allocations, step=trace.since) - peak.total
        parts["CUDA context"] = context_bytes(setup.world_size)
    return Usage(parts, str(peak.phase), sum(trace.flops.values()) // min(setup.micro_batches, 2))
