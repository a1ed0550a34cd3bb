"""Counts the memory that another program takes: its own model and step are run, on tensors without values.

What a GPU does not run here stands in for what it runs there: bitsandbytes' quantized linear layer, as it was in 2023,
and FlashAttention.
"""

import argparse
import json
import linecache
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from llama_acc.core.memory.allocator import ROUNDING, reserved
from llama_acc.core.memory.simulate import watched
from llama_acc.core.memory.tracker import Allocation, MemoryTracker, Phase, Trace

_BLOCK = 64
_BLOCK_OF_SCALES = 256


def made_of(tensor: Tensor) -> list[Tensor]:
    """A tensor, or those that it is made of."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
    return [tensor] if names is None else [getattr(tensor, name) for name in names]


class LineTracker(MemoryTracker):
    """Knows, too, which line of another program had a storage made."""

    def __init__(self, source: Path | None) -> None:
        self._source = f"{source.resolve()}{os.sep}" if source else ""
        self._made: list[tuple[Allocation, str]] = []
        self._begun = 0
        super().__init__()

    def begin(self) -> None:
        """What there is until now is not on the GPU."""
        self._begun = len(self.allocations)

    def trace(self) -> Trace:
        """What a GPU has of it."""
        return super().trace().rounded(ROUNDING)

    def reserved(self) -> int:
        """Bytes that PyTorch had reserved in the end."""
        return reserved(self.allocations, self._begun)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor made of others does it by operations on those, which come here in turn
        if func is torch.ops.aten._log_softmax.default and not args[0].is_contiguous():
            args = (args[0].contiguous(), *args[1:])  # a GPU's kernel has such a copy of its own
            self._see(args[0])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _see(self, tensor: Tensor, label: str = "", keep: bool = False, owner: int | None = None) -> None:
        for part in made_of(tensor):
            super()._see(part, label, keep, owner)

    def _allocate(self, *what: Any) -> Allocation:
        allocation, line = super()._allocate(*what), "elsewhere"
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not (self._source and frame.f_code.co_filename.startswith(self._source)):
            frame = frame.f_back
        if frame is not None:
            file, number = frame.f_code.co_filename, frame.f_lineno
            line = f"{Path(file).name}:{number} {linecache.getline(file, number).strip()}"
        self._made.append((allocation, line))
        return allocation

    def lines(self) -> dict[str, int]:
        """Bytes at the peak of what does not last, by purpose and line, most first."""
        trace, found = self.trace(), Counter[str]()
        time = trace.peak().time
        for allocation, line in self._made:
            if allocation.time < time <= allocation.died and allocation.label in ("", "working memory"):
                found[f"{trace.purpose(allocation)}: {line}"] += allocation.nbytes
        return dict(found.most_common())


@contextmanager
def counted(source: Path | None = None) -> Iterator[LineTracker]:
    """Operations make tensors that have a shape and no values, and are watched as on a GPU.

    Args:
        source: the program's folder; at the peak it is known which of its lines made what.
    """
    dropout = nn.functional.dropout
    nn.functional.dropout = _fused_dropout
    try:
        with watched(tracker := LineTracker(source), "cuda"):
            yield tracker
    finally:
        nn.functional.dropout = dropout


def _fused_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As a GPU does it: what is kept is a mask of bytes, not one of the input's type."""
    assert not inplace
    return torch.native_dropout(x, p, training)[0] if training and p else x


