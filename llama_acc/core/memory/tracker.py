"""Follows every storage that torch's operations make and free, on real tensors or fake ones, and counts their work."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from llama_acc.core.memory.trace import BUFFER, Allocation, Phase, Trace
from llama_acc.core.memory.workspaces import workspace

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


class MemoryTracker(TorchDispatchMode):
    """Tracks storages while it is entered.

    Attributes:
        moment: what is being done; whoever drives the work sets it.
        allocations: all that were made, number n at time n.
        since: the time of the last `reset_peak`.
        ends: when a pass or an update was over.
        flops: floating-point operations by phase.
    """

    def __init__(self, labels: int = 0) -> None:
        """Args:
        labels: on fake tensors, how many rows of a batch have a label.
        """
        super().__init__()
        self.moment = Phase("setup")
        self.flops: Counter[Phase] = Counter()
        self.labels = labels
        self._live: dict[int, tuple[Allocation, weakref.ref[torch.UntypedStorage]]] = {}
        self.allocations: list[Allocation] = []
        self.ends: list[tuple[int, str]] = []
        self.since = 0

    def at(self, moment: Phase) -> None:
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
        if func.namespace == "prim":  # a question about a tensor; backward passes ask thousands of times for the device
            is_fake = func is torch.ops.prim.device.default and isinstance(args[0], torch._subclasses.FakeTensor)
            return args[0].fake_device if is_fake else func(*args, **kwargs)
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
                    self._see(tensor, BUFFER, keep=True)
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
        new = self._allocate(storage.nbytes(), old.label or BUFFER)
        self._live[storage._cdata] = new, reference


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if hasattr(tensor, "_local_tensor"):  # a DTensor is around what is stored here
        tensor = tensor._local_tensor
    yield tensor.untyped_storage()
