"""Every storage that torch's operations make and free, on real tensors or fake ones, and what follows from that.

What a storage was for is decided by when it was made and when it was freed: what a forward pass leaves to the backward
pass is a kept activation, what a backward pass leaves behind is a gradient.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from llama_acc.core.memory.workspaces import workspace

FOREVER = 1 << 62
_BUFFER = "communication buffers"
_aten, _c10d = torch.ops.aten, torch.ops.c10d
# What torch's table lacks does the work of what it has.
_FLOPS = flop_registry | {
    _aten.addmm_: flop_registry[_aten.addmm],
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * x.numel() * len(weight),
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
    # Documents' lengths are not at hand: no more than this.
    _aten._flash_attention_forward: lambda q, *rest, **_: 4 * q.numel() * rest[4],
    _aten._flash_attention_backward: lambda d_output, *rest, **_: 10 * d_output.numel() * rest[7],
}
_COLLECTIVES = (_c10d._allgather_base_, _c10d.allgather_, _c10d._reduce_scatter_base_, _c10d.reduce_scatter_)


class Phase(NamedTuple):
    """What is being done: "setup", "forward", "recompute", "loss", "backward", "update", "prompt" or "generation"; in
    which block of the model, from 0; -1 = outside of all."""

    name: str
    block: int = -1

    def __str__(self) -> str:
        name = {"recompute": "backward", "update": "optimizer step"}.get(self.name, self.name)
        return name if self.block < 0 or name == "loss" else f"{name} of block {self.block}"


@dataclass(slots=True, eq=False)
class Allocation:
    """A storage's memory, from one time to another; time n is that of allocation n, and just before it."""

    nbytes: int
    phase: Phase  # in which it was made
    time: int
    label: str  # what it is for, if that was said
    owner: int  # the block that it belongs to; -1 = none
    died: int = FOREVER
    joined: dict[int, int] = field(default_factory=dict)  # bytes of it that come from things of each block


@dataclass(frozen=True)
class Peak:
    """The fullest moment: bytes in use, when, in which phase, and bytes by purpose, whose sum is `total`."""

    total: int
    time: int
    phase: Phase
    parts: dict[str, int]