class _Product(torch.autograd.Function):
    """bitsandbytes 0.41.1's MatMul4Bit: the whole matrix is written out, in half precision and then in the input's, and
    the input is kept though nothing needs it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "Linear4bit") -> Tensor:
        y = nn.functional.linear(x, layer.written_out().to(x.dtype))
        ctx.layer, ctx.kept = layer, x
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        return torch.matmul(dy, ctx.layer.written_out().to(dy.dtype)), None


class Linear4bit(nn.Module):
    """A linear layer in NF4 as bitsandbytes 0.41.1 has it, with its memory and without its values.

    Args:
        rows, columns: of the matrix.
        stored_as: what the matrix was before, and is written out as: float16 where bitsandbytes moved it to the GPU.
        compute_dtype: its input is turned into this.
        twice: whether the scales are quantized, too.
    """

    def __init__(
        self, rows: int, columns: int, stored_as: torch.dtype, compute_dtype: torch.dtype, twice: bool
    ) -> None:
        super().__init__()
        numbers, blocks = rows * columns, rows * columns // _BLOCK
        self.shape, self.stored_as, self.compute_dtype = (rows, columns), stored_as, compute_dtype
        self.register_buffer("packed", torch.empty(numbers // 2, 1, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8 if twice else torch.float32))
        if twice:
            self.register_buffer("scales_of_scales", torch.empty(-(-blocks // _BLOCK_OF_SCALES)))
        self.twice = twice

    def written_out(self) -> Tensor:
        """The matrix: its scales first, where they are quantized."""
        scales = torch.empty(len(self.scales)) if self.twice else self.scales  # type: ignore[arg-type]
        matrix = torch.empty(self.shape, dtype=self.stored_as)
        del scales
        return matrix

    def forward(self, x: Tensor) -> Tensor:
        """x [..., columns] to [..., rows]."""
        y: Tensor = _Product.apply(x.to(self.compute_dtype), self)
        return y.to(x.dtype)


@dataclass(frozen=True)
class Row:
    """A published figure and the run it is of.

    Attributes:
        what: the run in words.
        published: GB of 10^9 bytes.
        run: arguments of the function that counts it.
        counts: whether it is memory "allocated", "reserved", or the whole "device" (a CUDA context is not counted).
    """

    what: str
    published: float
    run: dict[str, Any]
    counts: str = "allocated"


def label_lasting(tracker: MemoryTracker, model: nn.Module) -> None:
    """Names what a model holds as predictions do."""
    for parameter in model.parameters():
        tracker.label([parameter], "trainable masters" if parameter.requires_grad else "weights")
    for name, buffer in model.named_buffers():
        kind = name.rpartition(".")[2]
        known = {"packed": "weights", "scales": "quantization state", "scales_of_scales": "quantization state"}
        tracker.label([buffer], known.get(kind, "weights"))


@contextmanager
def phases(tracker: MemoryTracker, blocks: Iterable[nn.Module], head: nn.Module) -> Iterator[None]:
    """Keeps the tracker's moment where the model is: in which block, forward or again; from `head` on, the loss."""

    def enter(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            again = tracker.phase.name in ("backward", "recompute")
            tracker.at(Phase("recompute" if again else "forward", number))

        return hook

    def leave(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if tracker.phase.name == "recompute":
                tracker.at(Phase("backward", number))

        return hook

    def to_loss(*_: Any) -> None:
        tracker.at(Phase("loss"))

    tracker.at(Phase("forward"))
    tracker.reset_peak()
    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(enter(number)).remove)
            stack.callback(block.register_forward_hook(leave(number), always_call=True).remove)
        stack.callback(head.register_forward_pre_hook(to_loss).remove)
        yield


def backward(tracker: MemoryTracker, loss: Tensor) -> None:
    """The backward pass, told to the tracker."""
    tracker.ended("forward")
    tracker.at(Phase("backward"))
    loss.backward()
    tracker.ended("backward")


def main_of(
    about: str | None, prepare: Callable[[Path], None], rows: Sequence[Row], count: Callable[..., LineTracker]
) -> None:
    """The command: counts every row, and prints a table, or JSON lines. `count` is given the checkout, too."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the checkout")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each figure")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    prepare(arguments.source)
    for row in rows:
        if arguments.only in row.what:
            _show(row, count(arguments.source, **row.run), arguments.json)


def _show(row: Row, tracker: LineTracker, as_json: bool) -> None:
    peak, lines, taken = tracker.trace().peak(), tracker.lines(), tracker.reserved()
    parts = {part: size for part, size in peak.parts.items() if size > 10**6}
    if row.counts != "allocated":
        parts["allocator slack"] = taken - peak.total
    if as_json:
        found = {"what": row.what, "published": row.published, "allocated": peak.total, "reserved": taken}
        print(json.dumps(found | {"moment": str(peak.phase), "parts": parts, "lines": lines}), flush=True)
        return
    counted = sum(parts.values()) / 1e9
    print(f"{row.what}: published {row.published:.2f} GB, counted {counted:.2f} ({counted / row.published - 1:+.1%})")
    print(
        f"    {peak.total / 1e9:.3f} allocated, {taken / 1e9:.3f} reserved; the first at its fullest, in {peak.phase}:"
    )
    print(f"    theirs: {{{', '.join(f'{part}: {size / 1e9:.3f}' for part, size in parts.items())}}}")
    print("    of what does not last:")
    for line, size in lines.items():
        if size > 0.002 * peak.total:
            print(f"    {size / 1e9:8.3f} {line}", flush=True)
