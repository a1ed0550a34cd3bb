"""What PyTorch reserves on a GPU for a sequence of allocations: its caching allocator, replayed.

What is freed stays in a segment and is cut up for what comes next; what is reserved and not in use did not fit. The
rules are those of CUDACachingAllocator.cpp with expandable segments (see `device.prepare_cuda`), for one stream and
unlimited memory: there are two, one for small allocations, and each grows at its end.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from llama_acc.core.memory.tracker import Allocation

MIB = 2**20
ROUNDING = 512
"""An allocation takes a multiple of so many bytes."""
_SMALL = MIB  # up to here it is cut from the segment for small ones
_STEPS = {True: 2 * MIB, False: 20 * MIB}  # by which the segments for small ones and for others grow


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
    """Reserves memory and hands it out."""

    def __init__(self) -> None:
        self.reserved = 0  # bytes of both segments; none is given back
        self.allocated = 0  # bytes handed out
        # Small or not, by size and address.
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        self._last = {small: Block(0, 0, small) for small in (True, False)}

    def allocate(self, nbytes: int) -> Block:
        """The smallest free block that holds `nbytes`, cut to size; the last one, which can grow, if no other does."""
        size = max(1, -(-nbytes // ROUNDING)) * ROUNDING
        small = size <= _SMALL
        free = self._free[small]
        at = bisect_left(free, (size, 0))
        at += at < len(free) and free[at][2].after is None
        block = free.pop(at)[2] if at < len(free) else self._grown(size, small)
        block.free = False
        rest = block.size - size
        if rest:
            after = Block(block.address + size, rest, small, block, block.after)
            if block.after:
                block.after.before = after
            else:
                self._last[small] = after
            block.size, block.after = size, after
            self._keep(after)
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        """Takes a block back and joins it to what is free beside it."""
        self.allocated -= block.size
        if block.before and block.before.free:
            block = self._joined(self._taken(block.before), block)
        if block.after and block.after.free:
            block = self._joined(block, self._taken(block.after))
        self._keep(block)

    def _grown(self, size: int, small: bool) -> Block:
        """A block at the end of a segment, which has grown to hold so much."""
        block, step = self._last[small], _STEPS[small]
        if block.free:
            self._taken(block)
        else:
            block.after = self._last[small] = Block(block.address + block.size, 0, small, block)
            block = block.after
        more = max(0, -(-(size - block.size) // step) * step)
        block.size += more
        self.reserved += more
        return block

    def _keep(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.address, block))

    def _taken(self, block: Block) -> Block:
        free = self._free[block.small]
        del free[bisect_left(free, (block.size, block.address))]
        return block

    def _joined(self, first: Block, second: Block) -> Block:
        first.size += second.size
        first.after = second.after
        if second.after:
            second.after.before = first
        else:
            self._last[first.small] = first
        return first


def reserved(allocations: Sequence[Allocation], since: int = 0, step: int | None = None) -> int:
    """Bytes that are reserved in the end for allocations, of which number n is made at time n.

    What was made before `since` is somewhere else. What was made from `step` on is freed in the end and made once
    more, as another step does: it may not find the same places.
    """
    allocator = CachingAllocator()
    blocks: dict[int, Block] = {}
    _replay(allocator, blocks, allocations, since)
    if step is not None:
        for time in [time for time in blocks if time >= step]:
            allocator.free(blocks.pop(time))
        _replay(allocator, blocks, allocations, step)
    return allocator.reserved


def _replay(
    allocator: CachingAllocator, blocks: dict[int, Block], allocations: Sequence[Allocation], since: int
) -> None:
    made = [allocation for allocation in allocations[since:] if allocation.nbytes]
    deaths = deque(sorted((allocation.died, allocation.time) for allocation in made))
    for allocation in made:
        while deaths and deaths[0][0] <= allocation.time:
            allocator.free(blocks.pop(deaths.popleft()[1]))
        blocks[allocation.time] = allocator.allocate(allocation.nbytes)
    for died, time in deaths:
        if died <= len(allocations):
            allocator.free(blocks.pop(time))
