"""What PyTorch takes of a GPU from the driver for a sequence of allocations: its caching allocator, replayed.

What is freed stays in segments and is cut up for what comes next. What is reserved and not in use did not fit. The
rules are those of PyTorch's CUDACachingAllocator.cpp with its default settings, for one stream and memory without end.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MIB = 2**20
ROUNDING = 512
"""An allocation takes a multiple of so many bytes."""
_SMALL = MIB
"""Up to here an allocation is cut from a segment of the small ones."""
_SMALL_SEGMENT = 2 * MIB
_MIDDLE = 10 * MIB
"""Below this, and above what is small, a new segment is of one size."""
_MIDDLE_SEGMENT = 20 * MIB
_SEGMENT_ROUNDING = 2 * MIB


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment, between two others or at an end."""

    address: int
    size: int
    small: bool
    before: "Block | None" = None
    after: "Block | None" = None
    free: bool = False


class CachingAllocator:
    """Reserves memory and hands it out.

    Attributes:
        reserved: bytes of all segments; none is given back.
        allocated: bytes handed out, with what was too little to be cut off.
    """

    def __init__(self) -> None:
        self.reserved = self.allocated = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # sizes and addresses, smallest first
        self._blocks: dict[int, Block] = {}  # what is free, by address
        self._end = 0

    def allocate(self, nbytes: int) -> Block:
        """The smallest free block that holds `nbytes`, cut to size, or a part of a new segment."""
        size = max(1, -(-nbytes // ROUNDING)) * ROUNDING
        small = size <= _SMALL
        free = self._free[small]
        at = bisect_left(free, (size, 0))
        block = self._taken(free[at]) if at < len(free) else self._segment(size, small)
        rest = block.size - size
        if rest >= ROUNDING if small else rest > _SMALL:
            after = Block(block.address + size, rest, small, block, block.after)
            if block.after:
                block.after.before = after
            block.size, block.after = size, after
            self._keep(after)
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        """Takes a block back and joins it to what is free beside it."""
        self.allocated -= block.size
        if block.before and block.before.free:
            block = self._joined(self._taken((block.before.size, block.before.address)), block)
        if block.after and block.after.free:
            block = self._joined(block, self._taken((block.after.size, block.after.address)))
        self._keep(block)

    def _segment(self, size: int, small: bool) -> Block:
        rounded = -(-size // _SEGMENT_ROUNDING) * _SEGMENT_ROUNDING
        segment = Block(self._end, _SMALL_SEGMENT if small else rounded if size >= _MIDDLE else _MIDDLE_SEGMENT, small)
        self._end += segment.size
        self.reserved += segment.size
        return segment

    def _keep(self, block: Block) -> None:
        block.free = True
        self._blocks[block.address] = block
        insort(self._free[block.small], (block.size, block.address))

    def _taken(self, key: tuple[int, int]) -> Block:
        block = self._blocks.pop(key[1])
        free = self._free[block.small]
        del free[bisect_left(free, key)]
        block.free = False
        return block

    def _joined(self, first: Block, second: Block) -> Block:
        first.size += second.size
        first.after = second.after
        if second.after:
            second.after.before = first
        return first


class Lived(Protocol):
    """An allocation's size, and when it was made and freed; a time counts the allocations before it."""

    nbytes: int
    time: int
    died: int


def reserved(allocations: Sequence[Lived], since: int = 0, step: int | None = None) -> int:
    """Bytes that are reserved in the end for allocations, of which number n is made at time n.

    Args:
        allocations: in the order they are made.
        since: what was made before this time is somewhere else.
        step: what was made from this time on is freed in the end and made once more, as another step does: it may not
            find the same places.
    """
    allocator = CachingAllocator()
    blocks: dict[int, Block] = {}
    _replay(allocator, blocks, allocations, since)
    if step is not None:
        for time in [time for time in blocks if time >= step]:
            allocator.free(blocks.pop(time))
        _replay(allocator, blocks, allocations, step)
    return allocator.reserved


def _replay(allocator: CachingAllocator, blocks: dict[int, Block], allocations: Sequence[Lived], since: int) -> None:
    made = [lived for lived in allocations[since:] if lived.nbytes]
    deaths = deque(sorted((lived.died, lived.time) for lived in made))
    for lived in made:
        while deaths and deaths[0][0] <= lived.time:
            allocator.free(blocks.pop(deaths.popleft()[1]))
        blocks[lived.time] = allocator.allocate(lived.nbytes)
    for died, time in deaths:
        if died <= len(allocations):
            allocator.free(blocks.pop(time))
