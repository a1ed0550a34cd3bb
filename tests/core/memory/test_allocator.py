"""What PyTorch's allocator reserves on a GPU, by its published rules and counted by hand."""

import itertools

import pytest

from llama_acc.core.memory.allocator import MIB, CachingAllocator, reserved
from llama_acc.core.memory.tracker import FOREVER, Allocation, Phase


def made(*sizes_and_deaths: tuple[float, int]) -> list[Allocation]:
    return [
        Allocation(round(mib * MIB), Phase("forward"), time, "", -1, died)
        for time, (mib, died) in enumerate(sizes_and_deaths)
    ]


@pytest.mark.parametrize(
    ("sizes", "allocated", "reserved_mib"),
    [
        ([1 / MIB] * 4096, 2, 2),  # the segment for small ones grows by 2 MiB, each is at least 512 bytes
        ([1 / MIB] * 4096 + [1 / 2048], 2 + 1 / 2048, 4),
        ([3] * 6, 18, 20),  # that for others by 20
        ([3] * 7, 21, 40),
        ([11, 1], 12, 22),
        ([10 + 1 / MIB], 10 + 1 / 2048, 20),
    ],
)
def test_segments_grow_in_steps(sizes: list[float], allocated: float, reserved_mib: int) -> None:
    allocator = CachingAllocator()
    for size in sizes:
        allocator.allocate(round(size * MIB))
    assert (allocator.allocated / MIB, allocator.reserved / MIB) == (allocated, reserved_mib)


def test_the_smallest_free_block_that_is_large_enough_is_taken_and_the_last_only_if_no_other_is() -> None:
    allocator = CachingAllocator()
    large, kept, small, last = (allocator.allocate(size * MIB) for size in (100, 30, 40, 50))
    for block in (large, small):
        allocator.free(block)
    assert allocator.allocate(36 * MIB).address == small.address
    allocator.free(last)
    assert allocator.allocate(45 * MIB).address == large.address
    assert allocator.allocate(60 * MIB).address == last.address - 4 * MIB
    assert (allocator.reserved, allocator.allocated) == (240 * MIB, (30 + 36 + 45 + 60) * MIB)
    assert not kept.free


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_what_is_free_side_by_side_is_one_block_again(order: tuple[int, ...]) -> None:
    allocator = CachingAllocator()
    whole = allocator.allocate(60 * MIB)
    allocator.allocate(60 * MIB)
    allocator.free(whole)
    pieces = [allocator.allocate(20 * MIB) for _ in range(3)]
    for piece in order:
        allocator.free(pieces[piece])
    assert allocator.allocate(60 * MIB).address == 0
    assert allocator.reserved == 120 * MIB
    alone = [allocator.allocate(20 * MIB) for _ in range(2)]
    for block in alone:
        allocator.free(block)
    allocator.allocate(40 * MIB)
    assert allocator.reserved == 160 * MIB


@pytest.mark.parametrize(
    ("sizes_and_deaths", "since", "step", "expected"),
    [
        # 100 come and go; 10 stay where they were, or behind; the next 100 do, 110 do not fit before them.
        (((100, 1), (10, FOREVER), (100, FOREVER)), 0, None, 120),
        (((100, 2), (10, FOREVER), (100, FOREVER)), 0, None, 120),
        (((100, 2), (10, FOREVER), (110, FOREVER)), 0, None, 220),
        (((100, 1), (10, 2), (100, FOREVER)), 0, None, 100),
        (((100, 1), (0, FOREVER)), 0, None, 100),
        (((100, 2), (30, FOREVER), (80, FOREVER)), 1, None, 120),
        # A step makes a gradient of 10 while 100 come and go; then it is done again.
        (((50, FOREVER), (10, FOREVER), (100, 3)), 0, None, 160),
        (((50, FOREVER), (10, FOREVER), (100, 3)), 0, 1, 160),
        (((50, FOREVER), (100, 2), (10, FOREVER), (95, 4)), 0, 1, 160),
    ],
)
def test_what_stays_makes_the_next_larger_one_reserve_anew(
    sizes_and_deaths: tuple[tuple[float, int], ...], since: int, step: int | None, expected: int
) -> None:
    assert reserved(made(*sizes_and_deaths), since, step) == expected * MIB
