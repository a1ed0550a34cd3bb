"""Follows every storage that torch's operations make and free, on real tensors or on fake ones, and counts their work.

What a storage was for is decided afterwards, by when it was made and when it was freed: what a forward pass leaves to
the backward pass is a kept activation, what a backward pass leaves behind is a gradient.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from llama_acc.core.vram.kernels import workspace

_aten = torch.ops.aten
# What torch's table lacks does the work of what it has.
_FLOPS = flop_registry | {
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
_COLLECTIVES = {
    torch.ops.c10d._allgather_base_,
    torch.ops.c10d.allgather_,
    torch.ops.c10d._reduce_scatter_base_,
    torch.ops.c10d.reduce_scatter_,
}
_FOREVER = 1 << 62
_BUFFER = "communication buffers"


class Moment(NamedTuple):
    """What is being done: a phase, and in which block of the model.

    Attributes:
        phase: "setup", "forward", "recompute", "loss", "backward", "update" or "generation".
        block: number of the block, from 0; -1 = outside of all.
    """

    phase: str
    block: int = -1

    def __str__(self) -> str:
        where = f" of block {self.block}" if self.block >= 0 else ""
        names = {"recompute": "backward", "update": "optimizer step", "backward": "backward"}
        return (names.get(self.phase, self.phase) + where) if self.phase != "loss" else "loss"


class Allocation:
    """A storage's memory, from one time to another; times count allocations."""

    __slots__ = ("died", "label", "moment", "nbytes", "time")

    def __init__(self, nbytes: int, moment: Moment, time: int, label: str) -> None:
        self.nbytes, self.moment, self.time, self.label = nbytes, moment, time, label
        self.died = _FOREVER


@dataclass(frozen=True)
class Peak:
    """The fullest moment of what was tracked.

    Attributes:
        total: bytes in use.
        moment: what was being done.
        parts: bytes by purpose; their sum is `total`.
    """

    total: int
    moment: Moment
    parts: dict[str, int]


class MemoryTracker(TorchDispatchMode):
    """Tracks storages while it is entered.

    Attributes:
        moment: what is being done; whoever drives the work sets it.
        allocations: all that were made, number n at time n.
        time: how many.
        since: the time of the last `reset_peak`.
        flops: floating-point operations by phase.
    """

    def __init__(self, rounding: int = 1, labels: int = 0) -> None:
        """Args:
        rounding: an allocation takes a multiple of so many bytes.
        labels: on fake tensors, how many rows of a batch have a label.
        """
        super().__init__()
        self.moment = Moment("setup")
        self.flops: Counter[str] = Counter()
        self.labels = labels
        self._rounding = rounding
        self._live: dict[int, tuple[Allocation, weakref.ref[torch.UntypedStorage]]] = {}
        self.allocations: list[Allocation] = []
        self.time = self._now = 0
        self._ends: list[tuple[int, str]] = []
        self.reset_peak()

    def at(self, moment: Moment) -> None:
        """Says what is being done from now on."""
        self.moment = moment

    def reset_peak(self) -> None:
        """Forgets the fullest moment so far."""
        self.since = self.time
        self._peak, self._peak_time, self._peak_moment = self._now, self.time, self.moment

    @property
    def now(self) -> int:
        """Bytes in use."""
        return self._now

    def label(self, tensors: Iterable[Tensor], label: str) -> None:
        """Says what tensors are for; what is not tracked yet is from now on."""
        for tensor in tensors:
            self._see(tensor, label)

    def ended(self, what: str) -> None:
        """Notes that a "forward" or "backward" pass, or an "update", is over."""
        self._ends.append((self.time, what))

    def __enter__(self) -> "MemoryTracker":
        self._resize = torch.UntypedStorage.resize_
        tracker, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            tracker._resized(storage)

        # FSDP gives gathered parameters their memory, and takes it away, past torch's dispatcher.
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        # What is left outlives the work that is followed, whenever Python may collect it.
        self._live.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor
            return func(*args, **kwargs)
        packet = func._overloadpacket
        result = self._known(packet, args)
        if result is None:
            result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        # Its results have their memory already while an operation works.
        extra = workspace(func, args, kwargs)
        if extra:
            self._give_back(self._allocate(extra, "working memory"))
        if packet in _FLOPS:
            self.flops[self.moment.phase] += _FLOPS[packet](*args, **kwargs, out_val=result)
        if packet in _COLLECTIVES or func.namespace == "fsdp":
            buffers = (args, result) if packet in _COLLECTIVES else (kwargs.get("out"), result)
            for tensor in tree_iter(buffers):
                if isinstance(tensor, Tensor):
                    self._see(tensor, _BUFFER, keep=True)
        return result

    def _known(self, packet: Any, args: Any) -> Any:
        """Results that follow from values, which fake tensors do not have."""
        if not isinstance(args[0] if args else None, torch._subclasses.FakeTensor):
            return None
        if packet is _aten.nonzero:
            return args[0].new_empty((min(self.labels, len(args[0])), 1), dtype=torch.int64)
        if packet is _aten._local_scalar_dense:
            return 1.0
        return None

    def _see(self, tensor: Tensor, label: str = "", keep: bool = False) -> None:
        for storage in _storages(tensor):
            key = storage._cdata
            known = self._live.get(key)
            if known is None:
                allocation = self._allocate(storage.nbytes(), label)
                reference = weakref.ref(storage, lambda _, key=key: self._freed(key))  # type: ignore[misc]
                self._live[key] = allocation, reference
            elif label and not (keep and known[0].label):
                known[0].label = label

    def _allocate(self, nbytes: int, label: str) -> Allocation:
        nbytes = -(-nbytes // self._rounding) * self._rounding
        allocation = Allocation(nbytes, self.moment, self.time, label)
        self.allocations.append(allocation)
        self.time += 1
        self._now += nbytes
        if self._now > self._peak:
            self._peak, self._peak_time, self._peak_moment = self._now, self.time, self.moment
        return allocation

    def _give_back(self, allocation: Allocation) -> None:
        allocation.died = self.time
        self._now -= allocation.nbytes

    def _freed(self, key: int) -> None:
        self._give_back(self._live.pop(key)[0])

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is None:
            return
        old, reference = known
        self._give_back(old)
        self._live[storage._cdata] = self._allocate(storage.nbytes(), old.label or _BUFFER), reference

    def peak(self) -> Peak:
        """The fullest moment since the last reset, in parts."""
        parts: Counter[str] = Counter()
        for allocation in self.allocations:
            if allocation.time < self._peak_time <= allocation.died:
                parts[self._purpose(allocation)] += allocation.nbytes
        return Peak(self._peak, self._peak_moment, dict(parts))

    def _purpose(self, allocation: Allocation) -> str:
        phase = allocation.moment.phase
        survives = {what for time, what in self._ends if allocation.time < time < allocation.died}
        # What is left of a backward pass, also if it was made with the loss, or is what a reduction left.
        is_gradient = phase in ("loss", "backward", "recompute") and "backward" in survives
        if is_gradient and allocation.label in ("", _BUFFER):
            return "gradients"
        if allocation.label:
            return allocation.label
        if phase == "loss":
            return "logits and loss"
        if phase == "forward":
            return "activations kept" if "forward" in survives else "working memory"
        if phase == "recompute":
            return "activations recomputed"
        return "optimizer" if phase == "update" and "update" in survives else "working memory"


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if hasattr(tensor, "_local_tensor"):  # a DTensor is around what is stored here
        tensor = tensor._local_tensor
    yield tensor.untyped_storage()
