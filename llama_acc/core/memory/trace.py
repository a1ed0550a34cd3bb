"""What was allocated and freed while something was done, in order, and what follows from it.

What a storage was for is decided by when it was made and when it was freed: what a forward pass leaves to the backward
pass is a kept activation, what a backward pass leaves behind is a gradient.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

FOREVER = 1 << 62
BUFFER = "communication buffers"


class Phase(NamedTuple):
    """What is being done: a phase, and in which block of the model.

    Attributes:
        name: "setup", "forward", "recompute", "loss", "backward", "update" or "generation".
        block: number of the block, from 0; -1 = outside of all.
    """

    name: str
    block: int = -1

    def __str__(self) -> str:
        where = f" of block {self.block}" if self.block >= 0 else ""
        names = {"recompute": "backward", "update": "optimizer step", "backward": "backward"}
        return (names.get(self.name, self.name) + where) if self.name != "loss" else "loss"


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

    def __init__(self, nbytes: int, moment: Phase, time: int, label: str, owner: int, died: int = FOREVER) -> None:
        self.nbytes, self.moment, self.time, self.label, self.owner = nbytes, moment, time, label, owner
        self.died = died
        self.joined: Counter[int | None] = Counter()


@dataclass(frozen=True)
class Peak:
    """The fullest moment of what was tracked.

    Attributes:
        total: bytes in use.
        time: when it was.
        moment: what was being done.
        parts: bytes by purpose; their sum is `total`.
    """

    total: int
    time: int
    moment: Phase
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
    flops: Counter[Phase]

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
        time, moment = (fullest.time + 1, fullest.moment) if fullest else (self.since, Phase("setup"))
        parts: Counter[str] = Counter()
        for allocation in self.allocations:
            if allocation.time < time <= allocation.died:
                parts[self.purpose(allocation)] += allocation.nbytes
        return Peak(sum(parts.values()), time, moment, dict(parts))

    def purpose(self, allocation: Allocation) -> str:
        """The part of a prediction that an allocation belongs to."""
        phase = allocation.moment.name
        survives = {what for time, what in self.ends if allocation.time < time < allocation.died}
        # What is left of a backward pass, also if it was made with the loss, or is what a reduction left.
        is_gradient = phase in ("loss", "backward", "recompute") and "backward" in survives
        if is_gradient and allocation.label in ("", BUFFER):
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


def deepened(trace: Trace, last: int, extra: int) -> Trace | None:
    """The trace of `extra` more blocks; None = it does not follow from this one.

    Args:
        trace: of a model whose blocks before number `last` end with five equal ones.
        last: see there.
        extra: see there.
    """
    # The last block may differ from the others, and so may the first two: a sharded model gathers the next one early.
    for first in (last - 4, last - 3):
        found = _repeated(trace, first, extra)
        if found is not None:
            return found
    return None


def _repeated(trace: Trace, first: int, extra: int) -> Trace | None:
    """The trace with so many copies of block `first`, if it takes what the next one takes, at the same times.

    What either makes has to be freed after the same allocation, or after ones that are equally far away.
    """
    made = trace.allocations
    of: dict[int, list[Allocation]] = defaultdict(list)
    place: list[int] = []  # of an allocation among those of its block
    for allocation in made:
        place.append(len(of[allocation.owner]))
        of[allocation.owner].append(allocation)
    order = _with_copies(made, first, extra)
    if order is None or len(of[first]) != len(of[first + 1]):
        return None
    moves = []  # whether the n-th thing of a block in the middle is freed at a time that moves with the block
    for one, next_one in zip(of[first], of[first + 1], strict=True):
        if (one.nbytes, one.label, one.moment.name) != (next_one.nbytes, next_one.label, next_one.moment.name):
            return None
        ends = [
            (FOREVER, 0) if a.died == FOREVER else (made[a.died - 1].owner, place[a.died - 1]) for a in (one, next_one)
        ]
        if ends[0][1] != ends[1][1] or ends[1][0] - ends[0][0] not in (0, 1):
            return None
        moves.append(ends[0][0] != ends[1][0])
        if moves[-1] and abs(ends[0][0] - first) > 1:
            return None

    def shifted(owner: int) -> int:
        return owner if owner <= first else owner + extra

    times = {(owner, place[allocation.time]): time for time, (owner, allocation) in enumerate(order)}

    def moved(time: int, owner: int = -1, of_owner: int = -1) -> int:
        """A time of the trace in the new one; if `owner` is given, that of a block which does as `of_owner`."""
        if time in (0, FOREVER):
            return time
        before = made[time - 1]
        new = shifted(before.owner) if owner < 0 else owner + before.owner - of_owner
        return times[new, place[time - 1]] + 1

    growth = [allocation.joined[first] for allocation in made]
    found: list[Allocation] = []
    for owner, old in order:
        in_the_middle = old.owner in (first, first + 1) and moves[place[old.time]]
        died = moved(old.died, owner, old.owner) if in_the_middle else moved(old.died)
        block = old.moment.block
        if block >= 0:
            block = shifted(block) if old.owner < 0 else block + owner - old.owner
        nbytes = old.nbytes + extra * growth[old.time]
        new = Allocation(nbytes, Phase(old.moment.name, block), len(found), old.label, owner, died)
        new.joined.update({shifted(other): size for other, size in old.joined.items()})
        found.append(new)
    flops: Counter[Phase] = Counter()
    for moment, count in trace.flops.items():
        flops[Phase(moment.name, shifted(moment.block))] += count * (1 + extra * (moment.block == first))
    return Trace(found, moved(trace.since), [(moved(time), what) for time, what in trace.ends], flops)


def _with_copies(made: list[Allocation], first: int, extra: int) -> list[tuple[int, Allocation]] | None:
    """Allocations and the blocks they are of, those of block `first` so many more times, in the order in which blocks
    follow each other there; None = they do not follow each other."""
    stretches = [(owner, list(group)) for owner, group in groupby(made, lambda allocation: allocation.owner)]
    order: list[tuple[int, Allocation]] = []
    for number, (owner, stretch) in enumerate(stretches):
        if owner != first:
            order += [(owner if owner < first else owner + extra, allocation) for allocation in stretch]
            continue
        beside = [stretches[near][0] for near in (number - 1, number + 1) if 0 <= near < len(stretches)]
        if first + 1 not in beside:
            return None
        copies = range(first, first + extra + 1)
        for copy in copies if beside[-1] == first + 1 else reversed(copies):
            order += [(copy, allocation) for allocation in stretch]
    return order
