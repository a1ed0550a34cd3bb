"""What PyTorch's allocator reserves on a GPU, by its published rules and counted by hand."""

from dataclasses import dataclass

from llama_acc.core.memory.allocator import CachingAllocator, reserved

MIB = 2**20
FOREVER = 1 << 62


@dataclass
class Lived:
    nbytes: int
    time: int
    died: int = FOREVER


def lived(*sizes_and_deaths: tuple[float, int]) -> list[Lived]:
    return [Lived(round(mib * MIB), time, died) for time, (mib, died) in enumerate(sizes_and_deaths)]


def test_small_allocations_share_segments_of_2_mib_and_middling_ones_of_20() -> None:
    allocator = CachingAllocator()
    for _ in range(4096):
        allocator.allocate(1)
    assert (allocator.allocated, allocator.reserved) == (4096 * 512, 2 * MIB)
    allocator.allocate(512)
    assert allocator.reserved == 4 * MIB
    for _ in range(6):
        allocator.allocate(3 * MIB)
    assert allocator.reserved == (4 + 20) * MIB
    allocator.allocate(3 * MIB)  # 2 are left, and are too little
    assert allocator.reserved == (4 + 40) * MIB


def test_large_allocations_have_segments_of_even_mib_and_up_to_one_is_not_cut_off() -> None:
    allocator = CachingAllocator()
    allocator.allocate(11 * MIB)
    assert (allocator.reserved, allocator.allocated) == (12 * MIB, 12 * MIB)
    allocator.allocate(10 * MIB + 1)
    assert (allocator.reserved, allocator.allocated) == (24 * MIB, 22 * MIB + 512)


def test_the_smallest_free_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator()
    large, kept, small = allocator.allocate(100 * MIB), allocator.allocate(30 * MIB), allocator.allocate(40 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.allocate(36 * MIB).address == small.address
    assert allocator.allocate(36 * MIB).address == large.address
    assert (allocator.reserved, allocator.allocated) == (170 * MIB, (30 + 36 + 36) * MIB)
    assert not kept.free


def test_what_is_free_side_by_side_is_one_block_again_but_never_across_segments() -> None:
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)):
        allocator = CachingAllocator()
        whole = allocator.allocate(60 * MIB)
        allocator.allocate(60 * MIB)
        allocator.free(whole)
        pieces = [allocator.allocate(20 * MIB) for _ in range(3)]
        assert allocator.reserved == 120 * MIB
        for piece in order:
            allocator.free(pieces[piece])
        assert allocator.allocate(60 * MIB).address == 0
        assert allocator.reserved == 120 * MIB
    allocator = CachingAllocator()
    for block in [allocator.allocate(20 * MIB) for _ in range(2)]:
        allocator.free(block)
    allocator.allocate(40 * MIB)
    assert allocator.reserved == 80 * MIB


def test_what_stays_in_a_cut_block_makes_the_next_large_one_reserve_anew() -> None:
    # 100 come and go; 10 stay where they were; the next 100 do not fit beside them.
    assert reserved(lived((100, 1), (10, FOREVER), (100, FOREVER))) == 200 * MIB
    assert reserved(lived((100, 2), (10, FOREVER), (100, FOREVER))) == 110 * MIB
    assert reserved(lived((100, 1), (10, 2), (100, FOREVER))) == 100 * MIB


def test_a_step_that_is_done_again_need_not_find_the_same_places() -> None:
    # A step makes a gradient of 10 while 100 come and go: the second time, the gradient is cut from the 100.
    step = lived((50, FOREVER), (10, FOREVER), (100, 3))
    assert reserved(step) == 160 * MIB
    assert reserved(step, step=1) == 160 * MIB
    step = lived((50, FOREVER), (100, 2), (10, FOREVER), (95, 4))
    assert reserved(step) == (50 + 100 + 96) * MIB
    assert reserved(step, step=1) == (50 + 100 + 96) * MIB
    assert reserved(lived((100, 2), (30, FOREVER), (80, FOREVER)), since=1) == 110 * MIB
    assert reserved([*lived((100, 1)), Lived(0, 1)]) == 100 * MIB