@dataclass(frozen=True)
class Trace:
    """All allocations of some work."""

    allocations: list[Allocation]  # number n is made at time n
    since: int  # the time from which on the fullest moment counts
    ends: list[tuple[int, str]]  # when a "forward" or "backward" pass, or an "update", was over
    flops: Counter[Phase]  # floating-point operations

    def rounded(self, multiple: int) -> "Trace":
        """The same where an allocation takes a multiple of so many bytes."""
        for allocation in self.allocations:
            allocation.nbytes = -(-allocation.nbytes // multiple) * multiple
        return self

    def peak(self) -> Peak:
        """The fullest moment, in parts."""
        freed: Counter[int] = Counter()
        for allocation in self.allocations:
            freed[allocation.died] += allocation.nbytes
        now = most = 0
        time, phase = self.since, Phase("setup")
        for allocation in self.allocations:
            now += allocation.nbytes - freed[allocation.time]
            if allocation.time < self.since:
                most = now
            elif now > most:
                most, time, phase = now, allocation.time + 1, allocation.phase
        parts: Counter[str] = Counter()
        for allocation in self.allocations:
            if allocation.time < time <= allocation.died:
                parts[self.purpose(allocation)] += allocation.nbytes
        return Peak(sum(parts.values()), time, phase, dict(parts))

    def purpose(self, allocation: Allocation) -> str:
        """The part of a prediction that an allocation belongs to."""
        phase = allocation.phase.name
        survives = {what for time, what in self.ends if allocation.time < time < allocation.died}
        # What is left of a backward pass, also if it was made with the loss, or is what a reduction left.
        is_gradient = phase in ("loss", "backward", "recompute") and "backward" in survives
        if is_gradient and allocation.label in ("", _BUFFER):
            return "gradients"
        if allocation.label:
            return allocation.label
        if phase == "forward" and "forward" in survives:
            return "activations kept"
        if phase == "update" and "update" in survives:
            return "optimizer"
        return {"loss": "logits and loss", "recompute": "activations recomputed"}.get(phase, "working memory")


def deepened(trace: Trace, last: int, extra: int, period: int) -> Trace | None:
    """The trace of a model with `extra` more blocks before block `last`, a multiple of the period in which they repeat;
    None = it does not follow from this one.

    Two periods and three blocks before `last` have to repeat. The last block may differ from the others, as may the one
    before, whose things are freed in there, and the first two: a sharded model gathers the next one early.
    """
    found = (_repeated(trace, last - 2 * period - ends, extra, period) for ends in (2, 1))
    return next((trace for trace in found if trace is not None), None)


def _repeated(trace: Trace, first: int, extra: int, period: int) -> Trace | None:
    """The trace with `extra` more blocks, copies of the `period` ones from `first` on, if each of them takes what the
    one a period later takes, at the same times.

    What either makes has to be freed after the same allocation, or after ones that are equally far away.
    """
    made, copied = trace.allocations, range(first, first + period)
    of: dict[int, list[Allocation]] = defaultdict(list)
    place: list[int] = []  # of an allocation among those of its block
    for allocation in made:
        place.append(len(of[allocation.owner]))
        of[allocation.owner].append(allocation)
    order = _with_copies(made, copied, extra)
    if order is None:
        return None

    def end(allocation: Allocation) -> tuple[int, int]:
        """The allocation that it is freed after: whose it is, and which of these."""
        before = allocation.died - 1
        return (FOREVER, 0) if allocation.died == FOREVER else (made[before].owner, place[before])

    moves = set()  # the things of copied blocks that are freed at a time that moves with the block
    for block in copied:
        if len(of[block]) != len(of[block + period]):
            return None
        for one, following in zip(of[block], of[block + period], strict=True):
            (owner, number), (next_owner, next_number) = end(one), end(following)
            alike = (one.nbytes, one.label, one.phase.name) == (following.nbytes, following.label, following.phase.name)
            far = next_owner != owner and not first - 1 <= owner <= first + period
            if not alike or number != next_number or next_owner - owner not in (0, period) or far:
                return None
            if next_owner != owner:
                moves |= {one.time, following.time}

    def shifted(owner: int) -> int:
        return owner if owner < copied.stop else owner + extra

    times = {(owner, place[allocation.time]): time for time, (owner, allocation) in enumerate(order)}

    def moved(time: int, by: int | None = None) -> int:
        """A time of the trace in the new one; `by` so many blocks if it moves with a block."""
        if time in (0, FOREVER):
            return time
        owner = made[time - 1].owner
        return times[shifted(owner) if by is None else owner + by, place[time - 1]] + 1

    found: list[Allocation] = []
    for owner, old in order:
        by = owner - old.owner
        block = old.phase.block
        if block >= 0:
            block = shifted(block) if old.owner < 0 else block + by
        nbytes = old.nbytes + extra // period * sum(old.joined.get(block, 0) for block in copied)
        died = moved(old.died, by if old.time in moves else None)
        joined = {shifted(other): size for other, size in old.joined.items()}
        found.append(Allocation(nbytes, Phase(old.phase.name, block), len(found), old.label, owner, died, joined))
    flops: Counter[Phase] = Counter()
    for phase, count in trace.flops.items():
        flops[Phase(phase.name, shifted(phase.block))] += count * (1 + extra // period * (phase.block in copied))
    return Trace(found, moved(trace.since), [(moved(time), what) for time, what in trace.ends], flops)


def _with_copies(made: list[Allocation], copied: range, extra: int) -> list[tuple[int, Allocation]] | None:
    """Allocations and the blocks they are of, those of the blocks to be copied so many more times, in the order in
    which the next ones follow them there; None = these do not follow them."""
    first, following = copied.start, range(copied.stop, copied.stop + len(copied))

    def stretch_of(allocation: Allocation) -> int:
        return next((blocks.start for blocks in (copied, following) if allocation.owner in blocks), allocation.owner)

    stretches = [(owner, list(group)) for owner, group in groupby(made, stretch_of)]
    order: list[tuple[int, Allocation]] = []
    for number, (owner, stretch) in enumerate(stretches):
        if owner != first:
            order += [(one.owner if one.owner < first else one.owner + extra, one) for one in stretch]
            continue
        beside = [stretches[near][0] for near in (number - 1, number + 1) if 0 <= near < len(stretches)]
        if following.start not in beside:
            return None
        shifts = range(0, extra + 1, len(copied))
        for by in shifts if beside[-1] == following.start else reversed(shifts):
            order += [(one.owner + by, one) for one in stretch]
    return order


class MemoryTracker(TorchDispatchMode):
    """Tracks storages while it is entered. Whoever drives the work says its `phase`."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = Phase("setup")
        self.allocations: list[Allocation] = []
        self.flops: Counter[Phase] = Counter()
        self._since = 0
        self._ends: list[tuple[int, str]] = []
        self._live: dict[int, tuple[Allocation, weakref.ref[torch.UntypedStorage]]] = {}

    def at(self, phase: Phase) -> None:
        """Says what is being done from now on."""
        self.phase = phase

    def trace(self) -> Trace:
        """What was tracked so far."""
        return Trace(self.allocations, self._since, self._ends, self.flops)

    def reset_peak(self) -> None:
        """Lets the fullest moment be one of those that come."""
        self._since = len(self.allocations)

    def label(self, tensors: Iterable[Tensor], label: str, owner: int | None = None) -> None:
        """Says what tensors are for, and of which block they are; what is not tracked yet is from now on."""
        for tensor in tensors:
            self._see(tensor, label, owner=owner)

    def ended(self, what: str) -> None:
        """Notes that a "forward" or "backward" pass, or an "update", is over."""
        self._ends.append((len(self.allocations), what))

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
        self._live.clear()  # what is left outlives the work that is followed, whenever Python may collect it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_fake = bool(args) and isinstance(args[0], torch._subclasses.FakeTensor)
        if (
            func.namespace == "prim"
        ):  # a question about a tensor; a backward pass asks thousands of times for the device
            is_device = is_fake and func is torch.ops.prim.device.default
            return args[0].fake_device if is_device else func(*args, **kwargs)
        packet = func._overloadpacket
        # A value: fake tensors have none.
        result: Any = 1.0 if is_fake and packet is _aten._local_scalar_dense else func(*args, **kwargs)
        tensors = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        if func is _aten.add.Tensor and self.phase == Phase("backward"):
            self._add_in_place(args[0], result)
        # Of an operation on many tensors, each result belongs to the block that its operand belongs to.
        many = args and isinstance(args[0], list) and len(args[0]) == len(tensors)
        for tensor, operand in zip(tensors, args[0] if many else tensors, strict=True):
            self._see(tensor, owner=self._owner(operand) if isinstance(operand, Tensor) else None)
        if packet in (_aten.cat, _aten.stack) and self.phase.block < 0:
            joined: Counter[int] = Counter()
            for operand in args[0]:
                if (owner := self._owner(operand)) is not None:
                    joined[owner] += operand.nbytes
            self._live[_storage(tensors[0])._cdata][0].joined = joined
        # Its results have their memory already while an operation works.
        if extra := workspace(func, args, kwargs):
            allocation = self._allocate(extra, "working memory")
            allocation.died = len(self.allocations)
        if packet in _FLOPS:
            self.flops[self.phase] += _FLOPS[packet](*args, **kwargs, out_val=result)
        if packet in _COLLECTIVES or func.namespace == "fsdp":
            for tensor in tree_iter((args, result) if packet in _COLLECTIVES else (kwargs.get("out"), result)):
                if isinstance(tensor, Tensor):
                    self._see(tensor, _BUFFER, keep=True)
        return result

    def _owner(self, tensor: Tensor) -> int | None:
        known = self._live.get(_storage(tensor)._cdata)
        return known[0].owner if known else None

    def _add_in_place(self, one: Tensor, total: Tensor) -> None:
        """Takes a sum for the operand: of two gradients of one parameter, the embedding that is the output matrix too,
        autograd adds the second to the first, but if it is a fake tensor."""
        known = self._live.pop(_storage(one)._cdata, None)
        if known is not None:
            key = _storage(total)._cdata
            self._live[key] = known[0], weakref.ref(_storage(total), lambda _: self._freed(key))

    def _see(self, tensor: Tensor, label: str = "", keep: bool = False, owner: int | None = None) -> None:
        storage = _storage(tensor)
        key = storage._cdata
        known = self._live.get(key)
        if known is None:
            allocation = self._allocate(storage.nbytes(), label)
            reference = weakref.ref(storage, lambda _: self._freed(key))
            self._live[key] = allocation, reference
        elif label and not (keep and known[0].label):
            allocation = known[0]
            allocation.label = label
        else:
            return
        if owner is not None:
            allocation.owner = owner

    def _allocate(self, nbytes: int, label: str) -> Allocation:
        allocation = Allocation(nbytes, self.phase, len(self.allocations), label, self.phase.block)
        self.allocations.append(allocation)
        return allocation

    def _freed(self, key: int) -> None:
        self._live.pop(key)[0].died = len(self.allocations)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is not None:
            old, reference = known
            old.died = len(self.allocations)
            self._live[storage._cdata] = self._allocate(storage.nbytes(), old.label or _BUFFER), reference


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    # A DTensor is around what is stored here.
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()
