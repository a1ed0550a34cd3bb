"""What a deep model takes, from what one of few blocks takes: a block in the middle does as the one after it.

No figure is extrapolated: the allocations of the missing blocks are put in where those of the present ones are, and
what follows from all of them is found as ever.
"""

from collections import Counter, defaultdict
from itertools import groupby

from llama_acc.core.vram.tracker import FOREVER, Allocation, Moment, Trace


def deepened(trace: Trace, few: int, many: int, one_more: Trace | None = None) -> Trace | None:
    """The trace of `many` blocks, of which that of `few` has the last six; None = it does not follow from this one.

    The third of these six is repeated. It has to take what the fourth one takes, at the same times: what either makes
    is freed after the same allocation, or after ones that are equally far away.

    Args:
        trace: of `few` blocks.
        few: see there; at least 6.
        many: see there.
        one_more: the trace of one block more, where sizes go with the number of blocks.
    """
    first, extra = few - 4, many - few
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
        if (one.nbytes, one.label, one.moment.phase) != (next_one.nbytes, next_one.label, next_one.moment.phase):
            return None
        ends = [
            (FOREVER, 0) if a.died == FOREVER else (made[a.died - 1].owner, place[a.died - 1]) for a in (one, next_one)
        ]
        if ends[0][1] != ends[1][1] or ends[1][0] - ends[0][0] not in (0, 1):
            return None
        moves.append(ends[0][0] != ends[1][0])

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
    if one_more is not None:
        following = _with_copies(made, first, 1) or []
        if len(following) != len(one_more.allocations):
            return None
        for (_, allocation), larger in zip(following, one_more.allocations, strict=True):
            growth[allocation.time] = larger.nbytes - allocation.nbytes
    found = []
    for owner, old in order:
        in_the_middle = old.owner in (first, first + 1) and moves[place[old.time]]
        died = moved(old.died, owner, old.owner) if in_the_middle else moved(old.died)
        block = old.moment.block
        if block >= 0:
            block = shifted(block) if old.owner < 0 else block + owner - old.owner
        nbytes = old.nbytes + extra * growth[old.time]
        found.append(Allocation(nbytes, Moment(old.moment.phase, block), len(found), old.label, owner, died))
    flops: Counter[Moment] = Counter()
    for moment, count in trace.flops.items():
        flops[Moment(moment.phase, shifted(moment.block))] += count * (1 + extra * (moment.block == first))
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
