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
_JOINS = (_aten.cat, _aten.stack)
FOREVER = 1 << 62
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
    """A storage's memory, from one time to another; time n is that of allocation n, and just before it.

    Attributes:
        nbytes: its size.
        moment: what was being done when it was made.
        time: when it was made.
        label: what it is for, if that was said.
        owner: number of the block that it belongs to; -1 = none.
        died: when it was freed.
        joined: bytes of it that come from things of each block.
    """

    __slots__ = ("died", "joined", "label", "moment", "nbytes", "owner", "time")

    def __init__(self, nbytes: int, moment: Moment, time: int, label: str, owner: int, died: int = FOREVER) -> None:
        self.nbytes, self.moment, self.time, self.label, self.owner = nbytes, moment, time, label, owner
        self.died = died
        self.joined: Counter[int | None] = Counter()


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


@dataclass(frozen=True)
class Trace:
    """All allocations of some work.

    Attributes:
        allocations: number n is made at time n.
        since: the time from which on the fullest moment counts.
        ends: when a "forward" or "backward" pass, or an "update", was over.
        flops: floating-point operations by moment.
    """

    allocations: list[Allocation]
    since: int
    ends: list[tuple[int, str]]
    flops: Counter[Moment]

    def rounded(self, multiple: int) -> "Trace":
        """The same where an allocation takes a multiple of so many bytes."""
        for allocation in self.allocations:
            allocation.nbytes = -(-allocation.nbytes // multiple) * multiple
        return self

    def peak(self) -> Peak:
        """The fullest moment, in parts."""
        freed = [0] * (len(self.allocations) + 1)
        for allocation in self.allocations:
            if allocation.died < len(freed):
                freed[allocation.died] += allocation.nbytes
        now = most = 0
        fullest = None
        for allocation in self.allocations:
            now += allocation.nbytes - freed[allocation.time]
            if allocation.time < self.since:
                most = now
            elif now > most:
                most, fullest = now, allocation
        time, moment = (fullest.time + 1, fullest.moment) if fullest else (self.since, Moment("setup"))
        parts: Counter[str] = Counter()
        for allocation in self.allocations:
            if allocation.time < time <= allocation.died:
                parts[self.purpose(allocation)] += allocation.nbytes
        return Peak(sum(parts.values()), moment, dict(parts))

    def purpose(self, allocation: Allocation) -> str:
        """The part of a prediction that an allocation belongs to."""
        phase = allocation.moment.phase
        survives = {what for time, what in self.ends if allocation.time < time < allocation.died}
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


class MemoryTracker(TorchDispatchMode):
    """Tracks storages while it is entered.

    Attributes:
        moment: what is being done; whoever drives the work sets it.
        allocations: all that were made, number n at time n.
        time: how many.
        since: the time of the last `reset_peak`.
        flops: floating-point operations by phase.
    """

    def __init__(self, labels: int = 0) -> None:
        """Args:
        labels: on fake tensors, how many rows of a batch have a label.
        """
        super().__init__()
        self.moment = Moment("setup")
        self.flops: Counter[Moment] = Counter()
        self.labels = labels
        self._live: dict[int, tuple[Allocation, weakref.ref[torch.UntypedStorage]]] = {}
        self.allocations: list[Allocation] = []
        self.ends: list[tuple[int, str]] = []
        self.since = 0

    def at(self, moment: Moment) -> None:
        """Says what is being done from now on."""
        self.moment = moment

    def trace(self) -> Trace:
        """What was tracked so far."""
        return Trace(self.allocations, self.since, self.ends, self.flops)

    def reset_peak(self) -> None:
        """Lets the fullest moment be one of those that come."""
        self.since = len(self.allocations)

    def label(self, tensors: Iterable[Tensor], label: str, owner: int | None = None) -> None:
        """Says what tensors are for, and of which block they are; what is not tracked yet is from now on."""
        for tensor in tensors:
            self._see(tensor, label, owner=owner)

    def ended(self, what: str) -> None:
        """Notes that a "forward" or "backward" pass, or an "update", is over."""
        self.ends.append((len(self.allocations), what))

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
        tensors = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        of = args[0] if args and isinstance(args[0], list) and len(args[0]) == len(tensors) else tensors
        for tensor, operand in zip(tensors, of, strict=True):
            self._see(tensor, owner=self._owner(operand) if isinstance(operand, Tensor) else None)
        if packet in _JOINS and self.moment.block < 0:
            self._join(tensors[0], args[0])
        # Its results have their memory already while an operation works.
        extra = workspace(func, args, kwargs)
        if extra:
            self._give_back(self._allocate(extra, "working memory"))
        if packet in _FLOPS:
            self.flops[self.moment] += _FLOPS[packet](*args, **kwargs, out_val=result)
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

    def _owner(self, tensor: Tensor) -> int | None:
        """The block that an operand of an operation on many tensors belongs to; None = it is not known."""
        for storage in _storages(tensor):
            known = self._live.get(storage._cdata)
            return known[0].owner if known else None
        return None

    def _join(self, result: Tensor, operands: Iterable[Tensor]) -> None:
        joined: Counter[int | None] = Counter()
        for operand in operands:
            joined[self._owner(operand)] += operand.nbytes
        for storage in _storages(result):
            self._live[storage._cdata][0].joined = joined

    def _see(self, tensor: Tensor, label: str = "", keep: bool = False, owner: int | None = None) -> None:
        for storage in _storages(tensor):
            key = storage._cdata
            known = self._live.get(key)
            if known is None:
                allocation = self._allocate(storage.nbytes(), label)
                reference = weakref.ref(storage, lambda _, key=key: self._freed(key))  # type: ignore[misc]
                self._live[key] = known = allocation, reference
                if owner is not None:
                    allocation.owner = owner
            elif label and not (keep and known[0].label):
                known[0].label = label
                if owner is not None:
                    known[0].owner = owner

    def _allocate(self, nbytes: int, label: str) -> Allocation:
        allocation = Allocation(nbytes, self.moment, len(self.allocations), label, self.moment.block)
        self.allocations.append(allocation)
        return allocation

    def _give_back(self, allocation: Allocation) -> None:
        allocation.died = len(self.allocations)

    def _freed(self, key: int) -> None:
        self._give_back(self._live.pop(key)[0])

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is None:
            return
        old, reference = known
        self._give_back(old)
        new = self._allocate(storage.nbytes(), old.label or _BUFFER)
        self._live[storage._cdata] = new, reference


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if hasattr(tensor, "_local_tensor"):  # a DTensor is around what is stored here
        tensor = tensor._local_tensor
    yield tensor.untyped_storage()
