"""How much memory a rank takes, in parts: the simulation's figures, and what a GPU takes besides."""

from dataclasses import dataclass
from typing import Any

from llama_acc.core.memory.allocator import reserved
from llama_acc.core.memory.gpus import overhead
from llama_acc.core.memory.simulate import Setup, simulate_generation, simulate_training
from llama_acc.core.memory.trace import Trace

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


@dataclass(frozen=True)
class Usage:
    """The fullest moment of some work on one rank.

    Attributes:
        parts: bytes by what they are for, all of `PARTS`.
        moment: what is being done then, in words.
    """

    parts: dict[str, int]
    moment: str

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
        return {
            "total": self.total,
            "reserved": self.reserved,
            "allocated": self.allocated,
            "moment": self.moment,
            "parts": self.parts,
        }


@dataclass(frozen=True)
class Prediction:
    """What a step of a run takes.

    Attributes:
        setup: the run.
        training: the fullest moment of an optimizer step.
        flops: floating-point operations of one micro-batch, forward, recomputed and backward, on one rank.
    """

    setup: Setup
    training: Usage
    flops: int


def predict(setup: Setup) -> Prediction:
    """Predicts an optimizer step."""
    trace = simulate_training(setup)
    return Prediction(setup, _usage(setup, trace), _flops(setup, trace))


def predict_generation(setup: Setup, length: int) -> Usage:
    """Predicts a conversation of `length` tokens with the trained model."""
    return _usage(setup, simulate_generation(setup, length))


def _flops(setup: Setup, trace: Trace) -> int:
    return sum(trace.flops.values()) // min(setup.micro_batches, 2)


def _usage(setup: Setup, trace: Trace) -> Usage:
    peak = trace.peak()
    parts = {part: peak.parts.get(part, 0) for part in PARTS}
    assert sum(parts.values()) == peak.total
    if setup.device_type == "cuda":
        besides = overhead()
        parts["working memory"] += besides.cublas
        parts["allocator slack"] = reserved(trace.allocations, step=trace.since) - peak.total
        parts["CUDA context"] = besides.context + (besides.nccl if setup.world_size > 1 else 0)
    return Usage(parts, str(peak.moment))
